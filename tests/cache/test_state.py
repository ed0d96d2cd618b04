"""What the value is: schema, shapes, dtypes, and the derived views."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase

import negcache_fn
from tests.support import strategies
from tests.support.builders import make_state, same_snapshot, snapshot, unit

EXAMPLE: dict[str, Any] = {
    "tokens": {"input_ids": torch.zeros(3, 7, dtype=torch.int64), "mask": torch.zeros(3, 7, dtype=torch.bool)},
    "pixels": torch.zeros(3, 2, 4, dtype=torch.uint8),
    "price": torch.zeros(3, dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", strategies.STORAGES)
def test_schema(dtype: torch.dtype) -> None:
    """The table of the design, key by key."""
    state = negcache_fn.init_cache(5, 4, EXAMPLE, embedding_dtype=dtype, seed=11)
    assert state.batch_size == torch.Size([])
    assert state.is_locked
    assert set(state.keys()) == {"items", "step", "seed"}
    items = state["items"]
    assert items.batch_size == torch.Size([5])
    assert set(items.keys()) == {"embedding", "features", "id", "embedded_at", "log_weight", "inserted_at"}
    expected = {
        "embedding": ((5, 4), dtype),
        "id": ((5,), torch.int64),
        "embedded_at": ((5,), torch.int64),
        "log_weight": ((5,), torch.float32),
        "inserted_at": ((5,), torch.int64),
        ("features", "tokens", "input_ids"): ((5, 7), torch.int64),
        ("features", "tokens", "mask"): ((5, 7), torch.bool),
        ("features", "pixels"): ((5, 2, 4), torch.uint8),
        ("features", "price"): ((5,), torch.float64),
    }
    assert set(items.keys(True, True)) == set(expected)
    for key, (shape, kind) in expected.items():
        assert tuple(items[key].shape) == shape
        assert items[key].dtype == kind
    for key, value in (("step", 0), ("seed", 11)):
        assert state[key].shape == ()
        assert state[key].dtype == torch.int64
        assert int(state[key]) == value
    assert bool((items["embedded_at"] == -1).all()) and bool((items["inserted_at"] == -1).all())
    assert bool((items["id"] == -1).all()) and not bool(items["log_weight"].any())


def test_defaults() -> None:
    """float32, seed 0, where torch makes tensors by default."""
    state = negcache_fn.init_cache(5, 4, EXAMPLE)
    assert state["items", "embedding"].dtype == torch.float32
    assert int(state["seed"]) == 0
    assert state["items", "embedding"].device.type == "cpu"
    on_meta = negcache_fn.init_cache(5, 4, EXAMPLE, device="meta")
    assert all(value.device.type == "meta" for value in on_meta["items"].values(True, True))


@pytest.mark.parametrize("kind", ["tensor", "dict", "tensordict"])
def test_example_is_only_looked_at(kind: str) -> None:
    """Shapes past the first dimension and dtypes; neither written to nor kept."""
    made = {"tensor": EXAMPLE["pixels"], "dict": EXAMPLE, "tensordict": TensorDict(EXAMPLE, batch_size=[3])}[kind]
    before = snapshot(made)
    state = negcache_fn.init_cache(5, 4, made)
    assert same_snapshot(before, snapshot(made))
    features = state["items", "features"]
    if kind == "tensor":
        assert isinstance(features, torch.Tensor)
        assert features.shape == (5, 2, 4)
    else:
        assert isinstance(features, TensorDictBase)
        assert features.batch_size[:1] == torch.Size([5])


def test_take_keeps_the_shape_of_slots() -> None:
    """Any shape of slots; -1 reads slot 0."""
    state = make_state(unit(4, 2, 0), features={"x": torch.arange(4)[:, None], "y": {"z": torch.arange(4) * 10}})
    taken = negcache_fn.take(state, torch.tensor([[3, -1, 2], [0, 1, 1]]))
    assert taken["x"].tolist() == [[[3], [0], [2]], [[0], [1], [1]]]
    assert taken["y"]["z"].tolist() == [[30, 0, 20], [0, 10, 10]]
    assert negcache_fn.take(state, torch.tensor(2))["x"].tolist() == [2]
    assert negcache_fn.take(state, torch.empty(0, dtype=torch.int64))["x"].shape == (0, 1)


def test_taken_features_are_no_views() -> None:
    """Writing to them does not write to the state."""
    state = make_state(unit(4, 2, 0))
    before = snapshot(state)
    negcache_fn.take(state, torch.arange(4))["x"].zero_()
    assert same_snapshot(before, snapshot(state))


@given(data=st.data())
def test_derived_views_of_any_state(data: st.DataObject) -> None:
    """Occupancy and the stalest slots, by sorting in Python."""
    state = data.draw(strategies.states(2))
    at = state["items", "embedded_at"].tolist()
    live = [j for j, when in enumerate(at) if when >= 0]
    occupancy = negcache_fn.occupancy(state)
    assert occupancy.shape == ()
    assert occupancy.is_floating_point()
    assert float(occupancy) == pytest.approx(len(live) / len(at))
    n = data.draw(st.integers(1, len(at)))
    expected = sorted(live, key=lambda j: (at[j], j)) + [-1] * n
    stalest = negcache_fn.stalest(state, n)
    assert stalest.dtype == torch.int64
    assert stalest.tolist() == expected[:n]


def test_numpy_integers_are_sizes() -> None:
    state = negcache_fn.init_cache(np.int64(4), np.int32(3), torch.zeros(1, 2), seed=np.int64(7))  # type: ignore[arg-type]
    assert state["items", "embedding"].shape == (4, 3)
    assert int(state["seed"]) == 7
