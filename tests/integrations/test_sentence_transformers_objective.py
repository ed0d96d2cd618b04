"""What the loss of sentence-transformers is beyond the cache's softmax: its modes, filters, attributes and evaluation.

The oracles are that library's own losses on the same batch, and plain float64 over batch and cache.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="the extra sentence-transformers is not installed")

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import dot_score
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import EarlyStoppingCallback, TrainerCallback

import negcache_fn
from negcache_fn.integrations.sentence_transformers import FalseNegativeFilter, NegativeCacheCallback, NegativeCacheLoss
from tests.integrations.test_sentence_transformers_trainer import arguments
from tests.support import tiny
from tests.support.processes import run_ranks

Columns = list[dict[str, Any]]
DIRECTIONS = [
    ("query_to_doc", *further)
    for count in range(4)
    for further in itertools.combinations(("query_to_query", "doc_to_query", "doc_to_doc"), count)
]
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")
# Embeddings as they are cached and drawn: nothing is stale.
EXACT = negcache_fn.StepOptions(staleness_correction="none")


def made(seed: int = 0) -> SentenceTransformer:
    """A bag of words whose scores are far from each other."""
    model = tiny.static()
    torch.manual_seed(seed + 1)
    nn.init.normal_(model[0].embedding.weight)
    return model


def columns(model: SentenceTransformer, rows: int, count: int, seed: int) -> Columns:
    return [dict(model.preprocess(tiny.texts(rows, 100 * seed + column))) for column in range(count)]


def copied(batch: Columns) -> Columns:
    return [{key: value.clone() if isinstance(value, Tensor) else value for key, value in c.items()} for c in batch]


def gradient(model: SentenceTransformer, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, model[0].embedding.weight)[0]


def embedded(model: SentenceTransformer, texts: list[str]) -> Tensor:
    if not texts:
        return torch.zeros(0, tiny.DIM, dtype=torch.float64)
    with torch.no_grad():
        return nn.functional.normalize(model(dict(model.preprocess(texts)))["sentence_embedding"].double(), dim=-1)


@pytest.mark.parametrize("mode", ["joint", "per_direction"])
@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("hardness", [None, *HARDNESS])
def test_modes_of_multiple_negatives_ranking(directions: tuple[str, ...], mode: str, hardness: str | None) -> None:
    """Value and gradient with an empty cache, in all dimensions and in fewer, and in evaluation."""
    model = made()
    options: dict[str, Any] = {"directions": directions, "partition_mode": mode}
    options |= {"hardness_mode": hardness, "hardness_strength": 5.0, "scale": 7.0}
    if mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
        with pytest.raises(ValueError, match=r"partition_mode is 'per_direction' .*; expected 'joint'"):
            NegativeCacheLoss(model, 64, **options)
        return
    for count, extra in ((2, {}), (4, {}), (3, {"similarity_fct": dot_score, "scale": 0.3})):
        batch = columns(model, 5, count, 1)
        for dims in (None, [32, 8]):
            ours: nn.Module = NegativeCacheLoss(model, 64, **options | extra)
            theirs: nn.Module = MultipleNegativesRankingLoss(model, **options | extra)
            evaluated: nn.Module = NegativeCacheLoss(model, 64, **options | extra)
            if dims is not None:
                ours, theirs, evaluated = (MatryoshkaLoss(model, loss, dims) for loss in (ours, theirs, evaluated))
            found, expected = ours(copied(batch), torch.empty(0)), theirs(copied(batch), torch.empty(0))
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(gradient(model, found), gradient(model, expected), atol=1e-5, rtol=1e-4)
            with torch.no_grad():
                torch.testing.assert_close(evaluated(copied(batch), torch.empty(0)), expected.detach())


@pytest.mark.parametrize(
    ("directions", "mode"),
    [(DIRECTIONS[-1], "joint"), (("query_to_doc", "doc_to_query"), "per_direction")],
)
def test_modes_of_documents_without_ids(directions: tuple[str, ...], mode: str) -> None:
    """Anonymous in training, unknown in evaluation: nothing but its place says which documents a query has."""
    model = made()
    options: dict[str, Any] = {"directions": directions, "partition_mode": mode}
    options |= {"hardness_mode": "in_batch_negatives", "hardness_strength": 5.0}
    batch = columns(model, 5, 3, 1)
    ours = NegativeCacheLoss(model, 64, document_ids="labels", **options)
    theirs = MultipleNegativesRankingLoss(model, **options)
    expected = theirs(copied(batch), torch.empty(0))
    found = ours(copied(batch), torch.full((5,), -1))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(model, found), gradient(model, expected), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(copied(batch)), expected.detach())


@pytest.mark.parametrize("dims", [[32, 8], [16, 4]])
def test_weights_of_matryoshka_sizes(dims: list[int]) -> None:
    """All dimensions among them, or not: value and gradient of theirs, and in evaluation."""
    model = made()
    batch = columns(model, 5, 3, 1)
    ours, theirs = (
        MatryoshkaLoss(model, loss, dims, [0.3, 1.7])
        for loss in (NegativeCacheLoss(model, 64), MultipleNegativesRankingLoss(model))
    )
    found, expected = ours(copied(batch), torch.empty(0)), theirs(copied(batch), torch.empty(0))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(model, found), gradient(model, expected), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(copied(batch), torch.empty(0)), expected.detach())


def expected_with_cache(
    model: SentenceTransformer, anchors: list[str], batch: list[str], cached: list[str], directions: tuple[str, ...]
) -> dict[str, float]:
    """Over batch and cache by loops, joint and per direction."""
    queries, documents, others = (embedded(model, texts) for texts in (anchors, batch, cached))
    rows, scale = len(anchors), 20.0
    joint, divided = [], []
    for i in range(rows):
        positive = float(scale * queries[i] @ documents[i])
        parts = {"query_to_doc": [scale * queries[i] @ d for d in (*documents, *others)]}
        parts["query_to_query"] = [scale * queries[i] @ queries[j] for j in range(rows) if j != i]
        parts["doc_to_query"] = [scale * documents[i] @ query for query in queries]
        parts["doc_to_doc"] = [scale * documents[i] @ d for j, d in enumerate(documents) if j % rows != i]
        chosen = [torch.stack(parts[name]) for name in directions]
        joint.append(float(torch.cat(chosen).logsumexp(0)) - positive)
        divided.append(sum(float(part.logsumexp(0)) for part in chosen) / len(chosen) - positive)
    return {"joint": sum(joint) / rows, "per_direction": sum(divided) / rows}


@pytest.mark.parametrize(
    ("directions", "mode"),
    [(DIRECTIONS[-1], "joint"), (("query_to_doc", "doc_to_query"), "per_direction"), (("query_to_doc",), "joint")],
)
def test_directions_over_batch_and_cache(directions: tuple[str, ...], mode: str) -> None:
    model = made()
    earlier, anchors, batch = tiny.texts(20, 1), tiny.texts(6, 2), tiny.texts(12, 3)
    loss = NegativeCacheLoss(model, 64, directions=directions, partition_mode=mode, options=EXACT)
    loss.prefill(earlier)
    found = loss([dict(model.preprocess(part)) for part in (anchors, batch[:6], batch[6:])])
    expected = expected_with_cache(model, anchors, batch, earlier, directions)[mode]
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    without = expected_with_cache(model, anchors, batch, [], directions)[mode]
    assert float(loss.metrics["batch_loss"]) == pytest.approx(without, rel=1e-5)
    assert float(loss.metrics["cache_loss"]) == pytest.approx(expected - without, abs=1e-5)
    assert expected - without > 1e-3


def test_duplicates_are_no_negatives_in_any_direction() -> None:
    """Two queries with the same positive, in a batch of one pair more."""
    model = made()
    anchors, documents = tiny.texts(3, 1), tiny.texts(3, 2)
    documents[2] = documents[0]
    queries, texts = embedded(model, anchors), embedded(model, documents)
    total = 0.0
    for i, others in enumerate(([1], [0, 2], [1])):
        positive = 20 * queries[i] @ texts[i]
        one_of_each = others if i != 1 else [0]  # equal documents are one class
        scores = [positive, *(20 * queries[i] @ texts[j] for j in one_of_each)]
        scores += [20 * queries[i] @ queries[j] for j in others]
        scores += [20 * texts[i] @ queries[j] for j in (i, *others)]
        scores += [20 * texts[i] @ texts[j] for j in others]
        total += float(torch.stack(scores).logsumexp(0) - positive) / 3
    loss = NegativeCacheLoss(model, 64, directions=DIRECTIONS[-1])
    found = loss([dict(model.preprocess(part)) for part in (anchors, documents)])
    assert float(found.detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_own_negatives_alone(count: int) -> None:
    """Neither the documents of other queries in the batch, nor what is cached of the own ones."""
    model = made()
    earlier, anchors = tiny.texts(10, 1), tiny.texts(4, 2)
    texts = [tiny.texts(4, 3 + column) for column in range(count - 1)]
    if count == 4:
        texts[1][2] = earlier[3]
    loss = NegativeCacheLoss(model, 64, negatives="own", options=EXACT)
    loss.prefill(earlier)
    found = loss([dict(model.preprocess(part)) for part in (anchors, *texts)])
    queries, cached = embedded(model, anchors), embedded(model, earlier)
    own = [embedded(model, part) for part in texts]
    total = 0.0
    for i in range(4):
        others = [d for j, d in enumerate(cached) if not (count == 4 and i == 2 and j == 3)]
        scores = torch.stack([20 * queries[i] @ d for d in (*(part[i] for part in own), *others)])
        total += float(scores.logsumexp(0) - scores[0]) / 4
    assert float(found.detach()) == pytest.approx(total, rel=1e-5)
    with torch.no_grad():
        batch = [dict(model.preprocess(part)) for part in (anchors, *texts)]
        scores = 20 * (queries[:, None] * torch.stack(own, 1)).sum(-1)
        expected = nn.functional.cross_entropy(scores, torch.zeros(4, dtype=torch.int64))
        assert float(loss(batch)) == pytest.approx(float(expected), abs=1e-6)


def with_hardness(
    model: SentenceTransformer, texts: list[list[str]], cached: list[str], dims: list[int], **settings: Any
) -> Tensor:
    """Over batch and cache by loops, with every document encoded now: the loss, with gradient."""
    mode, strength = settings["hardness_mode"], settings["hardness_strength"]
    own_alone, scale = settings.get("negatives") == "own", settings.get("scale", 20.0)
    whole = [
        model(dict(model.preprocess(part)))["sentence_embedding"].double() for part in (*texts, cached) if len(part) > 0
    ]
    total = torch.zeros((), dtype=torch.float64)
    for dim in dims:
        queries, *columns, others = (nn.functional.normalize(part[:, :dim], dim=-1) for part in whole)
        for i, query in enumerate(queries):
            positive, scores = query @ columns[0][i], []
            for c, column in enumerate(columns):
                for j, document in enumerate(column):
                    if (i, 0) == (j, c) or (own_alone and j != i):
                        continue
                    own = j == i
                    weighted = {"hard_negatives": own, "in_batch_negatives": not own, "all_negatives": True}[mode]
                    x = query @ document
                    scores.append(scale * x + strength * weighted * x.detach())
            for document in others:
                x = query @ document
                scores.append(scale * x + strength * (mode != "hard_negatives") * x.detach())
            everything = torch.stack([scale * positive, *scores])
            total = total + (everything.logsumexp(0) - scale * positive) / len(queries)
    return total


@pytest.mark.parametrize("dims", [[32], [32, 8]])
@pytest.mark.parametrize("negatives", ["batch", "own"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", HARDNESS)
def test_hardness_over_batch_and_cache(mode: str, count: int, negatives: str, dims: list[int]) -> None:
    """Value and gradient, drawn documents' included, as every cached document is drawn."""
    model = made()
    settings: dict[str, Any] = {"hardness_mode": mode, "hardness_strength": 4.0, "negatives": negatives, "scale": 9.0}
    options = negcache_fn.StepOptions(staleness_correction="none", num_draws=40)
    inner = NegativeCacheLoss(model, 64, options=options, **settings)
    earlier, texts = tiny.texts(10, 1), [tiny.texts(4, 2 + column) for column in range(1 + count)]
    inner.prefill(earlier)
    loss = inner if dims == [32] else MatryoshkaLoss(model, inner, dims)
    found = loss([dict(model.preprocess(part)) for part in texts], torch.empty(0))
    expected = with_hardness(model, texts, earlier, dims, **settings)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(model, found), gradient(model, expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["in_batch_negatives", "all_negatives"])
def test_cached_documents_weigh_as_in_multiple_negatives_ranking(mode: str) -> None:
    """There "all_negatives" weights further columns as if they were cached: value and gradient."""
    model = made()
    texts, cached = [tiny.texts(4, seed) for seed in (1, 2)], [tiny.texts(4, seed) for seed in (3, 4)]
    options = negcache_fn.StepOptions(staleness_correction="none", num_draws=40)
    ours = NegativeCacheLoss(model, 64, hardness_mode=mode, hardness_strength=9.0, options=options)
    ours.prefill([*cached[0], *cached[1]])
    found = ours([dict(model.preprocess(part)) for part in texts])
    theirs = MultipleNegativesRankingLoss(model, hardness_mode="all_negatives", hardness_strength=9.0)
    expected = theirs([dict(model.preprocess(part)) for part in (*texts, *cached)], torch.empty(0))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(model, found), gradient(model, expected), atol=1e-5, rtol=1e-4)


FILTERS = [
    {"margin_strategy": "absolute", "margin": 0.1},
    {"margin_strategy": "relative", "margin": 0.05},
    {"margin_strategy": None, "max_score": 0.3},
    {"margin_strategy": "absolute", "margin": 0.0, "max_score": 0.4},
]


@pytest.mark.parametrize("mode", [None, "in_batch_negatives"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("options", FILTERS)
def test_filters_over_batch_and_cache(options: dict[str, Any], guided: bool, mode: str | None) -> None:
    """By the model's own scores and by a guide's, with hard negatives, in all dimensions and in fewer."""
    model = made()
    guide = made(7) if guided else None
    earlier, anchors, batch = tiny.texts(20, 1), tiny.texts(5, 2), tiny.texts(10, 3)
    chosen = FalseNegativeFilter(guide=guide, **options)
    for dims in ([32], [32, 8]):
        hardness: dict[str, Any] = {"hardness_mode": mode, "hardness_strength": 4.0}
        inner = NegativeCacheLoss(model, 64, false_negatives=chosen, options=EXACT, **hardness)
        inner.prefill(earlier)
        loss = inner if dims == [32] else MatryoshkaLoss(model, inner, dims)
        before = inner.state.clone()  # type: ignore[union-attr]
        inputs = [dict(model.preprocess(part)) for part in (anchors, batch[:5], batch[5:])]
        with torch.no_grad():
            evaluated = loss(copied(inputs), torch.empty(0))
        assert (inner.state == before).all()  # type: ignore[union-attr]
        found = loss(copied(inputs), torch.empty(0))
        totals, left_out = {"all": 0.0, "batch": 0.0}, 0
        for dim in dims:
            queries, documents = (
                nn.functional.normalize(embedded(model, part)[:, :dim], dim=-1) for part in (anchors, batch + earlier)
            )
            judged = queries @ documents.T
            if guide is not None:
                judged = embedded(guide, anchors) @ embedded(guide, batch + earlier).T
            for i in range(5):
                positive = judged[i, i]
                limits = [options.get("max_score", 2.0)]
                if options["margin_strategy"] is not None:
                    absolute = options["margin_strategy"] == "absolute"
                    limits.append(positive - (1 if absolute else positive.abs()) * options["margin"])
                kept = (judged[i] <= min(limits)) | (torch.arange(30) == i)
                left_out += int((~kept).sum())
                others = torch.arange(30) % 5 != i if mode is not None else torch.zeros(30)
                others[10:] = mode is not None
                scores = (20 + 4 * others) * (queries[i] @ documents.T)
                for name, many in (("all", 30), ("batch", 10)):
                    totals[name] += float(scores[:many][kept[:many]].logsumexp(0) - scores[i]) / 5
        assert left_out > 5
        assert float(found.detach()) == pytest.approx(totals["all"], rel=1e-5, abs=1e-6)
        assert float(evaluated) == pytest.approx(totals["batch"], rel=1e-5, abs=1e-6)


def discriminating(model: SentenceTransformer) -> SentenceTransformer:
    """With scores that are far from each other, so that a filter keeps some documents."""
    for name, parameter in model.named_parameters():
        if name.endswith("word_embeddings.weight"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        elif name.endswith("embeddings.weight"):  # of positions and types, which all texts share
            nn.init.zeros_(parameter)
    return model


def loss_of_directions(
    parts: dict[str, tuple[Tensor, Tensor]], directions: tuple[str, ...], mode: str, limit: Any
) -> float:
    """By loops over the scores and the judged similarities [B, n] of each direction, both with its own exclusions."""
    rows = len(parts["query_to_doc"][0])
    total = 0.0
    for i in range(rows):
        positive, highest = (float(part[i, i]) for part in parts["query_to_doc"])
        kept: dict[str, list[float]] = {}
        for name in directions:
            scores, judged = parts[name]
            kept[name] = []
            for j in range(scores.shape[1]):
                pair = name in ("query_to_doc", "doc_to_query") and j == i
                own = name in ("query_to_query", "doc_to_doc") and j % rows == i
                if pair or (not own and float(judged[i, j]) <= limit(highest)):
                    kept[name].append(float(scores[i, j]))
        if mode == "joint":
            kept = {"joint": list(itertools.chain.from_iterable(kept.values()))}
        each = [float(torch.tensor(scores, dtype=torch.float64).logsumexp(0)) for scores in kept.values()]
        total += sum(each) / len(each)
        total -= positive
    return total / rows


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("directions", "mode"),
    [(names, "joint") for names in DIRECTIONS[1:]] + [(("query_to_doc", "doc_to_query"), "per_direction")],
)
def test_filters_in_every_direction(directions: tuple[str, ...], mode: str, guided: bool) -> None:
    model = made()
    guide = made(7) if guided else None
    earlier, anchors, batch = tiny.texts(20, 1), tiny.texts(6, 2), tiny.texts(12, 3)
    inputs = [dict(model.preprocess(part)) for part in (anchors, batch[:6], batch[6:])]
    judge = guide or model
    queries, documents, others = (embedded(model, texts) for texts in (anchors, batch, earlier))
    of_judge = [embedded(judge, texts) for texts in (anchors, batch, earlier)]
    for margin, strategy in ((0.1, "absolute"), (0.3, "relative")):
        parts: dict[str, list[Tensor]] = {name: [] for name in DIRECTIONS[-1]}
        for scale, (q, d, c) in ((20.0, (queries, documents, others)), (1.0, of_judge)):
            parts["query_to_doc"].append(scale * q @ torch.cat([d, c]).T)
            parts["query_to_query"].append(scale * q @ q.T)
            parts["doc_to_query"].append(scale * d[:6] @ q.T)
            parts["doc_to_doc"].append(scale * d[:6] @ d.T)

        def limit(positive: float, margin: float = margin, strategy: str = strategy) -> float:
            return positive - (margin if strategy == "absolute" else abs(positive) * margin)

        chosen = FalseNegativeFilter(guide=guide, margin_strategy=strategy, margin=margin)
        loss = NegativeCacheLoss(
            model, 64, directions=directions, partition_mode=mode, false_negatives=chosen, options=EXACT
        )
        loss.prefill(earlier)
        found = loss(copied(inputs), torch.empty(0))
        pairs = {name: (both[0], both[1]) for name, both in parts.items()}
        expected = loss_of_directions(pairs, directions, mode, limit)
        assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
        everything = loss_of_directions(pairs, directions, mode, lambda _: 2.0)
        filtered_once = dict(pairs)
        for name in directions[1:]:
            filtered_once[name] = (pairs[name][0], torch.full_like(pairs[name][1], -2.0))
        assert abs(expected - everything) > 1e-3
        # Each further direction loses something to the filter.
        assert abs(expected - loss_of_directions(filtered_once, directions, mode, limit)) > 1e-6


@pytest.mark.parametrize("loss_class", [GISTEmbedLoss, CachedGISTEmbedLoss])
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize(("anchors", "positives"), [(True, False), (False, True), (True, True)])
def test_guided_directions_are_those_of_gist(
    loss_class: Any, strategy: str, anchors: bool, positives: bool, tmp_path: Path
) -> None:
    """`contrast_anchors` and `contrast_positives` are the directions "query_to_query" and "doc_to_doc", for pairs."""
    model = tiny.transformer(tmp_path / "model").eval()
    guide = discriminating(tiny.transformer(tmp_path / "model").eval())
    batch = [dict(model.preprocess(tiny.texts(6, seed))) for seed in (1, 2)]
    names = ("query_to_doc", *["query_to_query"] * anchors, *["doc_to_doc"] * positives)
    chosen = FalseNegativeFilter(guide=guide, margin_strategy=strategy, margin=0.05)
    ours = NegativeCacheLoss(model, 64, scale=100.0, false_negatives=chosen, directions=names)
    options: dict[str, Any] = {"contrast_anchors": anchors, "contrast_positives": positives}
    if loss_class is CachedGISTEmbedLoss:
        options["mini_batch_size"] = 4
    theirs = loss_class(model, guide, temperature=0.01, margin_strategy=strategy, margin=0.05, **options)
    same_as_theirs(model, ours, theirs, batch)


def same_as_theirs(model: SentenceTransformer, ours: nn.Module, theirs: nn.Module, batch: Columns) -> None:
    """Value and gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    results: list[tuple[float, list[Tensor]]] = []
    for loss in (ours, theirs):
        model.zero_grad()
        value = loss(copied(batch), torch.empty(0))
        value.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        results.append((float(value.detach()), gradients))
    model.zero_grad()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-5)
    assert max(float(g.abs().max()) for g in results[1][1]) > 1e-4
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dims", [None, [16, 8]])
@pytest.mark.parametrize("hardness", [None, *HARDNESS])
@pytest.mark.parametrize(
    ("directions", "mode"), [(DIRECTIONS[-1], "joint"), (("query_to_doc", "doc_to_query"), "per_direction")]
)
def test_mini_batches_are_those_of_cached_multiple_negatives_ranking(
    directions: tuple[str, ...], mode: str, hardness: str | None, dims: list[int] | None, tmp_path: Path
) -> None:
    """A transformer, three columns of documents, and mini-batches that do not divide the batch."""
    model = tiny.transformer(tmp_path / "model").eval()
    batch = [dict(model.preprocess(tiny.texts(7, seed))) for seed in range(4)]
    options: dict[str, Any] = {"directions": directions, "partition_mode": mode, "mini_batch_size": 3, "scale": 15.0}
    options |= {"hardness_mode": hardness, "hardness_strength": 5.0}
    ours: nn.Module = NegativeCacheLoss(model, 64, **options)
    theirs: nn.Module = CachedMultipleNegativesRankingLoss(model, **options)
    if dims is not None:
        ours, theirs = (MatryoshkaLoss(model, loss, dims) for loss in (ours, theirs))
    same_as_theirs(model, ours, theirs, batch)


def test_log_weights_of_negatives_alone() -> None:
    """`weigh_positives=False` of the options: a positive's score stays as it is."""
    model = made()
    earlier, anchors, batch = tiny.texts(10, 1), tiny.texts(4, 2), tiny.texts(8, 3)
    options = negcache_fn.StepOptions(staleness_correction="none", weigh_positives=False)
    for dims in ([32], [32, 8]):
        inner = NegativeCacheLoss(
            model, 64, log_weights=lambda ids: (ids % 7).float() / 3, options=options, document_ids="labels"
        )
        inner.prefill(earlier, ids=torch.arange(50, 60))
        loss = inner if dims == [32] else MatryoshkaLoss(model, inner, dims)
        labels = torch.arange(8).view(2, 4).t().contiguous()
        parts = [dict(model.preprocess(part)) for part in (anchors, batch[:4], batch[4:])]
        found = loss(parts, labels)
        expected = 0.0
        for dim in dims:
            queries, documents = (
                nn.functional.normalize(embedded(model, part)[:, :dim], dim=-1) for part in (anchors, batch + earlier)
            )
            weights = torch.tensor([*range(8), *range(50, 60)]) % 7 / 3
            scores = 20 * queries @ documents.T + weights.double() * (torch.arange(18) != torch.arange(4)[:, None])
            expected += float(nn.functional.cross_entropy(scores, torch.arange(4)))
        assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_guide_is_that_of_gist(tmp_path: Path) -> None:
    """Value and gradient of GISTEmbedLoss with an empty cache, a guide that has another tokenizer included."""
    model = tiny.transformer(tmp_path / "model").eval()
    other = discriminating(tiny.transformer(tmp_path / "model").eval())
    shorter = tiny.transformer(tmp_path / "model").eval()
    shorter.load_state_dict(other.state_dict())
    shorter.max_seq_length = 6
    batch = [dict(model.preprocess(tiny.texts(6, seed))) for seed in (1, 2, 3)]
    for guide, (strategy, margin) in itertools.product(
        (other, shorter), (("absolute", 0.0), ("absolute", 0.05), ("relative", 0.05))
    ):
        chosen = FalseNegativeFilter(guide=guide, margin_strategy=strategy, margin=margin)
        ours = NegativeCacheLoss(model, 64, scale=100.0, false_negatives=chosen)
        theirs = GISTEmbedLoss(model, guide, 0.01, strategy, margin, contrast_anchors=False, contrast_positives=False)
        same_as_theirs(model, ours, theirs, batch)


def test_log_weights_and_what_is_cacheable() -> None:
    model = made()
    earlier, anchors, batch = tiny.texts(10, 1), tiny.texts(4, 2), tiny.texts(4, 3)
    called: list[Tensor] = []

    def weights(ids: Tensor) -> Tensor:
        called.append(ids)
        return (ids % 7).float() / 3

    loss = NegativeCacheLoss(model, 64, log_weights=weights, cacheable=lambda ids: ids % 2 == 0, options=EXACT)
    loss.prefill(earlier)
    assert loss.state is not None
    of_earlier = called[0]
    kept = of_earlier % 2 == 0
    assert 0 < int(kept.sum()) < 10
    assert set(loss.state["items", "id"].tolist()) == {-1, *of_earlier[kept].tolist()}
    found = loss([dict(model.preprocess(part)) for part in (anchors, batch)])
    ids = torch.cat([called[1], of_earlier[kept]])
    documents = torch.cat([embedded(model, batch), embedded(model, earlier)[kept]])
    scores = 20 * embedded(model, anchors) @ documents.T + (ids % 7) / 3
    expected = nn.functional.cross_entropy(scores, torch.arange(4))
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)
    loss.log_weights = lambda ids: ids[:2].float()
    before = loss.state.clone()
    with pytest.raises(ValueError, match=r"log_weights gave \(2,\) for the ids \[4\] of documents; expected \[4\]"):
        loss([dict(model.preprocess(part)) for part in (anchors, batch)])
    assert (loss.state == before).all()


def test_log_weights_are_of_documents_alone() -> None:
    """The direction of a document to the queries has none, neither in its scores nor in its positive's."""
    model = made()
    anchors, positives = tiny.texts(4, 2), tiny.texts(4, 3)
    loss = NegativeCacheLoss(
        model,
        64,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
        document_ids="labels",
        log_weights=lambda ids: ids.float(),
    )
    found = loss([dict(model.preprocess(part)) for part in (anchors, positives)], torch.arange(4))
    scores = 20 * embedded(model, anchors) @ embedded(model, positives).T
    own = torch.arange(4)
    each = [nn.functional.cross_entropy(part, own) for part in (scores + own, scores.T)]
    assert float(found.detach()) == pytest.approx(float(sum(each)) / 2, rel=1e-5)


def test_a_checkpoint_around_the_loss_is_refused() -> None:
    """It would draw again, from the cache that is written already."""
    model = made()
    loss, batch = NegativeCacheLoss(model, 64), columns(model, 4, 3, 1)
    loss(copied(batch))
    assert loss.state is not None
    before = loss.state.clone()
    with pytest.raises(ValueError, match=r"under torch.utils.checkpoint, which calls it again"):
        checkpoint(lambda _: loss(copied(batch)), model[0].embedding.weight, use_reentrant=False)
    assert (loss.state == before).all()


def test_prefill_reset_and_resize() -> None:
    model = made()
    texts = list(dict.fromkeys(tiny.texts(50, 1)))[:40]
    loss = NegativeCacheLoss(model, 64)
    loss.reset()
    loss.prefill(texts, batch_size=16)
    assert loss.state is not None
    live = loss.state["items", "embedded_at"] >= 0
    torch.testing.assert_close(loss.state["items", "embedding"][live].double(), embedded(model, texts))
    assert model.training
    before = loss.state.clone()
    loss(columns(model, 4, 2, 1))
    again = [dict(model.preprocess(texts[4:8])), dict(model.preprocess(texts[:4]))]
    loss(again)  # equal texts have equal ids, by whichever way they come
    assert int((loss.state["items", "id"] >= 0).sum()) == 44
    assert (loss.state["items", "id"][:40] == before["items", "id"][:40]).all()
    loss.resize(16)
    assert loss.state["items"].shape == (16,)
    assert loss.cache_size == 16
    assert loss.get_config_dict()["cache_size"] == 16
    loss.reset()
    assert float(negcache_fn.occupancy(loss.state)) == 0
    torch.testing.assert_close(
        loss(columns(model, 4, 2, 1)), MultipleNegativesRankingLoss(model)(columns(model, 4, 2, 1), torch.empty(0))
    )
    labelled = NegativeCacheLoss(model, 64, document_ids="labels")
    with pytest.raises(ValueError, match=r"ids is None with document_ids='labels'; expected \[40\]"):
        labelled.prefill(texts)
    labelled.prefill(texts, batch_size=16, ids=torch.arange(40))
    assert labelled.state is not None
    assert labelled.state["items", "id"][:40].tolist() == list(range(40))


class Schedule(TrainerCallback):
    """A temperature that falls from step to step."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss.scale = 5.0 + 3.0 * state.global_step


def test_a_temperature_schedule_is_that_of_multiple_negatives_ranking(tmp_path: Path) -> None:
    """As many documents as fit are the batch's own: the same losses in every step, but for what is cached."""
    losses: dict[str, list[float]] = {}
    for name in ("ours", "theirs", "constant"):
        model = made()
        loss: Any = MultipleNegativesRankingLoss(model) if name == "theirs" else NegativeCacheLoss(model, 64)
        # Each batch is all data, so that its documents are all that is cached.
        args = arguments(tmp_path, max_steps=4, logging_steps=1, per_device_train_batch_size=16, learning_rate=0.01)
        callbacks = [] if name == "constant" else [Schedule(loss)]
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=tiny.dataset(16, 1), loss=loss, callbacks=callbacks
        )
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-3)
    assert losses["constant"] != pytest.approx(losses["ours"], rel=0.05)


def test_attributes_work_or_are_refused() -> None:
    model = made()
    batch = columns(model, 4, 3, 1)
    loss = NegativeCacheLoss(model, 64)
    for changes in ({"scale": 5.0}, {"similarity_fct": dot_score}, {"directions": ("query_to_doc", "doc_to_query")}):
        theirs = MultipleNegativesRankingLoss(model)
        for name, value in changes.items():
            loss.reset()  # what is cached is normalised or not
            setattr(loss, name, value)
            setattr(theirs, name, value)
            assert getattr(loss, name) == value
        torch.testing.assert_close(loss(copied(batch)), theirs(copied(batch), torch.empty(0)))
        loss.reset()
        loss.scale, loss.similarity_fct = 20.0, NegativeCacheLoss(model).similarity_fct
        loss.directions = ("query_to_doc",)
    assert loss.temperature == pytest.approx(0.05)
    loss.mini_batch_size = 2
    loss.options = negcache_fn.StepOptions(draws_per_query=2)
    loss(copied(batch))
    assert "unique_draws" in loss.metrics  # of draws for each query
    before = loss.get_config_dict()
    assert loss.state is not None
    for name, value, error in (
        ("scale", 0, ValueError),
        ("scale", "x", TypeError),
        ("similarity_fct", max, ValueError),
        ("similarity_fct", dot_score, ValueError),
        ("cache_size", 128, ValueError),
        ("seed", 3, ValueError),
        ("embedding_dtype", torch.bfloat16, ValueError),
        ("document_ids", "labels", ValueError),
        ("gather_across_devices", True, ValueError),
        ("options", negcache_fn.StepOptions(reduction="sum"), ValueError),
        ("false_negatives", FalseNegativeFilter(guide=model), ValueError),
        ("temperature", 0.1, AttributeError),
    ):
        with pytest.raises(error):
            setattr(loss, name, value)
    assert loss.get_config_dict() == before
    loss.seed, loss.cache_size = 0, 64  # what they are
    learnable = NegativeCacheLoss(model, 64, learnable_scale=True)
    parameter = learnable.scaling.logarithm
    learnable.scale = 5.0
    assert learnable.scaling.logarithm is parameter
    assert learnable.get_config_dict()["scale"] == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": "x"}, TypeError, "scale is 'x', a str; expected a number above 0"),
        ({"scale": float("nan")}, ValueError, "scale is nan; expected a number above 0"),
        ({"embedding_dtype": "float32"}, TypeError, "embedding_dtype is float32; expected torch.float32"),
        ({"seed": "a"}, TypeError, "seed is 'a', a str; expected an integer"),
        ({"seed": 2**63}, ValueError, "seed is 9223372036854775808; expected in"),
        ({"max_length": 0}, ValueError, "max_length is 0; expected at least 1"),
        ({"mini_batch_size": 2.5}, TypeError, "mini_batch_size is 2.5, a float; expected an integer"),
        ({"gather_across_devices": "no"}, TypeError, "gather_across_devices is 'no'; expected True or False"),
        ({"directions": "query_to_doc"}, TypeError, "directions is 'query_to_doc'; expected a tuple"),
        ({"directions": ("doc_to_query",)}, ValueError, "expected 'query_to_doc' among them"),
        ({"directions": ("query_to_doc", "up")}, ValueError, "a direction is 'up'; expected one of"),
        ({"partition_mode": "both"}, ValueError, "partition_mode is 'both'; expected one of"),
        ({"hardness_mode": "batch"}, ValueError, "hardness_mode is 'batch'; expected one of 'in_batch_negatives',"),
        ({"hardness_strength": "x"}, TypeError, "hardness_strength is a str; expected a number of at least 0"),
        (
            {
                "hardness_mode": "all_negatives",
                "hardness_strength": 1.0,
                "options": negcache_fn.StepOptions(score_transform=torch.tanh),
            },
            ValueError,
            "hardness_mode is 'all_negatives' with options.score_transform; expected one of them",
        ),
        (
            {"options": negcache_fn.StepOptions(hardness=2.0)},
            ValueError,
            "expected no hardness there, but hardness_mode and hardness_strength of the loss",
        ),
        ({"hardness_strength": -1.0}, ValueError, "hardness_strength is -1.0; expected a number of at least 0"),
        ({"negatives": "none"}, ValueError, "negatives is 'none'; expected one of 'batch', 'own'"),
        (
            {"negatives": "own", "directions": ("query_to_doc", "doc_to_query")},
            ValueError,
            "negatives is 'own' with directions=",
        ),
        ({"false_negatives": 0.9}, TypeError, "false_negatives is a float; expected a FalseNegativeFilter"),
        ({"log_weights": torch.ones(3)}, TypeError, "log_weights is a Tensor; expected a function of the documents'"),
        ({"options": None}, TypeError, "options is a NoneType; expected negcache_fn.StepOptions"),
    ],
)
def test_arguments_fail_where_they_are_written(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        NegativeCacheLoss(tiny.static(), **options)


def test_filters_fail_where_they_are_written() -> None:
    model = tiny.static()
    chosen = FalseNegativeFilter()
    for options, error, message in (
        ({"guide": "all-MiniLM"}, TypeError, "guide is a str; expected a SentenceTransformer"),
        ({"margin": -0.1}, ValueError, "margin is -0.1; expected a number of at least 0"),
        ({"margin_strategy": "both"}, ValueError, "margin_strategy is 'both'; expected one of"),
        ({"margin_strategy": None}, ValueError, "margin_strategy and max_score are None; expected one of them"),
        ({"max_score": "x"}, TypeError, "max_score is a str; expected a number"),
    ):
        with pytest.raises(error, match=message):
            FalseNegativeFilter(**options)
    for options, message in (
        ({"options": negcache_fn.StepOptions(score_transform=torch.tanh)}, "with options.score_transform"),
    ):
        with pytest.raises(ValueError, match=message):
            NegativeCacheLoss(model, false_negatives=chosen, **options)
    with pytest.raises(ValueError, match="has a guide with gather_across_devices=True; expected False"):
        NegativeCacheLoss(model, false_negatives=FalseNegativeFilter(guide=model), gather_across_devices=True)
    labelled = NegativeCacheLoss(
        model, false_negatives=FalseNegativeFilter(guide=model), document_ids="labels", cache_size=64
    )
    with pytest.raises(ValueError, match="a document of the batch has no id; expected one for each"):
        labelled(columns(model, 4, 3, 1), torch.arange(4))


def test_evaluation_is_comparable_over_time(tmp_path: Path) -> None:
    """The best model by the evaluation loss is as good as that of MultipleNegativesRankingLoss."""
    held_out = tiny.pairs(60, 2)
    after: dict[str, float] = {}
    evaluated: dict[str, list[float]] = {}
    for name in ("ours", "theirs"):
        model = tiny.static()
        loss: Any = NegativeCacheLoss(model, 128) if name == "ours" else MultipleNegativesRankingLoss(model)
        args = arguments(
            tmp_path / name,
            max_steps=40,
            learning_rate=0.05,
            eval_strategy="steps",
            eval_steps=10,
            save_strategy="steps",
            save_steps=10,
            load_best_model_at_end=True,
            per_device_eval_batch_size=200,  # more than the cache holds
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=args,
            train_dataset=tiny.dataset(480, 1),
            eval_dataset=tiny.dataset(200, 3),
            loss=loss,
            callbacks=[EarlyStoppingCallback(3)],
        )
        if name == "ours":
            NegativeCacheCallback.attach(trainer)
        trainer.train()
        evaluated[name] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        after[name] = tiny.reciprocal_rank(model, held_out)
    assert evaluated["ours"] == sorted(evaluated["ours"], reverse=True)
    assert after["ours"] > 0.95 * after["theirs"]


ON_RANKS: dict[str, dict[str, Any]] = {
    "all": {"directions": DIRECTIONS[-1], "hardness_mode": "hard_negatives"},
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    | {"hardness_mode": "all_negatives"},
    "in batch": {"hardness_mode": "in_batch_negatives"},
    "dot": {"directions": DIRECTIONS[1], "similarity_fct": dot_score, "scale": 0.3, "hardness_mode": None},
    "own": {"negatives": "own", "hardness_mode": "all_negatives"},
    "weighted": {"log_weights": lambda ids: (ids % 7).float() / 3, "hardness_mode": None},
    "shorter": {"directions": DIRECTIONS[-1], "hardness_mode": "in_batch_negatives", "dims": [32, 8]},
    "filtered": {
        "false_negatives": FalseNegativeFilter(margin=0.1),
        "directions": DIRECTIONS[-1],
        "hardness_mode": "in_batch_negatives",
    },
}
NOT_THEIRS = ("own", "filtered", "weighted")


def two_ranks(rank: int, world: int) -> dict[str, Any]:
    """The loss and gradient of a rank's part of a batch."""
    model = made()
    batch = [
        dict(model.preprocess(tiny.texts(8, seed)[4 * rank : 4 * rank + 4 if world == 2 else 8])) for seed in (1, 2, 3)
    ]
    found: dict[str, Any] = {}
    for name, settings in ON_RANKS.items():
        settings = {"hardness_strength": 3.0, "gather_across_devices": True, **settings}
        dims = settings.pop("dims", None)
        inner = NegativeCacheLoss(model, 2048, **settings)
        loss: Any = inner if dims is None else MatryoshkaLoss(model, inner, dims)
        for step in range(2):
            value = loss(copied(batch), torch.empty(0))
            found[f"{name} {step}"] = (value.detach(), gradient(model, value), dict(inner.metrics))
        with torch.no_grad():
            found[f"{name} evaluated"] = loss(copied(batch), torch.empty(0))
        if name not in NOT_THEIRS:
            theirs: Any = MultipleNegativesRankingLoss(model, **settings)
            theirs = theirs if dims is None else MatryoshkaLoss(model, theirs, dims)
            value = theirs(copied(batch), torch.empty(0))
            found[f"{name} theirs"] = (value.detach(), gradient(model, value))
    return found


def test_modes_on_two_ranks(tmp_path: Path) -> None:
    """Losses and gradients of two ranks are, on average, those of one that has both batches, and of theirs at first."""
    (first, second), alone = run_ranks(2, {"two": (two_ranks, {})}, tmp_path)["two"], two_ranks(0, 1)
    for name, expected in alone.items():
        if "theirs" in name:
            continue
        if "evaluated" in name:
            torch.testing.assert_close((first[name] + second[name]) / 2, expected)
            continue
        for part in (0, 1):
            together = (first[name][part] + second[name][part]) / 2
            torch.testing.assert_close(together, expected[part], atol=1e-4, rtol=1e-3)
        for metric in ("batch_loss", "cache_loss"):
            torch.testing.assert_close(first[name][2][metric], expected[2][metric], atol=1e-4, rtol=1e-3)
    for name in ON_RANKS.keys() - NOT_THEIRS:
        for of_rank in (first, second):
            torch.testing.assert_close(of_rank[f"{name} 0"][0], of_rank[f"{name} theirs"][0])
            torch.testing.assert_close(of_rank[f"{name} 0"][1], of_rank[f"{name} theirs"][1], atol=1e-5, rtol=1e-4)
