"""The histogram of ages, against plain Python."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from tensordict import TensorDictBase
from torch._dynamo.testing import CompileCounterWithBackend

import negcache_fn
from negcache_fn._monitor.ages import age_histogram, bin_width, count_ages
from tests.support.builders import make_state, same_snapshot, snapshot

CAPACITY = 5120  # five groups of slots: two ranks have unequal parts


def aged(ages: list[int | None], step: int) -> TensorDictBase:
    """A state whose slots have these ages, None where a slot is empty."""
    at = torch.tensor([-1 if age is None else step - age for age in ages])
    return make_state(torch.ones(len(ages), 2), live=at >= 0, embedded_at=at, step=step)


def large() -> TensorDictBase:
    """A cache of many ages, the oldest on the last rank, with holes."""
    generator = torch.Generator().manual_seed(3)
    ages: list[int | None] = torch.randint(0, 700, (CAPACITY,), generator=generator).tolist()
    ages[::7] = [None] * len(ages[::7])
    ages[-1] = 941
    return aged(ages, 1000)


@given(
    ages=st.lists(st.one_of(st.none(), st.integers(0, 6), st.integers(0, 2**40)), min_size=1, max_size=40),
    later=st.integers(0, 3),
    bins=st.integers(1, 13),
)
@example(ages=[None, None], later=0, bins=3)
@example(ages=[9, 10, 11], later=0, bins=10)
def test_counts_are_those_of_a_loop(ages: list[int | None], later: int, bins: int) -> None:
    """Every live slot once; equal bins in whole steps, no narrower ones would do."""
    live = [age for age in ages if age is not None]
    state = aged(ages, max(live, default=0) + later)
    before = snapshot(state)
    counts, edges = age_histogram(state, bins=bins)
    width = next(w for w in itertools.count(math.ceil((max(live, default=0) + 1) / bins)) if w > 0)
    assert edges.tolist() == [width * place for place in range(bins + 1)]
    expected = [sum(low <= age < high for age in live) for low, high in itertools.pairwise(edges.tolist())]
    assert counts.tolist() == expected
    assert sum(expected) == len(live)
    assert counts.dtype == edges.dtype == torch.int64
    assert same_snapshot(before, snapshot(state))


@pytest.mark.no_cover
def test_compiles_whole_and_once() -> None:
    """Fixed shapes whatever the ages are."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda state: age_histogram(state, bins=6), fullgraph=True, backend=counter)
    for oldest in (0, 3, 5000):
        state = aged([oldest, None, 1, 0, 2], oldest + 7)
        for given_part, expected in zip(compiled(state), age_histogram(state, bins=6), strict=True):
            assert torch.equal(given_part, expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("bins", [0, -1, 2.5, True])
def test_names_what_is_wrong(bins: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="bins is"):
        age_histogram(aged([1], 1), bins=bins)
    with pytest.raises(TypeError, match="state is a dict"):
        age_histogram({})  # type: ignore[arg-type]


def test_group_of_one(group_of_one: dist.ProcessGroup) -> None:
    found = age_histogram(large(), bins=12, group=group_of_one)
    for one, other in zip(found, age_histogram(large(), bins=12), strict=True):
        assert torch.equal(one, other)


def test_parts_make_the_whole() -> None:
    """What the ranks add up: the largest width, then the counts; real processes are in tests/distributed."""
    state, bins = large(), 12
    now, parts = state["step"].view(1), state["items", "embedded_at"].split([3072, 2048])
    width = torch.stack([bin_width(part, now, bins) for part in parts]).amax(0)
    counts = torch.stack([count_ages(part, now, width, bins) for part in parts]).sum(0)
    expected, edges = age_histogram(state, bins=bins)
    assert torch.equal(counts, expected)
    assert int(edges[1]) == int(width) == 79
    assert not torch.equal(bin_width(parts[0], now, bins), width)


def test_ages_of_a_training() -> None:
    """Fifo over three batches: the ages are those of the last updates."""
    state = negcache_fn.init_cache(6, 2, torch.zeros(1, 3))
    for _ in range(5):
        state = negcache_fn.update(state, torch.ones(2, 3), torch.ones(2, 2), evict="fifo")
    assert age_histogram(state, bins=4)[0].tolist() == [0, 2, 2, 2]
