"""What a document is to the loss of sentence-transformers: images, grids, routers, bags of words, texts of any length.

The oracle is `MultipleNegativesRankingLoss` on the same batch, in value and gradient, and the model itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="the extra sentence-transformers is not installed")

from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.base.modules.input_module import InputModule
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import LSTM, Pooling, WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from torch import Tensor, nn

import negcache_fn
from negcache_fn.integrations.sentence_transformers import NegativeCacheLoss
from negcache_fn.integrations.sentence_transformers.pieces import counts_of_pieces, joined, split
from tests.support import tiny

Columns = list[dict[str, Any]]
DIM = tiny.DIM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def copied(batch: Columns) -> Columns:
    return [{key: value.clone() if isinstance(value, Tensor) else value for key, value in c.items()} for c in batch]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [
        torch.zeros_like(p) if gradient is None else gradient
        for p, gradient in zip((p for p in model.parameters() if p.requires_grad), found, strict=True)
    ]


def assert_as_ranking(model: SentenceTransformer, batch: Columns, **options: Any) -> NegativeCacheLoss:
    """Value and gradient of the first step, in which the cache is empty; each parameter has some gradient."""
    loss = NegativeCacheLoss(model, 32, **options)
    found, expected = loss(copied(batch)), MultipleNegativesRankingLoss(model)(copied(batch), torch.empty(0))
    torch.testing.assert_close(found, expected)
    of_ours, of_theirs = gradients(model, found), gradients(model, expected)
    for one, other in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert sum(bool(gradient.abs().max() > 1e-6) for gradient in of_ours) > 0
    with torch.no_grad():
        torch.testing.assert_close(loss(copied(batch)), expected.detach())
    return loss


def assert_cached_as_embedded(
    model: SentenceTransformer, loss: NegativeCacheLoss, columns: Columns, *, atol: float = 1e-6
) -> None:
    """What is kept of each document gives its embedding, whatever the others in the call."""
    assert loss.state is not None
    assert loss._layout is not None
    count = int((loss.state["items", "embedded_at"] >= 0).sum())
    slots = torch.arange(count).flip(0)
    rows = dict(negcache_fn.take(loss.state, slots).items())  # type: ignore[union-attr]
    with torch.no_grad():
        found = model(loss._layout.batch(rows))["sentence_embedding"]
        expected = torch.cat([model(dict(column))["sentence_embedding"] for column in copied(columns)])
    assert found.shape == expected.shape
    torch.testing.assert_close(found.flip(0), expected, atol=atol, rtol=1e-4)


class Seeing(InputModule):
    """A vision-language encoder of one layer: it reads every feature that it is given, and needs all of them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        torch.manual_seed(0)
        self.words = nn.Embedding(len(tiny.VOCABULARY), DIM)
        self.pixels = nn.Linear(12, DIM)
        self.grids = nn.Linear(3, DIM)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        mask = features["attention_mask"][..., None].float()
        embedding = (self.words(features["input_ids"]) * mask).sum(1) / mask.sum(1)
        if self.kind == "image":
            embedding = embedding + self.pixels(features["pixel_values"].flatten(1))
        elif "pixel_values" in features:
            counts = features["num_images_per_sample"]
            of_image = torch.repeat_interleave(torch.arange(counts.shape[0]), counts)
            if self.kind == "grid":
                patches = features["image_grid_thw"].prod(1)
                of_patch = torch.repeat_interleave(of_image, patches)
                seen = self.grids(features["image_grid_thw"].float())
                embedding = embedding.index_add(0, of_image, seen)
                embedding = embedding.index_add(0, of_patch, self.pixels(features["pixel_values"]))
            else:
                embedding = embedding.index_add(0, of_image, self.pixels(features["pixel_values"].flatten(1)))
        return features | {"sentence_embedding": embedding}

    def preprocess(self, inputs: Any, prompt: Any = None, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def save(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


def seen(kind: str, rows: int, seed: int, *, images: int = 3) -> dict[str, Any]:
    """The features of a column, all with the same text, as a chat template has it."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.full((rows, 4), 7)
    column: dict[str, Any] = {"input_ids": text, "attention_mask": torch.ones_like(text), "modality": "message"}
    if kind == "image":
        return column | {"pixel_values": torch.randn(rows, 3, 2, 2, generator=generator)}
    counts = torch.randint(1, images + 1, (rows,), generator=generator)
    counts[0] = images
    number = int(counts.sum())
    column["num_images_per_sample"] = counts
    if kind == "grid":
        grid = torch.cat([torch.ones(number, 1), torch.randint(1, 3, (number, 2), generator=generator)], 1).long()
        total = int(grid.prod(1).sum())
        return column | {"image_grid_thw": grid, "pixel_values": torch.randn(total, 12, generator=generator)}
    return column | {"pixel_values": torch.randn(number, 3, 2, 2, generator=generator)}


@pytest.mark.parametrize("kind", ["image", "grid", "gridless"])
def test_images_are_kept(kind: str) -> None:
    """All texts are equal: with the tokens alone, all documents would be one."""
    model = SentenceTransformer(modules=[Seeing(kind)], device="cpu")
    batch = [seen(kind, 5, seed) for seed in (1, 2, 3)]
    loss = assert_as_ranking(model, batch)
    assert loss.state is not None
    assert int((loss.state["items", "id"] >= 0).sum()) == 10
    assert_cached_as_embedded(model, loss, batch[1:])
    # Later documents may have more images, or none.
    more = [seen(kind, 5, seed, images=images) for seed, images in ((4, 3), (5, 5), (6, 1))]
    if kind != "image":
        more[2] = {key: value for key, value in more[2].items() if not key.startswith(("pixel", "image", "num"))}
    loss(copied(more))
    if kind != "image":  # equal texts without images are one document
        more[2] = {key: value[:1] for key, value in more[2].items() if key != "modality"}
    assert_cached_as_embedded(model, loss, [*batch[1:], *more[1:]])
    assert loss.state is not None
    assert int((loss.state["items", "id"] >= 0).sum()) == 10 + (10 if kind == "image" else 6)


def test_texts_with_images_have_the_room_that_they_need() -> None:
    """Padded on the left, as decoders are; a slot widens on that side."""
    model = SentenceTransformer(modules=[Seeing("image")], device="cpu")

    def column(longest: int, seed: int) -> dict[str, Any]:
        place, start = torch.arange(longest), torch.arange(3)[:, None]
        mask = (place >= start).long()
        return seen("image", 3, seed) | {"input_ids": mask * (place + start + 5), "attention_mask": mask}

    loss, cached = NegativeCacheLoss(model, 32), []
    for longest in (5, 8, 4):
        cached.append(column(longest, longest))
        loss(copied([column(6, 1), cached[-1]]))
    assert loss.state is not None
    mask = loss.state["items", "features", "attention_mask"]
    assert mask.shape == (32, 8)
    assert bool(mask[:9, -1].all())
    assert_cached_as_embedded(model, loss, cached)


def test_images_without_texts() -> None:
    class Pixels(Seeing):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            return features | {"sentence_embedding": self.pixels(features["pixel_values"].flatten(1))}

    model = SentenceTransformer(modules=[Pixels("image")], device="cpu")
    batch = [{"pixel_values": torch.randn(4, 3, 2, 2), "modality": "image"} for _ in range(3)]
    loss = assert_as_ranking(model, batch)
    assert_cached_as_embedded(model, loss, batch[1:])
    halved = NegativeCacheLoss(model, 32, mini_batch_size=3)
    torch.testing.assert_close(halved(copied(batch)), NegativeCacheLoss(model, 32)(copied(batch)))


def test_text_queries_of_image_documents() -> None:
    """Eight steps: with both towers, as MultipleNegativesRankingLoss trains them."""

    class Both(Seeing):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            if "pixel_values" in features:
                return super().forward(features)
            return features | {"sentence_embedding": self.words(features["input_ids"]).mean(1)}

    losses: dict[str, list[float]] = {}
    for name in ("ours", "theirs"):
        model = SentenceTransformer(modules=[Both("image")], device="cpu")
        loss = NegativeCacheLoss(model, 128) if name == "ours" else MultipleNegativesRankingLoss(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        words = torch.arange(5, 13)[:, None].expand(8, 4).clone()
        query = {"input_ids": words, "attention_mask": torch.ones_like(words), "modality": "text"}
        document = seen("image", 8, 1)
        losses[name] = []
        for _ in range(8):
            value = loss(copied([query, document]), torch.empty(0))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses[name].append(float(value.detach()))
    assert losses["ours"][-1] < 0.5 * losses["ours"][0]
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-4)  # the cache has the batch's documents alone


def test_clip(folder: Path) -> None:
    from sentence_transformers.base.modules import Transformer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    path = folder / "clip"
    path.mkdir()
    characters = [chr(code) for code in range(97, 123)]
    vocabulary = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: number for number, word in enumerate(vocabulary)}, [])
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(vocabulary), "max_position_embeddings": 16},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(path)
    model = SentenceTransformer(modules=[Transformer(str(path))], device="cpu").eval()
    pillow = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    pictures = [
        pillow.fromarray(torch.randint(256, (9, 9, 3), generator=generator, dtype=torch.uint8).numpy())
        for _ in range(4)
    ]
    batch = [model.preprocess(["a", "bc", "def", "g"]), model.preprocess(pictures)]
    loss = assert_as_ranking(model, [dict(column) for column in batch])
    assert_cached_as_embedded(model, loss, [dict(batch[1])])


def routed(folder: Path, query: str, document: str) -> SentenceTransformer:
    def modules(kind: str, name: str) -> list[nn.Module]:
        return list(tiny.static() if kind == "static" else tiny.transformer(folder / name))

    # By default what has no task is a query, so that documents need theirs.
    router = Router.for_query_document(modules(query, "query"), modules(document, "document"), default_route="query")
    return SentenceTransformer(modules=[router], device="cpu")


@pytest.mark.parametrize(
    ("query", "document"), [("static", "static"), ("static", "transformer"), ("transformer", "static")]
)
def test_routers_train_both_towers(folder: Path, query: str, document: str) -> None:
    model = routed(folder, query, document).eval()
    batch = [dict(model.preprocess(tiny.texts(4, 1), task="query"))]
    batch += [dict(model.preprocess(tiny.texts(4, seed), task="document")) for seed in (2, 3)]
    loss = assert_as_ranking(model, batch)
    assert_cached_as_embedded(model, loss, batch[1:])
    later = loss(copied([batch[0], batch[2], batch[1]]))
    later.backward()
    towers = model[0].sub_modules
    for name in ("query", "document"):
        assert any(p.grad is not None and bool(p.grad.abs().max() > 1e-6) for p in towers[name].parameters()), name


def test_word_embeddings_and_lstm() -> None:
    """Features of one dimension, the lengths of the texts."""
    torch.manual_seed(0)
    words = WordEmbeddings(WhitespaceTokenizer(tiny.WORDS, stop_words=[]), torch.randn(60, 8), update_embeddings=True)
    lstm = LSTM(8, 6)
    model = SentenceTransformer(modules=[words, lstm, Pooling(12)], device="cpu").eval()
    batch = [dict(model.preprocess(tiny.texts(4, seed))) for seed in (1, 2, 3)]
    loss = assert_as_ranking(model, batch)
    assert_cached_as_embedded(model, loss, batch[1:])
    cut = NegativeCacheLoss(model, 32, max_length=2)
    cut(copied(batch))
    shorter = [dict(model.preprocess([" ".join(text.split()[:2]) for text in tiny.texts(4, seed)])) for seed in (2, 3)]
    assert_cached_as_embedded(model, cut, shorter)


def test_compiled_models() -> None:
    torch.compiler.reset()
    model = tiny.static()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    batch = [dict(model.preprocess(tiny.texts(4, seed))) for seed in (1, 2, 3)]
    loss = NegativeCacheLoss(compiled, 32)  # type: ignore[arg-type]
    expected = MultipleNegativesRankingLoss(model)(copied(batch), torch.empty(0))
    torch.testing.assert_close(loss(copied(batch)), expected)
    loss.prefill(tiny.texts(4, 5))
    torch.compiler.reset()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_are_cut_as_the_tokenizer_cuts(folder: Path, left: bool, side: str) -> None:
    model = tiny.transformer(folder / f"cut {left}", left=left).eval()
    model.tokenizer.truncation_side = side
    texts = [
        [" ".join(tiny.WORDS[start : start + n]) for n in (1, 3, 9)] + [" ".join(tiny.WORDS[start + 14 : start : -1])]
        for start in (0, 20, 40)
    ]
    batch = [dict(model.preprocess(column)) for column in texts]
    loss = NegativeCacheLoss(model, 32, max_length=6)
    value = loss(copied(batch))
    model.max_seq_length = 6
    shorter = [dict(model.preprocess(column)) for column in texts]
    assert shorter[1]["input_ids"].shape == (4, 6)
    assert_cached_as_embedded(model, loss, shorter[1:])
    expected = MultipleNegativesRankingLoss(model)(copied([batch[0], *shorter[1:]]), torch.empty(0))
    torch.testing.assert_close(value, expected)
    rows = loss.state["items", "features", "input_ids"][:8]  # type: ignore[index]
    assert torch.equal(rows[:4].long(), shorter[1]["input_ids"])


def test_the_room_for_a_text_has_a_limit(folder: Path) -> None:
    """T5's tokenizers say 1e30, Mistral's 32768: a slot has room for 1024 tokens if nobody asks for more."""
    model = tiny.transformer(folder / "long").eval()
    for longest in (int(1e30), 32_768):
        model[0].tokenizer.model_max_length = longest
        loss = NegativeCacheLoss(model, 8)
        loss([dict(model.preprocess(tiny.texts(2, seed), max_length=32)) for seed in (1, 2)])
        assert loss.state is not None
        assert loss.state["items", "features", "input_ids"].shape == (8, 1024)

    bag = tiny.static()
    loss = NegativeCacheLoss(bag, 8)
    texts = [" ".join(tiny.WORDS[:3] * 400), "w1 w2"]
    with pytest.warns(UserWarning, match="documents are cut to 1024 tokens, .* give the loss a max_length"):
        loss([dict(bag.preprocess(["w1", "w2"])), dict(bag.preprocess(texts))])
    loss = NegativeCacheLoss(bag, 8, max_length=2000)
    batch = [dict(bag.preprocess(["w1", "w2"])), dict(bag.preprocess(texts))]
    assert_cached_as_embedded(bag, assert_as_ranking(bag, batch, max_length=2000), batch[1:])


def test_prompts_in_some_data_sets_only(folder: Path) -> None:
    """Their length matters to a pooling alone that leaves them out."""
    model = tiny.transformer(folder / "prompts").eval()

    def batch(prompt: str | None) -> Columns:
        return [dict(model.preprocess(tiny.texts(3, seed), prompt=prompt)) for seed in (1, 2)]

    loss = NegativeCacheLoss(model, 32)
    loss(batch(None))
    loss(batch("w1 w2 "))
    assert loss.state is not None
    assert int((loss.state["items", "id"] >= 0).sum()) == 6
    model.set_pooling_include_prompt(False)
    with pytest.raises(ValueError, match=r"a column of documents has prompt_length=3; expected None"):
        loss(batch("w1 w2 "))
    with torch.no_grad():  # which caches nothing
        loss(batch("w1 w2 "))


def test_columns_whose_names_begin_alike(folder: Path) -> None:
    """The trainer gives a column "negative" the features of "negative_1" as well."""
    model = tiny.transformer(folder / "names").eval()
    names = ("anchor", "positive", "negative", "negative_1")
    columns = {name: dict(model.preprocess(tiny.texts(4, seed))) for seed, name in enumerate(names)}
    inputs = {f"{name}_{key}": value for name, column in columns.items() for key, value in column.items()}
    collected = [
        {key[len(name) + 1 :]: value for key, value in inputs.items() if key.startswith(f"{name}_")} for name in names
    ]
    assert "1_input_ids" in collected[2]
    loss = NegativeCacheLoss(model, 32)
    torch.testing.assert_close(loss(collected), NegativeCacheLoss(model, 32)(copied(list(columns.values()))))
    assert loss.state is not None
    assert set(loss.state["items", "features"].keys()) == {"input_ids", "token_type_ids", "attention_mask"}


def test_features_as_wide_as_the_texts_by_chance(folder: Path) -> None:
    model = tiny.transformer(folder / "chance").eval()
    loss = NegativeCacheLoss(model, 32)
    for words in (4, 3, 5):  # 3 words and 2 special tokens are 5 tokens
        texts = [" ".join(tiny.WORDS[start : start + words]) for start in range(4)]
        batch = [dict(model.preprocess(texts)) for _ in range(2)]
        batch[1]["entities"] = torch.arange(20).view(4, 5) + 20 * words
        loss(batch)
    assert loss.state is not None
    assert loss.state["items", "features", "entities"].shape == (32, 5)
    assert int((loss.state["items", "id"] >= 0).sum()) == 12


def test_the_side_of_padding_is_seen(folder: Path) -> None:
    """Where a call of the tokenizer was asked for it, and its attribute says otherwise."""
    model = tiny.transformer(folder / "side", left=True).eval()
    batch = [dict(model.preprocess(tiny.texts(4, seed))) for seed in (1, 2)]
    model.tokenizer.padding_side = "right"
    loss = NegativeCacheLoss(model, 32)
    loss(copied(batch))
    assert loss.state is not None
    rows = loss.state["items", "features", "attention_mask"][:4]
    assert bool(rows[:, -1].all())
    assert_cached_as_embedded(model, loss, batch[1:])


def test_last_batches_of_an_epoch(folder: Path) -> None:
    """Of any size, whatever is drawn."""
    model = tiny.static()
    for options in (
        {"options": negcache_fn.StepOptions(num_draws=24)},
        {"options": negcache_fn.StepOptions(draws_per_query=3), "mini_batch_size": 4},
        {"options": negcache_fn.StepOptions(num_draws=3), "directions": ("query_to_doc", "doc_to_query")},
    ):
        loss = NegativeCacheLoss(model, 32, **options)
        for rows in (8, 8, 5, 1):
            batch = [dict(model.preprocess(tiny.texts(rows, 10 * rows + seed))) for seed in (1, 2, 3)]
            loss(batch).backward()


def test_what_cannot_be_kept_is_an_error_at_the_first_batch(folder: Path) -> None:
    model = tiny.transformer(folder / "refused").eval()
    batch = [dict(model.preprocess(tiny.texts(4, seed))) for seed in (1, 2)]

    def refused(**more: Any) -> None:
        NegativeCacheLoss(model, 32)([batch[0], batch[1] | more])

    with pytest.raises(
        ValueError, match=r"pixel_values has shape \(9, 3\) in a column of 4 documents; expected 4 rows"
    ):
        refused(pixel_values=torch.zeros(9, 3))
    with pytest.raises(ValueError, match="pixel_values is a list; expected a tensor with a row for each document"):
        refused(pixel_values=[torch.zeros(1, 3)] * 4)
    with pytest.raises(ValueError, match="token_embeddings is an output of the model"):
        refused(token_embeddings=torch.zeros(4, 3, requires_grad=True))
    with pytest.raises(ValueError, match="weights is sparse; expected a dense tensor"):
        refused(weights=torch.eye(4).to_sparse())
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: the texts are flattened .* model\[0\]\.unpad_inputs = False"):
        refused(cu_seq_lens_q=torch.tensor([0, 2, 4]))
    loss = NegativeCacheLoss(model, 32)
    loss([batch[0], batch[1] | {"pixel_values": torch.zeros(4, 3, 8, 8)}])
    with pytest.raises(ValueError, match=r"pixel_values is \[rows, 3, 9, 9\] .*; expected \[rows, 3, 8, 8\]"):
        loss([batch[0], batch[1] | {"pixel_values": torch.zeros(4, 3, 9, 9)}])
    with pytest.raises(ValueError, match=r"the columns have \[4, 3\] rows; expected as many in each"):
        loss([batch[0], dict(model.preprocess(tiny.texts(3, 1)))])
    with pytest.raises(ValueError, match="a batch has 6 documents; expected at most cache_size=4"):
        NegativeCacheLoss(model, 4)([dict(model.preprocess(tiny.texts(3, seed))) for seed in (1, 2, 3)])
    long = NegativeCacheLoss(SentenceTransformer(modules=[Seeing("image")], device="cpu"), 8, max_length=3)
    with pytest.raises(ValueError, match="a text has 4 tokens; expected at most 3"):
        long([seen("image", 2, 1), seen("image", 2, 2)])


def test_what_cannot_be_trained_is_refused_by_name(folder: Path) -> None:
    model = tiny.transformer(folder / "layers")
    batch = [dict(model.preprocess(tiny.texts(4, seed))) for seed in (1, 2)]
    with pytest.warns(UserWarning, match="AdaptiveLayerLoss is not compatible"):
        around = [
            AdaptiveLayerLoss(model, NegativeCacheLoss(model, 32)),
            Matryoshka2dLoss(model, NegativeCacheLoss(model, 32), [32, 8]),
        ]
    for loss in around:
        with pytest.raises(ValueError, match="the loss is in an AdaptiveLayerLoss or a Matryoshka2dLoss"):
            loss(copied(batch), torch.empty(0))
    MatryoshkaLoss(model, NegativeCacheLoss(model, 32), [32, 8])(copied(batch), torch.empty(0))
    for kind in (MultiVectorEncoder, SparseEncoder):
        other = kind(modules=list(model), device="cpu")
        with pytest.raises(TypeError, match=f"model is a {kind.__name__}; expected a SentenceTransformer"):
            NegativeCacheLoss(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("images", [1, 3])
def test_pieces_come_back(images: int) -> None:
    column = seen("grid", 6, 5, images=images)
    for key, counts in counts_of_pieces(column).items():
        rows = split(column[key], counts, counts)
        assert torch.equal(joined(rows, counts), column[key])
        assert rows.shape[:2] == (6, int(counts.max()))
