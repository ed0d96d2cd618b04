"""The tree of a draw: the noise of every level, what is independent of what, and perturbed values given a maximum."""

from __future__ import annotations

import itertools
import math
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tensordict import TensorDictBase

import negcache_fn
from negcache_fn._draws.choose import _given_maximum, _largest, largest_groups
from negcache_fn._draws.gumbel_tree import _better, _Groups
from negcache_fn._draws.noise import Noise
from negcache_fn._kernels.blocks import BLOCK, GROUP
from negcache_fn._kernels.cpu import call as cpu
from negcache_fn.random import gumbel
from tests.draws.test_sample import varied
from tests.support import oracles
from tests.support.builders import at_step, is_close, make_state, unit
from tests.support.checks import draws, for_batch

sample = negcache_fn.sample_gumbel
NOISE = Noise(torch.tensor(1), torch.tensor(2), torch.zeros(1, 1, dtype=torch.int64))
# The same places inside two blocks of two groups.
TWINS = [0, 1, 64, 65, 1024, 1025, 1088, 1089]


def twins() -> TensorDictBase:
    """Documents in `TWINS` alone, whose log-weights are their scores."""
    live = torch.zeros(1100, dtype=torch.bool)
    live[TWINS] = True
    weights = torch.zeros(1100)
    weights[TWINS] = torch.tensor([0.0, 0.5, -0.5, 0.2, 0.3, -0.3, 0.6, 0.0])
    return make_state(torch.zeros(1100, 2), live=live, log_weight=weights)


def test_children_given_their_maximum() -> None:
    """A maximum of its own law makes free Gumbel variables of the children: each, and any two, by exponential times.

    Kolmogorov-Smirnov of 30,000 and chi-square of 16 cells (`oracles.FALSE_ALARM` each).
    """
    generator = torch.Generator().manual_seed(0)
    mass = torch.tensor([0.1, 1.0, 2.5, 0.0, 0.4], dtype=torch.float64)

    def free(*shape: int) -> torch.Tensor:
        return -torch.log(-torch.log(torch.rand(*shape, generator=generator, dtype=torch.float64)))

    maximum, noisy = free(30_000) + mass.sum().log(), free(30_000, 5) + mass.log()
    given = _given_maximum(noisy, maximum)
    assert torch.equal(given.amax(1), maximum)
    assert torch.equal(given.argmax(1), noisy.argmax(1))
    assert bool((given[:, 3] == -math.inf).all())
    some = [0, 1, 2, 4]
    uniforms = torch.exp(-torch.exp(mass.log() - given))[:, some].numpy()
    for column in uniforms.T:
        assert stats.kstest(column, "uniform").pvalue > oracles.FALSE_ALARM
    for one, other in itertools.combinations(uniforms.T, 2):
        cells, _, _ = np.histogram2d(one, other, bins=4, range=((0, 1), (0, 1)))
        assert oracles.chi_square_pvalue(cells.ravel(), np.full(16, 1 / 16)) > oracles.FALSE_ALARM
    nothing = _given_maximum(noisy[:1], torch.tensor([-math.inf], dtype=torch.float64))
    assert bool((nothing == -math.inf).all())


def variates(state: TensorDictBase) -> Any:
    """The noise of a level and its columns, by the public function."""

    def of_level(level: int, columns: np.ndarray) -> np.ndarray:
        quads = torch.arange(-(-len(columns) // 4))
        noise = gumbel(state["seed"], state["step"], torch.tensor(0), quads, level=level)
        return noise.flatten()[: len(columns)].double().numpy()

    return of_level


@pytest.mark.parametrize("capacity", [70, 1100, 9000])
def test_draws_for_the_batch_are_the_first_of_a_race_along_the_tree(capacity: int) -> None:
    """Bit for bit the slots, and to 1e-9 the perturbed masses, that all nodes of all levels give."""
    queries = unit(3, 8, 9, torch.float64)
    for step, num_draws in itertools.product(range(8), (1, 4, 9)):
        state = at_step(varied(capacity, torch.float64), step)
        mass = for_batch.mass_of(state, queries, None, scale=2.0)
        order, times = oracles.race_along_tree(mass, variates(state), (GROUP, BLOCK, 1))
        draw = sample(state, queries, num_draws=num_draws, scale=2.0)
        assert draw.slot[0].tolist() == order[:num_draws].tolist()
        ranked = torch.cat([draw.perturbed, draw.threshold], 1)[0]
        assert is_close(ranked, torch.from_numpy(-np.log(times[: num_draws + 1])), 1e-9)


def test_noise_goes_by_the_number_of_a_group() -> None:
    """Wherever a shard or a segment begins, in a quad of variates or at its start."""
    noise = Noise.of_queries(make_state(unit(3, 2, 0), seed=5, step=7), 2, 3, 2)
    whole = noise.of_groups(0, 30)
    for first in (0, 1, 2, 3, 4, 9):
        for start in (first, torch.tensor(first)):
            assert torch.equal(noise.of_groups(start, 11), whole[..., first : first + 11])


def test_the_first_of_equal_groups_is_chosen() -> None:
    """In one segment and across two."""
    first, second = (
        _Groups(torch.tensor([[n]]), torch.ones(1, 1), torch.zeros(1), torch.full((1, 1, 16), float(n)))
        for n in range(2)
    )
    chosen = _better(first, second)
    assert chosen.group.item() == 0 and chosen.blocks.unique().tolist() == [0.0]
    assert chosen.log_normalizer.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("top_k", [None, 8])
def test_any_two_draws_are_independent(top_k: int | None) -> None:
    """Of one query and of different ones, over places in several groups, blocks and slots."""
    draws.pairs_are_independent(sample, twins(), torch.zeros(5, 2), top_k=top_k)


def test_draws_for_the_batch_from_like_places() -> None:
    """Documents at one place of several blocks and groups: ordered draws have the chances of Plackett-Luce."""
    for_batch.ordered_law(sample, twins(), torch.zeros(1, 2), num_draws=2, steps=1000)


@pytest.mark.parametrize("options", [{"draws_per_query": 2}, {"num_draws": 3}], ids=str)
def test_the_cutoff_is_clear_of_both_sides(options: dict[str, int]) -> None:
    """Midway between the last score inside and the first outside: rounding moves neither across."""
    state, queries = varied(300, torch.float64), unit(4, 8, 9, torch.float64)
    for top_k in (1, 7, 64):
        cutoff = sample(state, queries, top_k=top_k, scale=3.0, **options).cutoff
        ordered = draws.exact_scores(state, queries, scale=3.0).sort(dim=1, descending=True).values
        assert is_close(cutoff, ordered[:, top_k - 1 : top_k + 1].mean(1, keepdim=True), 1e-12)


def test_masses_among_the_best_are_sums_over_queries() -> None:
    """With `top_k`: documents that several queries share, exactly."""
    queries, importance = unit(6, 8, 9, torch.float64), torch.linspace(0.2, 1.0, 6)
    options: dict[str, Any] = {"num_draws": 9, "top_k": 12, "importance": importance, "scale": 2.0}
    for_batch.fields(sample, varied(30, torch.float64), queries, tolerance=1e-6, **options)


@given(
    values=st.lists(
        st.sampled_from([-math.inf, -3.5, -0.25, -0.0, 0.0, 0.5, 2.0, math.inf, math.nan]), min_size=1, max_size=40
    ),
    n=st.integers(1, 45),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_largest_values_ties_by_place(values: list[float], n: int, dtype: torch.dtype) -> None:
    """A NaN counts as the largest."""
    n = min(n, len(values))
    assert _largest(torch.tensor(values, dtype=dtype), n).tolist() == largest_places(values, n)


@given(values=st.lists(st.sampled_from([-math.inf, -3.5, -0.25, 0.5, 2.0, math.nan]), min_size=1, max_size=40))
@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
def test_largest_groups_ties_by_place(values: list[float], native: bool) -> None:
    """Of log-masses beside which the noise is below rounding."""
    with patch.object(cpu, "supports_sums", cpu.supports_sums if native else lambda *_: False):
        for n in (1, len(values) // 2 + 1, len(values)):
            found, _, _ = largest_groups(torch.tensor(values)[:, None] * 1e12, NOISE, 7, n)
            assert [place - 7 for place in found.tolist()] == largest_places(values, n)


def largest_places(values: list[float], n: int) -> list[int]:
    """The first n places of the values in descending order, NaN before all, ascending."""
    keys = [(0, 0.0, place) if math.isnan(value) else (1, -value, place) for place, value in enumerate(values)]
    return sorted([place for _, _, place in sorted(keys)][:n])
