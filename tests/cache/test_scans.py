"""Searches of slots by key and by id against loops: in segments, by both paths, whatever an empty slot holds."""

from __future__ import annotations

import math
import shutil
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDictBase

import negcache_fn
from negcache_fn._cache import select
from negcache_fn._cache.assign import assign_slots
from negcache_fn._cache.ids import bias_without, find_slots, first_of_each, last_of_each
from negcache_fn._cache.select import lowest_slots
from negcache_fn._ranks.group import unsharded
from tests.cache.test_reembed import by_native_code
from tests.support.builders import assert_same_state, make_state, unit
from tests.support.checks.steps import Tower, documents, warm

numbers = st.lists(st.integers(-3, 6), min_size=1, max_size=30)


def holding(ids: list[int], live: list[bool]) -> TensorDictBase:
    """Unique ids of live slots, and whatever is given in the empty ones."""
    known, names = set(), []
    for name, here in zip(ids, live, strict=True):
        names.append(-1 if here and name in known else name)
        known |= {name} if here else set()
    state = make_state(unit(len(ids), 2, 0), live=live)
    state["items", "id"].copy_(torch.tensor(names))
    return state


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("segment", [4, 7, 64])
def test_segments_of_a_search_do_not_show(segment: int, native: bool) -> None:
    """Every slot by its key and by its id, wherever a segment begins."""
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    state, skip = make_state(unit(30, 2, 0), ids=order), torch.arange(30) % 5 == 3
    expected = [slot for slot in order.argsort().tolist() if slot % 5 != 3]
    with by_native_code(native), patch.object(select, "_SEGMENT", segment):
        assert find_slots(state, torch.arange(32)).tolist() == [*order.argsort().tolist(), -1, -1]
        for n in (3, 11, 24, 26):
            found = lowest_slots(order // 2, n, skip=skip, shards=unsharded(30))
            ranked = sorted(expected, key=lambda slot: (int(order[slot]) // 2, slot))
            assert found.tolist() == [*ranked, -1, -1][:n]


@given(key=numbers, data=st.data(), native=st.booleans(), segment=st.sampled_from([1, 4, 7, 64]))
def test_lowest_slots_is_a_sort(key: list[int], data: st.DataObject, native: bool, segment: int) -> None:
    """By (key, slot), without what is skipped; -1 where there are fewer."""
    capacity = len(key)
    skip = data.draw(st.lists(st.booleans(), min_size=capacity, max_size=capacity))
    n = data.draw(st.integers(1, capacity))
    expected = [slot for _, slot in sorted((value, slot) for slot, value in enumerate(key) if not skip[slot])]
    with by_native_code(native), patch.object(select, "_SEGMENT", segment):
        found = lowest_slots(torch.tensor(key), n, skip=torch.tensor(skip), shards=unsharded(capacity))
    assert found.tolist() == (expected + [-1] * n)[:n]


@given(ids=numbers, wanted=numbers, data=st.data(), native=st.booleans(), segment=st.sampled_from([1, 4, 7, 64]))
def test_ids_are_found_by_a_loop(
    ids: list[int], wanted: list[int], data: st.DataObject, native: bool, segment: int
) -> None:
    """In live slots only; -1 is no id."""
    live = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    state = holding(ids, live)
    held = {int(name): slot for slot, name in enumerate(state["items", "id"]) if live[slot] and int(name) != -1}
    with by_native_code(native), patch.object(select, "_SEGMENT", segment):
        found = find_slots(state, torch.tensor(wanted))
        bias = bias_without(state, torch.tensor(wanted))
    expected = [held.get(name, -1) for name in wanted]
    assert found.tolist() == expected
    kept = torch.tensor([here and slot not in expected for slot, here in enumerate(live)])
    assert torch.equal(bias, torch.where(kept, state["items", "log_weight"], -torch.inf))


@given(ids=numbers, arriving=numbers, data=st.data(), native=st.booleans(), segment=st.sampled_from([1, 4, 7, 64]))
def test_slots_are_assigned_by_a_loop(
    ids: list[int], arriving: list[int], data: st.DataObject, native: bool, segment: int
) -> None:
    """That of the id, or the next of the lowest keys that no id of the batch holds; the last row of an id counts."""
    capacity = len(ids)
    live = data.draw(st.lists(st.booleans(), min_size=capacity, max_size=capacity))
    key = data.draw(st.lists(st.integers(-3, 6), min_size=capacity, max_size=capacity))
    arriving = arriving[:capacity]
    wanted = data.draw(st.lists(st.booleans(), min_size=len(arriving), max_size=len(arriving)))
    state = holding(ids, live)
    held = {int(name): slot for slot, name in enumerate(state["items", "id"]) if live[slot] and int(name) != -1}
    names = [name if asked else -1 for name, asked in zip(arriving, wanted, strict=True)]
    kept = {held[name] for name in names if name in held}
    free = [slot for _, slot in sorted((value, slot) for slot, value in enumerate(key)) if slot not in kept]
    expected = []
    for row, name in enumerate(names):
        takes = wanted[row] and (name == -1 or name not in names[row + 1 :])
        expected.append(-1 if not takes else held[name] if name in held else free.pop(0))
    with by_native_code(native), patch.object(select, "_SEGMENT", segment):
        found = assign_slots(
            state, torch.tensor(arriving), torch.tensor(wanted), torch.tensor(key), unsharded(capacity)
        )
    assert found.tolist() == expected


@given(ids=numbers, native=st.booleans())
def test_first_and_last_of_each_id(ids: list[int], native: bool) -> None:
    """Anonymous rows are all different."""
    first = [name == -1 or name not in ids[:place] for place, name in enumerate(ids)]
    last = [name == -1 or name not in ids[place + 1 :] for place, name in enumerate(ids)]
    with by_native_code(native):
        assert first_of_each(torch.tensor(ids)).tolist() == first
        assert last_of_each(torch.tensor(ids)).tolist() == last


@pytest.mark.parametrize("native", [True, False])
def test_what_an_empty_slot_holds_is_no_document(native: bool) -> None:
    """Neither found by its id, nor in the way of a document with it, nor invalid."""
    state = holding([5, 7, 5, 7], [False, True, False, False])
    negcache_fn.validate(state)
    with by_native_code(native):
        features = {"x": torch.ones(1, 2, dtype=torch.int64)}
        after = negcache_fn.update(state, features, unit(1, 2, 1), ids=torch.tensor([5]))
        assert negcache_fn.sample_gumbel(after, unit(1, 2, 1), exclude_ids=torch.tensor([5])).slot.tolist() == [[1]]
    assert (after["items", "embedded_at"] >= 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("native", [True, False])
def test_log_weights_that_overflow_as_stored_stay_outside(native: bool) -> None:
    """Finite in float64, infinite in float32."""
    state = negcache_fn.init_cache(4, 2, torch.zeros(1, 1))
    weights = torch.tensor([1e300, -1e300, 2.0], dtype=torch.float64)
    with by_native_code(native):
        state = negcache_fn.update(state, torch.arange(3.0)[:, None], unit(3, 2, 0), log_weights=weights)
    negcache_fn.validate(state)
    assert state["items", "features"][:2, 0].tolist() == [1.0, 2.0]
    assert state["items", "log_weight"].tolist() == [-math.inf, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("native", [True, False])
def test_what_overflows_as_stored_does_not_refresh(native: bool) -> None:
    """Finite in float32, infinite in float16: the document keeps embedding and age."""
    state = make_state(unit(3, 2, 0, torch.float16), step=4)
    refresh = (torch.tensor([1, 2]), torch.tensor([[1e6, 0.0], [0.5, 0.25]]))
    with by_native_code(native):
        features = {"x": torch.ones(1, 2, dtype=torch.int64)}
        after = negcache_fn.update(state, features, unit(1, 2, 1), refresh=refresh, cacheable=torch.zeros(1) > 0)
    assert after["items", "embedded_at"].tolist() == [0, 0, 4]
    assert torch.equal(after["items", "embedding"][:2], state["items", "embedding"][:2])
    assert after["items", "embedding"][2].tolist() == [0.5, 0.25]
    after = negcache_fn.reembed(state, lambda _: torch.tensor([[0.5, 0.25], [1e6, 0.0], [0.0, 1.0]]))
    assert after["items", "embedded_at"].tolist() == [4, 0, 4]
    assert torch.equal(after["items", "embedding"][1], state["items", "embedding"][1])


@pytest.mark.parametrize("reason", ["mask", "embedding", "log-weight"])
def test_rows_left_out_do_not_stand_for_their_id(reason: str) -> None:
    """Of two rows with one id the second counts, unless it does not come in."""
    state, embeddings, weights = make_state(unit(3, 2, 0)), unit(2, 2, 1), torch.zeros(2)
    mask = torch.tensor([True, reason != "mask"])
    embeddings[1] = math.nan if reason == "embedding" else embeddings[1]
    weights[1] = math.inf if reason == "log-weight" else 0.0
    features, ids = {"x": torch.tensor([[10, 0], [11, 0]])}, torch.tensor([5, 5])
    after = negcache_fn.update(state, features, embeddings, ids=ids, log_weights=weights, cacheable=mask)
    assert after["items", "id"].tolist() == [5, -1, -1]
    assert after["items", "features", "x"][:, 0].tolist() == [10, 1, 2]


MADE: dict[str, Any] = {
    "resize, smaller": lambda state: negcache_fn.resize(state, 5),
    "resize, as large": lambda state: negcache_fn.resize(state, 12),
    "resize, larger": lambda state: negcache_fn.resize(state, 20),
    "reset": negcache_fn.reset,
    "prefill": lambda state: negcache_fn.prefill(state, [documents(3, 4)], Tower()),
    "reembed": lambda state: negcache_fn.reembed(state, Tower(seed=2)),
    "offload": negcache_fn.offload_features,
    "update": lambda state: negcache_fn.update(state, documents(3, 4), Tower()(documents(3, 4))),
}


@pytest.mark.parametrize("name", MADE)
def test_made_states_share_nothing(name: str) -> None:
    """Steps in place go on in the one and leave the other, and the other way round."""
    tower, first = Tower(), warm(Tower(), 12)
    for written in (0, 1):
        given_state = first.clone().lock_()
        states = [given_state, MADE[name](given_state)]
        before = states[1 - written].clone()
        negcache_fn.step_(states[written], unit(3, 6, 0), documents(3, 1), tower)
        assert_same_state(states[1 - written], before)


def test_what_a_step_and_reembed_leave_is_valid() -> None:
    """An embedding may be as young as the step, which the next update has not counted yet, and no younger."""
    state = negcache_fn.reembed(warm(Tower(), 12), Tower(seed=1))
    assert int(state["items", "embedded_at"].max()) == int(state["step"])
    negcache_fn.validate(state)
    for wrong in (int(state["step"]) + 1, -2):
        state["items", "embedded_at"][0] = wrong
        with pytest.raises(ValueError, match=rf"'embedded_at'\] is {wrong} at slot 0"):
            negcache_fn.validate(state)


def kept(state: TensorDictBase) -> list[int]:
    return sorted(state["items", "features", "x"][state["items", "embedded_at"] >= 0][:, 0].tolist())


def test_resize_goes_by_the_embedding_not_the_insertion() -> None:
    """A document embedded again since is fresher than one that came later."""
    ages = {"embedded_at": torch.tensor([5, 2, 4, 3]), "inserted_at": torch.tensor([0, 2, 1, 3])}
    state = make_state(unit(4, 2, 0), step=6, **ages)
    assert kept(negcache_fn.resize(state, 2)) == [0, 2]
    assert negcache_fn.stalest(state, 4).tolist() == [1, 3, 2, 0]


@given(rows=st.integers(1, 6), data=st.data())
def test_a_batch_may_leave_nothing(rows: int, data: st.DataObject) -> None:
    """Where no row may come in, all that changes is the step."""
    state = make_state(unit(6, 2, 0), live=data.draw(st.lists(st.booleans(), min_size=6, max_size=6)), ids=range(6))
    embeddings, weights, mask = unit(rows, 2, 1), torch.zeros(rows), torch.ones(rows, dtype=torch.bool)
    for row in range(rows):
        kind = data.draw(st.sampled_from(["nan", "weight", "mask"]))
        embeddings[row] = math.nan if kind == "nan" else embeddings[row]
        weights[row] = math.inf if kind == "weight" else 0.0
        mask[row] = kind != "mask"
    features = {"x": torch.full((rows, 2), 9)}
    refresh = (torch.full((2,), -1), torch.ones(2, 2))
    after = negcache_fn.update(
        state, features, embeddings, ids=torch.arange(rows), log_weights=weights, cacheable=mask, refresh=refresh
    )
    expected = state.clone()
    expected["step"] += 1
    assert_same_state(after, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_equal_priorities_leave_by_slot(dtype: torch.dtype) -> None:
    """Zeros of both signs are equal."""
    zeros = [-0.0, 0.0, -0.0, 0.0] if dtype != torch.int64 else [0, 0, 0, 0]
    for order in (zeros, zeros[::-1]):
        state, features = make_state(unit(4, 2, 0)), {"x": torch.tensor([[10, 0], [11, 0]])}
        after = negcache_fn.update(state, features, unit(2, 2, 1), priorities=torch.tensor(order, dtype=dtype))
        assert after["items", "features", "x"][:, 0].tolist() == [10, 11, 2, 3]


@pytest.mark.parametrize(("evict", "left"), [("fifo", 2), ("lru", 1)])
def test_prefill_evicts_as_its_options_say(evict: Any, left: int) -> None:
    """Where the oldest insertion is not the oldest embedding; and the encoder makes no graph."""
    ages = {"embedded_at": torch.tensor([5, 2, 4]), "inserted_at": torch.tensor([1, 2, 0])}
    state = make_state(unit(3, 2, 0), step=6, **ages)

    def encode(features: Any) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return unit(len(features["x"]), 2, 1)

    features = {"x": torch.full((1, 2), 9)}
    after = negcache_fn.prefill(state, [features], encode, options=negcache_fn.StepOptions(evict=evict))
    assert (after["items", "features", "x"][:, 0] == 9).nonzero().tolist() == [[left]]


def test_room_is_asked_for_the_new_capacity(tmp_path: Any) -> None:
    """Enough for the slots that are there, not for those to come."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with (
        patch.object(shutil, "disk_usage", lambda _: usage),
        pytest.raises(ValueError, match="1000 free bytes; expected 8000"),
    ):
        negcache_fn.memory_mapped(make_state(unit(3, 2, 0)), tmp_path, capacity=500)
