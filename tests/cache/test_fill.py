"""Filling, resizing and emptying a cache, against plain lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDictBase

import negcache_fn
from negcache_fn._cache.state import live
from tests.support import strategies


def rows_of(state: TensorDictBase) -> list[Any]:
    """Every slot's document as plain values, None where it is empty."""
    documents = []
    for slot in range(state["items", "id"].shape[0]):
        if not bool(live(state)[slot]):
            documents.append(None)
            continue
        leaves = state["items"].items(include_nested=True, leaves_only=True)
        documents.append({str(key): leaf[slot].tolist() for key, leaf in leaves})
    return documents


def filled(capacity: int, rows: int, seed: int, dtype: torch.dtype) -> TensorDictBase:
    """A cache with embeddings of all ages, some of one age, and holes."""
    generator = torch.Generator().manual_seed(seed)
    features = {"tokens": torch.zeros(1, 3, dtype=torch.int64), "nested": {"flag": torch.zeros(1, dtype=torch.bool)}}
    state = negcache_fn.init_cache(capacity, 4, features, embedding_dtype=dtype, seed=seed)
    for number in range(rows):
        batch = {"tokens": torch.full((1, 3), number), "nested": {"flag": torch.tensor([number % 2 == 0])}}
        embedding = torch.randn(1, 4, generator=generator)
        state = negcache_fn.update_(state, batch, embedding, ids=torch.tensor([number]))
    ages = torch.randint(0, 4, (capacity,), generator=generator)
    holes = torch.rand(capacity, generator=generator) < 0.2
    here = live(state) & ~holes
    for name in ("embedded_at", "inserted_at"):
        state["items", name].copy_(torch.where(here, ages, -1))
    return state


@given(
    capacity=st.integers(1, 12),
    rows=st.integers(0, 15),
    new=st.integers(1, 15),
    seed=st.integers(0, 99),
    dtype=strategies.storages,
)
def test_resize_keeps_the_freshest(capacity: int, rows: int, new: int, seed: int, dtype: torch.dtype) -> None:
    state = filled(capacity, rows, seed, dtype)
    before = state.clone()
    documents = rows_of(state)
    resized = negcache_fn.resize(state, new)
    if new >= capacity:
        expected = documents + [None] * (new - capacity)
    else:
        ages = state["items", "embedded_at"].tolist()
        present = [slot for slot in range(capacity) if documents[slot] is not None]
        freshest = sorted(present, key=lambda slot: (-ages[slot], slot))[:new]
        kept = [documents[slot] for slot in sorted(freshest)]
        expected = kept + [None] * (new - len(kept))
    assert rows_of(resized) == expected
    assert bool((state == before).all())
    assert resized.is_locked
    assert (int(resized["step"]), int(resized["seed"])) == (int(state["step"]), int(state["seed"]))
    assert resized["items", "embedding"].dtype == dtype


def test_resized_cache_goes_on() -> None:
    state = negcache_fn.resize(filled(9, 9, 0, torch.float32), 5)
    batch = {"tokens": torch.ones(2, 3, dtype=torch.int64), "nested": {"flag": torch.ones(2, dtype=torch.bool)}}
    out = negcache_fn.step(
        state, torch.ones(2, 4), batch, lambda documents: documents["tokens"].float() @ torch.ones(3, 4)
    )
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("wrong", [0, -3, 2.5, True])
def test_resize_names_what_is_wrong(wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="capacity is"):
        negcache_fn.resize(filled(3, 2, 0, torch.float32), wrong)


def test_reset_empties_and_keeps_the_noise_going() -> None:
    state = filled(6, 5, 1, torch.bfloat16)
    before = state.clone()
    empty = negcache_fn.reset(state)
    assert rows_of(empty) == [None] * 6
    assert bool((state == before).all())
    assert int(empty["step"]) == int(state["step"]) > 0
    fresh = filled(6, 0, 1, torch.bfloat16)
    for key, value in fresh["items"].items(include_nested=True, leaves_only=True):
        assert torch.equal(empty["items"][key], value), key


@pytest.mark.parametrize("with_ids", [True, False])
def test_prefill_is_a_loop_of_updates(with_ids: bool) -> None:
    torch.manual_seed(0)
    encoder, documents = torch.nn.Linear(3, 4), torch.randn(20, 3)
    state = negcache_fn.init_cache(12, 4, documents)
    expected = state
    for rows in torch.arange(20).split(6):
        ids = rows % 7 if with_ids else None
        expected = negcache_fn.update(expected, documents[rows], encoder(documents[rows]), ids=ids, evict="fifo")
    batches = ((documents[rows], rows % 7) if with_ids else documents[rows] for rows in torch.arange(20).split(6))
    given_state = negcache_fn.prefill(state, batches, encoder, options=negcache_fn.StepOptions(evict="fifo"))
    assert bool((given_state == expected).all())
    assert float(negcache_fn.occupancy(state)) == 0
    assert not given_state["items", "embedding"].requires_grad
