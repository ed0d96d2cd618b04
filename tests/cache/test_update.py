"""The cache against a list of dicts: a stateful Hypothesis machine, and the rules one by one."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tensordict import TensorDict
from torch import Tensor

import negcache_fn
from tests.cache.test_reembed import by_native_code
from tests.support import strategies
from tests.support.builders import assert_same_state, make_state, same_snapshot, snapshot, unit
from tests.support.checks import updates
from tests.support.model import ListCache

EVICTIONS = ("lru", "fifo")
NAN = math.nan


class CacheMachine(RuleBasedStateMachine):
    """Random insertions, split_refresh, masks, repeated ids, both evictions, saving and loading, in any order."""

    pure = staticmethod(negcache_fn.update)
    in_place: Any = staticmethod(negcache_fn.update_)

    @initialize(capacity=st.integers(1, 7), storage=strategies.storages)
    def start(self, capacity: int, storage: torch.dtype) -> None:
        """An empty cache, and an empty list."""
        example = {"tokens": {"ids": torch.zeros(1, 3, dtype=torch.int64)}, "weight": torch.zeros(1)}
        self.state = negcache_fn.init_cache(capacity, 2, example, embedding_dtype=storage, seed=5)
        slots = {("tokens", "ids"): torch.zeros(3, dtype=torch.int64), "weight": torch.zeros(())}
        self.model = ListCache(capacity, storage, slots)
        self.made = 0

    def embeddings(self, data: st.DataObject, rows: int) -> Tensor:
        """Rows of which a few are not finite, or finite only in float32."""
        generator = torch.Generator().manual_seed(self.made)
        out = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
        self.made += 1
        for row in data.draw(st.sets(st.integers(0, 20), max_size=2)):
            if row < rows:
                out[row, 0] = data.draw(st.sampled_from([NAN, math.inf, -math.inf, 1e5]))
        return out if self.model.storage == torch.float64 else out.float()

    @rule(data=st.data(), evict=st.sampled_from(EVICTIONS), in_place=st.booleans())
    def update(self, data: st.DataObject, evict: str, in_place: bool) -> None:
        """Refresh some slots (empty, repeated, -1), insert some documents (repeated ids, masked, weighted)."""
        capacity = len(self.model.slots)
        rows = data.draw(st.integers(1, capacity))
        width = data.draw(st.integers(1, 3))
        embeddings = self.embeddings(data, rows)
        numbers = torch.arange(rows * width).view(rows, width) + 1 + 10 * self.made
        features = {"tokens": {"ids": numbers}, "weight": torch.arange(rows) + 0.5 + self.made}
        options: dict[str, Any] = {}
        if data.draw(st.booleans()):
            options["ids"] = torch.tensor(data.draw(st.lists(st.integers(-1, 9), min_size=rows, max_size=rows)))
        if data.draw(st.booleans()):
            options["cacheable"] = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
        if data.draw(st.booleans()):
            weights = st.sampled_from([0.0, 1.5, -2.0, -math.inf, math.inf, NAN])
            options["log_weights"] = torch.tensor(data.draw(st.lists(weights, min_size=rows, max_size=rows)))
        plain = dict(options)
        if data.draw(st.booleans()):
            slots = data.draw(st.lists(st.integers(-1, capacity - 1), min_size=0, max_size=6))
            fresh = self.embeddings(data, len(slots))
            options["refresh"], plain["refresh"] = (torch.tensor(slots, dtype=torch.int64), fresh), (slots, fresh)
        flat = {("tokens", "ids"): numbers, "weight": features["weight"]}
        self.model.update(flat, embeddings, evict=evict, **plain)
        if in_place and self.in_place is not None:
            twin = self.state.clone().lock_()
            given_back = self.in_place(twin, features, embeddings, evict=evict, **options)
            assert given_back is twin
            assert twin.is_locked
            assert_same_state(twin, self.pure(self.state, features, embeddings, evict=evict, **options))
            self.state = twin
        else:
            before = snapshot(self.state, features, embeddings, options)
            after = self.pure(self.state, features, embeddings, evict=evict, **options)
            assert same_snapshot(before, snapshot(self.state, features, embeddings, options))
            assert after.is_locked
            self.state = after

    @rule()
    def save_and_load(self) -> None:
        """Through `torch.save` and `torch.load`."""
        file = io.BytesIO()
        torch.save(self.state.to_dict(), file)
        file.seek(0)
        flat = torch.load(file, weights_only=True)
        capacity = len(self.model.slots)
        items = TensorDict(flat["items"], batch_size=[capacity])
        items["features"].batch_size = [capacity]
        items["features", "tokens"].batch_size = [capacity]
        self.state = TensorDict({**flat, "items": items}, batch_size=[]).lock_()

    @invariant()
    def agrees(self) -> None:
        """Every field of every slot; derived views; live ids unique."""
        if not hasattr(self, "state"):
            return
        updates.agree(self.state, self.model)
        capacity = len(self.model.slots)
        assert float(negcache_fn.occupancy(self.state)) == pytest.approx(len(self.model.live()) / capacity)
        assert negcache_fn.stalest(self.state, capacity).tolist() == self.model.stalest(capacity)
        names = [held["id"] for held in self.model.slots if held is not None and held["id"] >= 0]
        assert len(names) == len(set(names))


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=25)


def test_a_life_of_a_cache() -> None:
    """The scripted history that the bite tests break."""
    updates.history(negcache_fn.init_cache, negcache_fn.update)


@pytest.mark.parametrize("evict", EVICTIONS)
def test_batch_as_large_as_the_cache(evict: str) -> None:
    """Replaces everything, in slot order where all is equally old; ids already there keep their slots."""
    state = make_state(unit(3, 2, 0), ids=[4, 5, 6], embedded_at=torch.tensor([2, 1, 0]), step=3)
    numbers = {"x": torch.tensor([[1, 1], [2, 2], [3, 3]])}
    after = negcache_fn.update(state, numbers, unit(3, 2, 1), ids=torch.tensor([7, 6, 8]), evict=evict)
    order = {"lru": [8, 7, 6], "fifo": [8, 7, 6]}[evict]
    assert after["items", "id"].tolist() == order
    assert after["items", "features", "x"][:, 0].tolist() == [3, 1, 2]
    assert after["items", "embedded_at"].tolist() == [3, 3, 3]
    assert int(after["step"]) == 4


def test_evictions_differ_after_a_refresh() -> None:
    """The oldest embedding against the oldest insertion."""
    state = make_state(unit(3, 2, 0), embedded_at=torch.tensor([0, 1, 2]), step=3)
    refresh = (torch.tensor([0]), unit(1, 2, 2))
    one = {"x": torch.zeros(1, 2, dtype=torch.int64)}
    lru = negcache_fn.update(state, one, unit(1, 2, 1), refresh=refresh, evict="lru")
    fifo = negcache_fn.update(state, one, unit(1, 2, 1), refresh=refresh, evict="fifo")
    assert lru["items", "inserted_at"].tolist() == [0, 3, 2]
    assert fifo["items", "inserted_at"].tolist() == [3, 1, 2]
    assert lru["items", "embedded_at"].tolist() == [3, 3, 2]
    default = negcache_fn.update(state, one, unit(1, 2, 1), refresh=refresh)
    assert_same_state(default, lru)


def test_shorter_features_are_padded() -> None:
    """With zeros, whatever longer document was there before."""
    example = {"tokens": torch.zeros(1, 4, dtype=torch.int64), "mask": torch.zeros(1, 4, dtype=torch.bool)}
    state = negcache_fn.init_cache(2, 2, example)
    long = {"tokens": torch.ones(2, 4, dtype=torch.int64), "mask": torch.ones(2, 4, dtype=torch.bool)}
    state = negcache_fn.update(state, long, unit(2, 2, 0))
    short = {"tokens": torch.tensor([[7, 8]]), "mask": torch.tensor([[True, True]])}
    state = negcache_fn.update(state, short, unit(1, 2, 1))
    assert state["items", "features", "tokens"].tolist() == [[7, 8, 0, 0], [1, 1, 1, 1]]
    assert state["items", "features", "mask"].tolist() == [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize("container", ["tensor", "dict", "tensordict"])
def test_features_in_any_container(container: str) -> None:
    """One tensor, a dict, a TensorDict."""
    rows = torch.arange(6).view(3, 2)
    made: dict[str, Any] = {
        "tensor": rows,
        "dict": {"a": {"b": rows}},
        "tensordict": TensorDict({"a": {"b": rows}}, batch_size=[3]),
    }
    state = negcache_fn.init_cache(4, 2, made[container])
    state = negcache_fn.update(state, made[container], unit(3, 2, 0))
    drawn = negcache_fn.take(state, torch.tensor([[2, 0], [1, -1]]))
    inner = drawn if container == "tensor" else drawn["a", "b"] if not isinstance(drawn, dict) else drawn["a"]["b"]
    assert inner[0].tolist() == rows[[2, 0]].tolist()
    assert inner[1, 0].tolist() == rows[1].tolist()
    assert inner[1, 1].tolist() == rows[0].tolist(), "-1 reads slot 0"


@given(data=st.data())
def test_unlocked_states_stay_unlocked(data: st.DataObject) -> None:
    """A state leaves with the lock flag it came with, and update equals update_ on a clone."""
    state = data.draw(strategies.states(3))
    rows = data.draw(st.integers(1, len(state["items", "id"])))
    features = {"x": torch.ones(rows, 2, dtype=torch.int64)}
    after = negcache_fn.update(state, features, unit(rows, 3, 0))
    assert after.is_locked == state.is_locked
    twin = state.clone()
    if state.is_locked:
        twin.lock_()
    assert_same_state(negcache_fn.update_(twin, features, unit(rows, 3, 0)), after)
    assert twin.is_locked == state.is_locked


def test_gradients_do_not_enter_the_state() -> None:
    """Embeddings that require gradient are stored without it."""
    state = negcache_fn.init_cache(3, 2, {"x": torch.zeros(1, 2)})
    embeddings = unit(2, 2, 0).requires_grad_()
    features = {"x": torch.ones(2, 2, requires_grad=True)}
    refresh = (torch.tensor([0]), unit(1, 2, 1).requires_grad_())
    for function in (negcache_fn.update, negcache_fn.update_):
        state = function(state, features, embeddings, refresh=refresh)
        assert not any(value.requires_grad for value in state.values(True, True))


def test_float16_overflow_is_left_out() -> None:
    """Finite in float32, infinite in storage: not written."""
    state = negcache_fn.init_cache(3, 2, {"x": torch.zeros(1, 1)}, embedding_dtype=torch.float16)
    embeddings = torch.tensor([[1e6, 0.0], [1.0, 0.0]])
    state = negcache_fn.update(state, {"x": torch.tensor([[1.0], [2.0]])}, embeddings)
    assert state["items", "features", "x"][:, 0].tolist() == [2.0, 0.0, 0.0]
    assert float(negcache_fn.occupancy(state)) == pytest.approx(1 / 3)


def test_every_id_but_minus_one_is_an_id() -> None:
    """Half of all 64-bit hashes are negative; with and without the kernels."""
    lowest, highest = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    ids = torch.tensor([-7, -1, lowest, highest, -1, -7, -2])
    for native in (True, False):
        state = negcache_fn.init_cache(16, 2, torch.zeros(1, 1))
        with by_native_code(native):
            for _ in range(2):
                state = negcache_fn.update(state, torch.zeros(7, 1), unit(7, 2, 0), ids=ids)
        negcache_fn.validate(state)
        held = state["items", "id"][state["items", "embedded_at"] >= 0].tolist()
        assert sorted(held) == sorted([-7, lowest, highest, -2, -1, -1, -1, -1])
        queries = torch.ones(1, 2)
        _, slots = negcache_fn.top_negatives(state, queries, 8, exclude_ids=torch.tensor([-7, -1, lowest, -2]))
        assert sorted(state["items", "id"][slots[slots >= 0]].tolist()) == [-1, -1, -1, -1, highest]
