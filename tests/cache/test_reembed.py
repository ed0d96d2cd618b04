"""Keeping the cache fresh: eviction by priority against a list of dicts, and `reembed` slot by slot."""

from __future__ import annotations

import ctypes
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import negcache_fn
from negcache_fn import distributed
from negcache_fn._cache.offload import memory_mapped
from negcache_fn._cache.reembed import reembed, reembed_
from negcache_fn._kernels.cpu import rows as rows_of_kernel
from negcache_fn._kernels.cpu import scans
from tests.support import sharded_training as training
from tests.support import strategies
from tests.support.builders import assert_same_state, make_state, same_snapshot, snapshot, unit
from tests.support.checks import updates
from tests.support.checks.steps import Tower, documents, warm
from tests.support.model import ListCache
from tests.support.processes import run_ranks

FLOATS = [math.nan, -math.inf, math.inf, -0.0, 0.0, 1e-45, -1e-45, 1.0, 1 + 1e-12, -1 - 1e-12, -2.5, 7.0, 1e39, -1e39]
INTEGERS = [-(2**63), -(2**31) - 1, -(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 2, 2**31 - 1, 2**31, 2**63 - 1]


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64]


def counted(value: float) -> float:
    """What of a priority counts: 32 bits, and NaN as -inf."""
    if isinstance(value, int):
        return min(max(value, -(2**31)), 2**31 - 1)
    return -math.inf if math.isnan(value) else ctypes.c_float(value).value


def by_native_code(native: bool) -> Any:
    """A context in which slots are searched and written by the CPU kernels, if there are any, or by plain torch."""
    context = ExitStack()
    if not native:
        for kernels in (scans, rows_of_kernel):
            context.enter_context(patch.object(kernels, "supports", lambda *_: False))
    return context


class PriorityCache(ListCache):
    """Evicts by `evict`, a list with the priority of every slot, empty slots first."""

    def age_key(self, slot: int, evict: Any) -> Any:
        """Sorts as eviction does."""
        return (0, 0) if self.slots[slot] is None else (1, counted(evict[slot]))


@st.composite
def priorities(draw: st.DrawFn, capacity: int) -> Tensor:
    """Of every dtype: special values and ties, any bits."""
    dtype = draw(st.sampled_from(DTYPES))
    if draw(st.booleans()):
        bits = draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=capacity, max_size=capacity))
        values = torch.tensor(bits, dtype=torch.int32)
        return values.long() if dtype == torch.int64 else values.view(torch.float32).to(dtype)
    pool = st.sampled_from(INTEGERS if dtype == torch.int64 else FLOATS)
    return torch.tensor(draw(st.lists(pool, min_size=capacity, max_size=capacity)), dtype=dtype)


@given(data=st.data())
def test_the_lowest_priorities_leave_first(data: st.DataObject) -> None:
    """Empty slots, then by priority, ties by slot; with ids, masks and batches as large as the cache, both paths."""
    capacity, native = data.draw(st.integers(1, 9)), data.draw(st.booleans())
    state = negcache_fn.init_cache(capacity, 2, {"x": torch.zeros(1, 3, dtype=torch.int64)})
    model = PriorityCache(capacity, torch.float32, {"x": torch.zeros(3, dtype=torch.int64)})
    with by_native_code(native):
        for n in range(3):
            rows = data.draw(st.integers(1, capacity))
            ids = data.draw(st.lists(st.integers(-1, 9), min_size=rows, max_size=rows))
            batch = updates.batch(rows, n, ids=ids)
            batch["cacheable"] = data.draw(strategies.masks(rows))
            priority = data.draw(priorities(capacity))
            model.update(**batch, evict=priority.tolist())
            state = negcache_fn.update(state, **batch, priorities=priority)
            updates.agree(state, model)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_as_large_as_the_cache_shows_the_order(dtype: torch.dtype, native: bool) -> None:
    """Document i goes to the slot of the i-th lowest priority: special values, each twice, and any bits."""
    bits = torch.randint(-(2**31), 2**31, (100,), generator=torch.Generator().manual_seed(0)).int()
    some = bits.long() if dtype == torch.int64 else bits.view(torch.float32).to(dtype)
    special = torch.tensor((INTEGERS if dtype == torch.int64 else FLOATS) * 2, dtype=dtype)
    priority = torch.cat([special, some])
    capacity = len(priority)
    state = make_state(unit(capacity, 2, 0))
    numbers = {"x": torch.arange(capacity)[:, None].repeat(1, 2)}
    with by_native_code(native):
        after = negcache_fn.update(state, numbers, unit(capacity, 2, 1), priorities=priority)
    keys = [counted(value) for value in priority.tolist()]
    order = sorted(range(capacity), key=lambda slot: (keys[slot], slot))
    assert after["items", "features", "x"][order, 0].tolist() == list(range(capacity))


@pytest.mark.parametrize("lowest", [torch.tensor(-(2**63)), torch.tensor(-math.inf), torch.tensor(math.nan)])
def test_empty_slots_go_before_the_lowest_priority(lowest: Tensor) -> None:
    """Whatever priority they are given."""
    state = make_state(unit(4, 2, 0), live=[True, False, True, False], step=1)
    priority = torch.where(torch.tensor([True, False, True, False]), lowest, 5)
    after = negcache_fn.update(state, {"x": torch.ones(3, 2, dtype=torch.int64)}, unit(3, 2, 1), priorities=priority)
    assert after["items", "inserted_at"].tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ("random", TypeError, r"priorities is a str; expected a tensor"),
        ([1.0, 2.0, 3.0], TypeError, r"priorities is a list; expected a tensor"),
        (torch.zeros(2), ValueError, r"priorities has shape \(2,\); expected \[3\]"),
        (torch.zeros(3, 1), ValueError, r"priorities has shape \(3, 1\); expected \[3\]"),
        (torch.zeros(3, dtype=torch.int32), TypeError, r"priorities has dtype torch.int32; expected a floating dtype"),
        (torch.zeros(3, device="meta"), ValueError, r"priorities is on meta; expected cpu"),
    ],
)
def test_what_is_no_eviction_is_named(wrong: Any, error: type[Exception], says: str) -> None:
    """And nothing has been written."""
    state = make_state(unit(3, 2, 0))
    before = snapshot(state)
    with pytest.raises(error, match=says):
        negcache_fn.update_(state, {"x": torch.zeros(1, 2, dtype=torch.int64)}, unit(1, 2, 1), priorities=wrong)
    assert same_snapshot(before, snapshot(state))


@pytest.mark.parametrize("function", [negcache_fn.step, negcache_fn.step_])
def test_a_step_evicts_by_priority(function: Any) -> None:
    """What it draws is renewed, and may leave all the same."""
    tower, priority = Tower(), torch.tensor([5.0, 0.0, 7.0, math.nan, 6.0, 1.0, 8.0, 9.0])
    state = warm(tower, 8)
    now = int(state["step"])
    out = function(
        state,
        unit(3, 6, 0),
        documents(3, 1),
        tower,
        options=negcache_fn.StepOptions(draws_per_query=4),
        scale=3.0,
        priorities=priority,
    )
    assert (out.state["items", "inserted_at"] == now).nonzero().flatten().tolist() == [1, 3, 5]


@pytest.mark.no_cover
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_eviction_by_priority_is_one_frame(dtype: torch.dtype) -> None:
    """New priorities every update, one graph, what eager gives."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(negcache_fn.update, fullgraph=True, backend=counter)
    state = make_state(unit(20, 2, 0), live=torch.arange(20) < 17, step=4)
    expected, one = state, {"x": torch.ones(5, 2, dtype=torch.int64)}
    for n in range(3):
        priority = torch.tensor([FLOATS, INTEGERS][dtype == torch.int64] * 2, dtype=dtype).roll(n)[:20]
        state = compiled(state, one, unit(5, 2, n), priorities=priority)
        expected = negcache_fn.update(expected, one, unit(5, 2, n), priorities=priority)
        assert_same_state(state, expected)
    assert counter.frame_count == 1


def of_slots(slots: Tensor, bad: set[int], value: float) -> Tensor:
    """[R, 3] what the encoder gives for the documents of `strategies.states`, which are numbered by slot."""
    vectors = torch.stack([slots + 0.5, 3.0 - slots, 1 / (slots + 1.0)], dim=1).double()
    return torch.where(torch.tensor([int(slot) in bad for slot in slots], dtype=torch.bool)[:, None], value, vectors)


@given(
    state=strategies.states(3),
    batch_size=st.integers(1, 140),
    bad=st.sets(st.integers(0, 12)),
    value=st.sampled_from([math.nan, math.inf, 1e300]),
)
def test_reembed_is_a_loop_over_live_slots(state: Any, batch_size: int, bad: set[int], value: float) -> None:
    """Every live slot once, in order, in batches; rows that are not finite stay; all else is as it was."""
    calls: list[list[int]] = []

    def encode(features: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        calls.append(features["x"][:, 0].tolist())
        return of_slots(features["x"][:, 0], bad, value)

    after = updates.pure(reembed, state, encode, batch_size=batch_size)
    live = (state["items", "embedded_at"] >= 0).nonzero().flatten().tolist()
    assert calls == 2 * [live[start : start + batch_size] for start in range(0, len(live), batch_size)]
    expected, storage = state.clone(), state["items", "embedding"].dtype
    for slot in live:
        row = of_slots(torch.tensor([slot]), bad, value)[0].to(storage)
        if bool(row.isfinite().all()):
            expected["items", "embedding"][slot] = row
            expected["items", "embedded_at"][slot] = int(state["step"])
    assert_same_state(after, expected)
    assert after.is_locked == state.is_locked
    twin = state.clone()
    assert reembed_(twin, encode, batch_size=batch_size) is twin
    assert_same_state(twin, expected)


def test_what_is_embedded_again_has_no_age() -> None:
    """The next step finds age and drift 0, the one after it age 1 wherever it has not drawn."""
    tower, queries = Tower(), unit(3, 6, 0)
    state = warm(tower, 12)
    stale = negcache_fn.step(state, queries, documents(3, 1), tower, scale=3.0)
    assert float(stale.metrics["drift"]) > 1e-3
    assert float(stale.metrics["cache_age_steps"]) > 0
    state = reembed(state, tower, batch_size=5)
    assert not state["items", "embedding"].requires_grad
    fresh = negcache_fn.step(state, queries, documents(3, 1), tower, scale=3.0)
    assert float(fresh.metrics["drift"]) < 1e-10
    assert float(fresh.metrics["cache_age_steps"]) == float(fresh.metrics["draw_age_steps"]) == 0
    after = negcache_fn.step(fresh.state, queries, documents(3, 2), tower, scale=3.0)
    assert float(after.metrics["cache_age_steps"]) == 1


def test_reembed_reads_features_from_files(tmp_path: Path) -> None:
    """Memory-mapped features, in place: the cache that has them in memory."""
    tower = Tower()
    state = warm(tower, 12)
    mapped = memory_mapped(state, tmp_path)
    assert_same_state(reembed_(mapped, tower, batch_size=5), reembed(state, tower, batch_size=5))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((make_state(unit(3, 2, 0)), 5), {}, TypeError, "encode is a int; expected a function of features"),
        ((5, len), {}, TypeError, "state is a int"),
        ((make_state(unit(3, 2, 0)), len), {"batch_size": 0}, ValueError, "batch_size is 0; expected at least 1"),
        ((make_state(unit(3, 2, 0)), len), {"batch_size": 2.0}, TypeError, "batch_size is 2.0"),
        (
            (make_state(unit(3, 2, 0)), lambda features: torch.zeros(len(features["x"]) + 1, 2)),
            {"batch_size": 2},
            ValueError,
            r"the output of encode has shape \(3, 2\); expected \[2, 2\]",
        ),
    ],
)
def test_reembed_names_what_is_wrong(arguments: Any, options: Any, error: type[Exception], says: str) -> None:
    """Whatever it is."""
    for function in (reembed, reembed_):
        with pytest.raises(error, match=says):
            function(*arguments, **options)


def test_an_encoder_that_raises_leaves_the_batches_before() -> None:
    """Of `reembed_`, that is; each row is either old or new."""
    state = make_state(unit(5, 2, 0), embedded_at=torch.arange(5), step=9)

    def encode(features: Any) -> Tensor:
        if int(features["x"][0, 0]) >= 4:
            raise RuntimeError("out of memory")
        return torch.ones(len(features["x"]), 2)

    with pytest.raises(RuntimeError, match="out of memory"):
        reembed_(state, encode, batch_size=2)
    assert state["items", "embedded_at"].tolist() == [9, 9, 9, 9, 4]
    assert torch.equal(state["items", "embedding"][:4], torch.ones(4, 2))


def of_ranks(rank: int, world: int, *, alone: bool = False) -> list[Any]:
    """Embedded again, then three updates by priority: 480 documents into a cache with 128 empty slots."""
    state, group = training.whole_cache(torch.float64), None if alone else dist.group.WORLD
    priority = torch.randint(-5, 5, (training.CAPACITY,), generator=torch.Generator().manual_seed(0)).float()
    priority[::50] = math.nan
    if group is not None:
        state = distributed.shard(state, group)
        priority = priority.split(4096)[rank]  # parts of 4 and 3 groups of 1024
    state = reembed(state, training.Tower(torch.float64, seed=1), batch_size=1000)
    states = [state if group is None else distributed.unshard(state, group)]
    for n, dtype in enumerate((torch.float32, torch.float64, torch.int64)):
        ids = (torch.arange(160) * 37 + 6000 * n).view(world, -1)[rank]
        given = priority if dtype != torch.int64 else priority.nan_to_num(-9).long()
        embeddings = ids[:, None] * torch.linspace(-1, 1, training.DIM, dtype=torch.float64)
        state = negcache_fn.update(
            state, training.features(ids, torch.float64), embeddings, ids=ids, priorities=given.to(dtype), group=group
        )
        states.append(state if group is None else distributed.unshard(state, group))
    if group is not None:
        wrong: list[tuple[Tensor, str]] = [
            (
                priority if rank else priority.nan_to_num().long(),
                r"priorities differs between the ranks of the group: \[torch.int64, torch.float32\]",
            ),
            (priority[rank:], r"priorities has shape \(3071,\); expected \[3072\]"),
        ]
        for given, says in wrong:
            with pytest.raises(ValueError, match=says):
                negcache_fn.update(
                    state, training.features(ids, torch.float64), embeddings, priorities=given, group=group
                )
    return states


def test_ranks_evict_and_embed_what_one_does(tmp_path: Path) -> None:
    """Two processes, the second with fewer slots and fewer documents."""
    expected = of_ranks(0, 1, alone=True)
    for found in run_ranks(2, {"fresh": (of_ranks, {})}, tmp_path)["fresh"]:
        for one, other in zip(found, expected, strict=True):
            for key, value in other.items(True, True):
                if key == ("items", "embedding"):
                    torch.testing.assert_close(one[key], value, rtol=1e-12, atol=1e-12)
                else:
                    assert torch.equal(one[key], value), key
