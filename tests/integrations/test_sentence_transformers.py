"""The loss of sentence-transformers against that library's own losses and against plain float64."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sentence_transformers", reason="the extra sentence-transformers is not installed")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import dot_score, euclidean_sim
from torch import Tensor, nn

import negcache_fn
from negcache_fn.integrations.sentence_transformers import NegativeCacheLoss
from negcache_fn.integrations.sentence_transformers.ids import content_ids
from negcache_fn.integrations.sentence_transformers.layout import Layout
from negcache_fn.integrations.sentence_transformers.model import Tokenizing
from negcache_fn.integrations.sentence_transformers.reader import Reader
from tests.support import tiny
from tests.support.options import step_keywords

Columns = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def model(folder: Path) -> SentenceTransformer:
    return tiny.transformer(folder / "right").eval()


def columns(model: SentenceTransformer, rows: int, count: int, seed: int, prompt: str | None = None) -> Columns:
    found = [tiny.texts(rows, 100 * seed + column) for column in range(count)]
    return [model.preprocess(part, prompt=prompt) for part in found]


def copied(batch: Columns) -> Columns:
    return [{key: value.clone() if isinstance(value, Tensor) else value for key, value in c.items()} for c in batch]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True))


@pytest.mark.parametrize("similarity", [None, dot_score])
@pytest.mark.parametrize("count", [2, 4])
def test_without_a_cache_it_is_multiple_negatives_ranking(
    model: SentenceTransformer, count: int, similarity: Any
) -> None:
    options = {} if similarity is None else {"similarity_fct": similarity, "scale": 0.5}
    batch = columns(model, 6, count, 1)
    ours, theirs = NegativeCacheLoss(model, 64, **options), MultipleNegativesRankingLoss(model, **options)
    found, expected = ours(copied(batch), None), theirs(copied(batch), torch.empty(0))
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(model, found), gradients(model, expected), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_without_a_cache_it_is_matryoshka(model: SentenceTransformer) -> None:
    batch, dims = columns(model, 6, 3, 1), ([32, 16, 5], [1.0, 0.5, 0.25])
    ours = MatryoshkaLoss(model, NegativeCacheLoss(model, 64), *dims)
    theirs = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), *dims)
    found, expected = ours(copied(batch), torch.empty(0)), theirs(copied(batch), torch.empty(0))
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(model, found), gradients(model, expected), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def plain(model: SentenceTransformer, anchors: list[str], batch: list[str], cached: list[str], dim: int) -> Tensor:
    """Cross entropy over the batch and what is cached, in float64."""
    with torch.no_grad():
        embedded = [
            nn.functional.normalize(model(model.preprocess(part))["sentence_embedding"].double()[:, :dim], dim=-1)
            for part in (anchors, batch, cached)
        ]
    scores = 20 * embedded[0] @ torch.cat(embedded[1:]).T
    return nn.functional.cross_entropy(scores, torch.arange(len(anchors)))


@pytest.mark.parametrize("draws", [{"draws_per_query": 3}, {"num_draws": 1}])
@pytest.mark.parametrize("dims", [[32], [32, 16, 4], [16]])
def test_value_over_batch_and_cache(model: SentenceTransformer, dims: list[int], draws: Any) -> None:
    """Nothing is stale, so the value is exact; the positive of one anchor is in the cache already, and no negative."""
    earlier, anchors, batch = tiny.texts(10, 1), tiny.texts(6, 2), tiny.texts(12, 3)
    batch[2] = earlier[4]
    inner = NegativeCacheLoss(model, 64, **step_keywords(staleness_correction="none", **draws))
    loss: nn.Module = inner if dims == [32] else MatryoshkaLoss(model, inner, dims)
    with torch.no_grad():
        before = [model.preprocess(part) for part in (earlier[:5], earlier[:5], earlier[5:])]
    loss(before, None)
    assert inner.state is not None
    assert int((inner.state["items", "id"] >= 0).sum()) == 10
    found = loss([model.preprocess(part) for part in (anchors, batch[:6], batch[6:])], None)
    cached = [text for text in earlier if text != earlier[4]]
    expected = sum(float(plain(model, anchors, batch, cached, dim)) for dim in dims)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    kept = inner.state["items", "id"]
    assert int((kept >= 0).sum()) == 21  # all texts once


def test_mean_gradient_is_that_of_the_exact_loss() -> None:
    """Over many draws, in all dimensions of MatryoshkaLoss, where nothing is stale.

    Along 20 random directions: within 4 standard errors, a false alarm in a thousand seeds.
    """
    model, samples = tiny.static(), 150
    earlier, anchors, batch = tiny.texts(10, 1), tiny.texts(3, 2), tiny.texts(3, 3)
    inner = NegativeCacheLoss(
        model,
        64,
        options=negcache_fn.StepOptions(draws_per_query=2, share_draws=False, staleness_correction="none"),
        max_length=24,
        scale=5.0,
    )
    loss = MatryoshkaLoss(model, inner, [32, 8])
    loss([model.preprocess(part) for part in (earlier, earlier)], None)
    assert inner.state is not None
    filled = inner.state.clone()
    weight = model[0].embedding.weight

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, weight)[0]

    drawn: list[Tensor] = []
    for seed in range(samples):
        state = filled.clone()
        state["seed"].fill_(seed)
        inner.state = state.lock_()
        drawn.append(gradient(loss([model.preprocess(part) for part in (anchors, batch)], None)))
    found = torch.stack(drawn)
    embedded = [model(model.preprocess(part))["sentence_embedding"] for part in (anchors, batch, earlier)]
    exact = torch.zeros(())
    for dim in (32, 8):
        first = [nn.functional.normalize(part[:, :dim], dim=-1) for part in embedded]
        exact = exact + nn.functional.cross_entropy(5 * first[0] @ torch.cat(first[1:]).T, torch.arange(3))
    directions = torch.randn(20, weight.numel(), generator=torch.Generator().manual_seed(1))
    along = found.flatten(1) @ directions.T
    error = along.mean(0) - directions @ gradient(exact).flatten()
    deviations = error / (along.std(0) / samples**0.5)
    assert float(deviations.abs().max()) < 4
    assert float(deviations.abs().max()) > 0.5


@pytest.mark.parametrize("kind", ["right", "left", "static", "prompt"])
def test_rows_give_the_embeddings_of_the_texts(folder: Path, kind: str) -> None:
    model = tiny.static() if kind == "static" else tiny.transformer(folder / kind, left=kind == "left")
    model.eval()
    prompt = "w1 w2 w3 " if kind == "prompt" else None
    if kind == "prompt":
        model.set_pooling_include_prompt(False)
    texts = tiny.texts(10, 1)
    batch = [model.preprocess(part, prompt=prompt) for part in (texts[:5], texts[5:])]
    loss = NegativeCacheLoss(model, 64, max_length=24)
    documents = Reader(model, loss._settings).layout(batch[0]).with_room(24, 24)
    rows = documents.rows(batch)
    with torch.no_grad():
        for chosen in (list(range(10)), [7, 1, 1], [3]):
            found = model(documents.batch({key: values[chosen] for key, values in rows.items()}))["sentence_embedding"]
            expected = model(model.preprocess([texts[row] for row in chosen], prompt=prompt))["sentence_embedding"]
            torch.testing.assert_close(found, expected)
    assert all(values.shape in ((10, 24), (10,)) for values in rows.values())
    assert rows["input_ids"].dtype == torch.int32
    assert kind == "static" or rows["attention_mask"].dtype == torch.bool


tokens = st.lists(st.integers(0, 2**20), min_size=1, max_size=8)


def ids_of(lists: list[list[int]], width: int, *, left: bool) -> Tensor:
    column = {"input_ids": torch.zeros(len(lists), 8, dtype=torch.int64), "attention_mask": torch.zeros(len(lists), 8)}
    for row, ids in enumerate(lists):
        place = slice(8 - len(ids), 8) if left else slice(0, len(ids))
        column["input_ids"][row, place] = torch.tensor(ids)
        column["attention_mask"][row, place] = 1
    column["attention_mask"] = column["attention_mask"].long()
    tokenizing = Tokenizing(longest=512, left=left, padding=3, head=0, tail=0, cuts_left=False)
    layout = Layout.of(column, tokenizing).with_room(width, width)
    return content_ids(layout, layout.rows([column]))


@given(st.lists(tokens, min_size=1, max_size=20), st.booleans(), st.integers(8, 12))
def test_equal_texts_have_equal_ids(lists: list[list[int]], left: bool, width: int) -> None:
    ids = ids_of(lists, width, left=left)
    assert bool((ids >= 0).all())
    assert torch.equal(ids, ids_of(lists, 8, left=not left))
    assert len(set(ids.tolist())) == len({tuple(part) for part in lists})


def test_ids_of_near_texts_differ() -> None:
    near = (
        [[a, b] for a in range(200) for b in range(200)] + [[a] for a in range(200)] + [[a, 0, 0] for a in range(200)]
    )
    assert len(set(ids_of(near, 8, left=False).tolist())) == len(near)


@pytest.mark.parametrize("kind", ["right", "static"])
def test_mini_batches_change_nothing(folder: Path, kind: str) -> None:
    model = (tiny.static() if kind == "static" else tiny.transformer(folder / kind)).eval()
    first, second = columns(model, 9, 3, 1), columns(model, 9, 3, 2)
    values = []
    for size in (None, 4):
        loss = NegativeCacheLoss(
            model, 64, options=negcache_fn.StepOptions(draws_per_query=2), mini_batch_size=size, max_length=24
        )
        loss(copied(first), None)
        found = loss(copied(second), None)
        values.append((found, gradients(model, found)))
    torch.testing.assert_close(values[0][0], values[1][0])
    whole, parts = (torch.cat([part.flatten() for part in given if part is not None]) for _, given in values)
    assert float((parts - whole).norm() / whole.norm()) < 1e-6


def test_cached_losses_agree(model: SentenceTransformer) -> None:
    """Of an empty cache, in mini-batches, as theirs."""
    batch = columns(model, 9, 3, 1)
    found = NegativeCacheLoss(model, 64, mini_batch_size=4)(copied(batch), None)
    expected = CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)(copied(batch), torch.empty(0))
    torch.testing.assert_close(found, expected)


def test_labels_as_ids(model: SentenceTransformer) -> None:
    batch = columns(model, 3, 3, 1)
    loss = NegativeCacheLoss(model, 64, document_ids="labels")
    loss(copied(batch), torch.tensor([5, 6, 7]))
    assert loss.state is not None
    assert loss.state["items", "id"][:6].tolist() == [5, 6, 7, -1, -1, -1]
    loss = NegativeCacheLoss(model, 64, document_ids="labels")
    loss(copied(batch), torch.tensor([[5, 8], [6, 9], [7, 10]]))
    assert loss.state is not None
    assert loss.state["items", "id"][:6].tolist() == [5, 6, 7, 8, 9, 10]
    for labels in (None, torch.ones(3), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match=r"labels are .*; expected integers \[3\] or \[3, 2\]"):
            loss(copied(batch), labels)


def test_evaluation_writes_nothing(model: SentenceTransformer) -> None:
    loss = NegativeCacheLoss(model, 64)
    with torch.no_grad():
        loss(columns(model, 4, 2, 1), None)
    assert loss.state is None
    loss(columns(model, 4, 2, 1), None)
    assert loss.state is not None
    before = loss.state.clone()
    with torch.no_grad():
        loss(columns(model, 4, 2, 2), None)
    assert (loss.state == before).all()


def test_copies_are_independent(model: SentenceTransformer) -> None:
    loss = NegativeCacheLoss(model, 64, learnable_scale=True, options=negcache_fn.StepOptions(draws_per_query=2))
    loss(columns(model, 4, 2, 1), None)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.state is not None
        assert loss.state is not None
        assert (other.state == loss.state).all()
        other(columns(model, 4, 2, 2), None)
        assert not (other.state == loss.state).all()
        assert torch.equal(other.scaling.logarithm, loss.scaling.logarithm)


def test_says_what_does_not_fit(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match=r"similarity_fct is .*; expected cos_sim or dot_score"):
        NegativeCacheLoss(model, similarity_fct=euclidean_sim)
    with pytest.raises(
        ValueError, match=r"options is StepOptions\(.*in_batch=False.*\); expected in_batch, reduction and"
    ):
        NegativeCacheLoss(model, options=negcache_fn.StepOptions(in_batch=False))
    with pytest.raises(TypeError, match=r"options is a dict; expected negcache_fn\.StepOptions"):
        NegativeCacheLoss(model, options={"draws_per_query": 3})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="document_ids is 'text'; expected one of 'tokens', 'labels'"):
        NegativeCacheLoss(model, document_ids="text")
    with pytest.raises(ValueError, match="cache_size is 0; expected at least 1"):
        NegativeCacheLoss(model, 0)
    with pytest.raises(ValueError, match="scale is 0; expected a number above 0"):
        NegativeCacheLoss(model, scale=0)
    loss = NegativeCacheLoss(model, 64)
    with pytest.raises(ValueError, match="1 column; expected at least 2"):
        loss(columns(model, 4, 1, 1), None)
    loss(columns(model, 4, 2, 1), None)
    model.set_pooling_include_prompt(False)
    with pytest.raises(ValueError, match=r"has prompt_length=2; expected None, as in all that are cached"):
        loss([*columns(model, 4, 1, 1), *columns(model, 4, 1, 2, prompt="w1 ")], None)
    bare = [
        {key: value for key, value in column.items() if key != "token_type_ids"} for column in columns(model, 4, 2, 1)
    ]
    with pytest.raises(ValueError, match=r"a column has the features .*; expected .*token_type_ids"):
        loss(bare, None)


def test_model_card(model: SentenceTransformer) -> None:
    loss = NegativeCacheLoss(model, scale=30.0, options=negcache_fn.StepOptions(draws_per_query=4))
    config = loss.get_config_dict()
    assert config["scale"] == pytest.approx(30)
    assert config["similarity_fct"] == "cos_sim"
    assert config["draws_per_query"] == 4
    assert "Lindgren" in loss.citation
