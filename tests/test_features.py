"""Padding, and what a batch must be like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

import negcache_fn
from negcache_fn import pad_features
from negcache_fn._features import all_moved
from tests.support.builders import assert_same_state, is_close, same_bits, same_snapshot, snapshot

WIDTH, PAD_ID = 7, 3


def cache(capacity: int = 12) -> Any:
    """For documents of up to seven tokens."""
    example = {
        "tokens": {
            "input_ids": torch.zeros(1, WIDTH, dtype=torch.int32),
            "mask": torch.zeros(1, WIDTH, dtype=torch.bool),
        },
        "price": torch.zeros(1),
    }
    return negcache_fn.init_cache(capacity, 4, example, embedding_dtype=torch.float64)


def tokenized(documents: list[list[int]], width: int) -> dict[str, Any]:
    """What a tokenizer gives that pads to `width`."""
    padded = [document + [PAD_ID] * (width - len(document)) for document in documents]
    masks = [[True] * len(document) + [False] * (width - len(document)) for document in documents]
    tokens = {"input_ids": torch.tensor(padded, dtype=torch.int32), "mask": torch.tensor(masks)}
    return {"tokens": tokens, "price": torch.arange(float(len(documents)))}


def padded(state: Any, batch: Any) -> Any:
    """With the tokenizer's value for ids; the mask's is 0."""
    return pad_features(state, batch, values={"tokens": {"input_ids": PAD_ID}})


class Encoder(nn.Module):
    """The mean of the tokens that are no padding, by the mask or, where there is none, by the id."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(20, 4, generator=generator, dtype=torch.float64))

    def forward(self, features: Any, *, by_mask: bool = True) -> Tensor:
        """[rows, 4]."""
        ids = features["tokens"]["input_ids"]
        kept = (features["tokens"]["mask"] if by_mask else ids != PAD_ID)[..., None]
        return (nn.functional.embedding(ids, self.table) * kept).sum(1) / kept.sum(1)

    def by_id(self, features: Any) -> Tensor:
        """By the id."""
        return self(features, by_mask=False)

    def trimmed(self, features: Any) -> Tensor:
        """Without the columns that are padding in every row, as the recipe does it."""
        tokens = features["tokens"]
        width = int(tokens["mask"].sum(1).max())
        return self({"tokens": {name: leaf[:, :width] for name, leaf in tokens.items()}})


documents = st.lists(
    st.lists(st.integers(4, 19), min_size=1, max_size=WIDTH),
    min_size=1,
    max_size=4,
)


@given(rows=documents, room=st.integers(0, WIDTH), as_tensordict=st.booleans())
def test_padding_is_that_of_a_tokenizer_that_pads_to_the_slot(
    rows: list[list[int]], room: int, as_tensordict: bool
) -> None:
    width = max(room, *map(len, rows))
    batch: Any = tokenized(rows, width)
    if as_tensordict:
        batch = TensorDict(batch, batch_size=[len(rows)])
    before = snapshot(batch)
    given_batch = padded(cache(), batch)
    expected = tokenized(rows, WIDTH)
    assert type(given_batch) is type(batch)
    for name in ("input_ids", "mask"):
        assert same_bits(given_batch["tokens"][name], expected["tokens"][name])
    assert same_bits(given_batch["price"], expected["price"])
    assert same_snapshot(before, snapshot(batch))


@given(batches=st.lists(documents, min_size=2, max_size=4), rooms=st.lists(st.integers(0, WIDTH), min_size=4))
@settings(max_examples=10)
def test_the_width_of_a_batch_does_not_matter(batches: list[list[list[int]]], rooms: list[int]) -> None:
    """Loss and cache of steps, bit for bit, whether by mask or by id; trimmed, up to rounding."""
    encoder = Encoder()
    narrow, any_width, trimmed = cache(), cache(), cache()
    for n, (rows, room) in enumerate(zip(batches, rooms, strict=False)):
        queries = encoder.table[n : n + len(rows)]
        least = max(map(len, rows))
        encode = encoder if n % 2 else encoder.by_id
        first = negcache_fn.step(narrow, queries, padded(narrow, tokenized(rows, least)), encode)
        second = negcache_fn.step(any_width, queries, padded(narrow, tokenized(rows, max(least, room))), encode)
        third = negcache_fn.step(trimmed, queries, padded(narrow, tokenized(rows, least)), encoder.trimmed)
        assert same_bits(first.loss, second.loss)
        assert_same_state(first.state, second.state)
        assert is_close(first.loss, third.loss, 1e-12)
        narrow, any_width, trimmed = first.state, second.state, third.state


def test_zeros_are_not_the_padding_of_a_tokenizer() -> None:
    """Why: an encoder that goes by the id takes the zeros of `step` for tokens."""
    state, encoder, batch = cache(), Encoder(), tokenized([[5, 6], [7]], 2)
    right = negcache_fn.step(state, encoder.table[:2], padded(state, batch), encoder.by_id)
    wrong = negcache_fn.step(state, encoder.table[:2], batch, encoder.by_id)
    assert not is_close(right.loss, wrong.loss, 1e-3)
    assert not torch.equal(
        right.state["items", "features", "tokens", "input_ids"], wrong.state["items", "features", "tokens", "input_ids"]
    )


def test_a_tensor_is_padded_with_a_number() -> None:
    state = negcache_fn.init_cache(4, 2, torch.zeros(1, 2, 3))
    given_batch = pad_features(state, torch.ones(1, 1, 2), values=-1.5)
    assert given_batch.tolist() == [[[1, 1, -1.5], [-1.5, -1.5, -1.5]]]
    full = torch.ones(1, 2, 3)
    assert pad_features(state, full, values=9) is full


@pytest.mark.parametrize("function", ["pad_features", "update", "step"])
def test_a_batch_wider_than_the_slots_is_told_to_truncate(function: str) -> None:
    """The error says how, and with which width."""
    state, batch = cache(), tokenized([[5] * 9, [6]], 9)
    expected = r"\['tokens'\]\['input_ids'\] has rows of shape \(9,\), .* truncation=True, max_length=7\), or give init"
    call = {
        "pad_features": lambda: padded(state, batch),
        "update": lambda: negcache_fn.update(state, batch, torch.zeros(2, 4)),
        "step": lambda: negcache_fn.step(state, torch.zeros(2, 4), batch, Encoder()),
    }[function]
    with pytest.raises(ValueError, match=expected):
        call()


WRONG_VALUES: dict[str, tuple[Any, str]] = {
    "unknown key": ({"input_ids": 1}, r"values has keys \['input_ids'\]; expected some of .*\['price', 'tokens'\]"),
    "unknown nested key": ({"tokens": {"ids": 1}}, r"values\['tokens'\] has keys \['ids'\]"),
    "number for a mapping": (3, "values is a int; expected a mapping"),
    "nested number for a mapping": ({"tokens": 3}, r"values\['tokens'\] is a int; expected a mapping"),
    "mapping for a tensor": ({"price": {}}, r"values\['price'\] is a dict; expected a number"),
    "tensor": ({"price": torch.zeros(())}, r"values\['price'\] is a Tensor; expected a number"),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_values_unlike_the_features_are_named(name: str) -> None:
    values, message = WRONG_VALUES[name]
    with pytest.raises((ValueError, TypeError), match=message):
        pad_features(cache(), tokenized([[5]], 1), values=values)


WRONG_BATCHES: dict[str, tuple[Any, str]] = {
    "rows": (
        {"tokens": tokenized([[5]], 1)["tokens"], "price": torch.zeros(2)},
        r"features\['tokens'\]\['input_ids'\] has shape \(1, 1\); expected \(2, 7\)",
    ),
    "keys": ({"price": torch.zeros(1)}, r"features has keys \['price'\]"),
    "empty": ({}, "features holds no rows"),
    "no rows": (torch.zeros(()), "features holds no rows"),
    "a list": ([1], "features is a list"),
}


@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_batches_unlike_the_cache_are_named(name: str) -> None:
    batch, message = WRONG_BATCHES[name]
    with pytest.raises((ValueError, TypeError), match=message):
        pad_features(cache(), batch, values={})
    with pytest.raises(TypeError, match="state is a dict"):
        pad_features({}, batch, values={})  # pyright: ignore[reportArgumentType]


def test_features_that_need_not_move_are_themselves() -> None:
    """Whatever mapping they are."""
    batch = tokenized([[5]], 1)
    assert all_moved(batch, torch.device("cpu")) is batch
    moved = all_moved(batch, torch.device("meta"))
    assert moved["tokens"]["mask"].device.type == "meta"
