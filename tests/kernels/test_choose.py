"""Choices along the tree: the kernels against plain torch, whose noise has the law that the tests of draws check."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from negcache_fn._draws import choose
from negcache_fn._draws.noise import AMONG_BLOCKS, Noise
from negcache_fn._kernels.blocks import BLOCK, GROUP
from tests.kernels.test_cpu import configured, needs_kernels

BLOCKS = GROUP // BLOCK
NOISE = {"seed": st.integers(-(2**63), 2**63 - 1), "step": st.integers(0, 2**32 - 1)}
OF_QUERIES = {**NOISE, "queries": st.integers(0, 5), "samples": st.integers(1, 4)}
MASSES = {
    "scale": st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    "empty": st.sampled_from([0.0, 0.5, 1.0]),
    "wide": st.booleans(),
}


def masses(generator: torch.Generator, *shape: int, scale: float, empty: float) -> Tensor:
    values = torch.randn(*shape, generator=generator) * scale
    return values.masked_fill(torch.rand(*shape, generator=generator) < empty, -math.inf)


def noise_of(seed: int, step: int, first: int, queries: int, samples: int) -> Noise:
    rows = torch.arange(first, first + queries * samples).view(queries, samples)
    return Noise(torch.tensor(seed), torch.tensor(step), rows)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=2e-6, equal_nan=True)


@needs_kernels
@given(
    **OF_QUERIES,
    blocks=st.integers(1, 700),
    first=st.integers(0, 2**22),
    **MASSES,
)
def test_groups_are_those_of_plain_torch(
    seed: int, step: int, queries: int, samples: int, blocks: int, first: int, scale: float, empty: float, wide: bool
) -> None:
    generator = torch.Generator().manual_seed(step)
    values, noise = (
        masses(generator, queries, blocks, scale=scale, empty=empty),
        noise_of(seed, step, first, queries, samples),
    )
    expected = choose._choose_groups(values, noise, first)
    with configured("highest", products="vectors" if wide else "narrow"):
        same(choose.choose_groups(values, noise, first), expected)
        same(choose.choose_groups(values, noise, torch.tensor(first)), expected)


@needs_kernels
@given(
    **OF_QUERIES,
    children=st.sampled_from([BLOCKS, BLOCK]),
    **MASSES,
)
def test_children_are_those_of_plain_torch(
    seed: int, step: int, queries: int, samples: int, children: int, scale: float, empty: float, wide: bool
) -> None:
    generator = torch.Generator().manual_seed(step)
    values = masses(generator, queries, samples, children, scale=scale, empty=empty)
    parent = torch.randint(2**32 // children, (queries, samples), generator=generator)
    noise = noise_of(seed, step, seed & 0xFFFF, queries, samples)
    expected = choose._choose_children(values, noise, AMONG_BLOCKS, parent)
    with configured("highest", products="vectors" if wide else "narrow"):
        same(choose.choose_children(values, noise, AMONG_BLOCKS, parent), expected)


@needs_kernels
@given(
    **NOISE,
    groups=st.integers(1, 80),
    width=st.sampled_from([1, BLOCKS]),
    first=st.integers(0, 2**22),
    **MASSES,
    n=st.integers(1, 90),
)
def test_largest_groups_are_those_of_plain_torch(
    seed: int, step: int, groups: int, width: int, first: int, scale: float, empty: float, n: int, wide: bool
) -> None:
    generator = torch.Generator().manual_seed(step)
    values, noise = masses(generator, groups, width, scale=scale, empty=empty), noise_of(seed, step, 0, 1, 1)
    expected = choose._largest_groups(values, noise, first, min(n, groups))
    with configured("highest", products="vectors" if wide else "narrow"):
        same(choose.largest_groups(values, noise, first, n), expected)
        same(choose.largest_groups(values, noise, torch.tensor(first), n), expected)


@needs_kernels
@given(
    **NOISE,
    parents=st.integers(1, 40),
    children=st.sampled_from([BLOCKS, BLOCK]),
    **MASSES,
    spread=st.sampled_from([3.0, 300.0]),
    n=st.integers(1, 50),
)
@example(0, 0, 1100, BLOCK, 3.0, 0.1, 3.0, 500, True)  # on all threads
def test_largest_children_are_those_of_plain_torch(
    seed: int, step: int, parents: int, children: int, scale: float, empty: float, spread: float, n: int, wide: bool
) -> None:
    """In float64, but for the noise. A parent's perturbed log-mass may be any."""
    generator = torch.Generator().manual_seed(step)
    values, noise = masses(generator, parents, children, scale=scale, empty=empty), noise_of(seed, step, 0, 1, 1)
    parent = torch.randint(2**32 // children, (parents,), generator=generator).sort().values
    perturbed = values.logsumexp(1) + torch.randn(parents, generator=generator) * spread
    noisy = values.double() + noise.of_children(parent[None], children, AMONG_BLOCKS)[0]
    given_maximum = choose._given_maximum(noisy, perturbed.double()).flatten()
    place = choose._largest(given_maximum, min(n, parents * children))
    with configured("highest", products="vectors" if wide else "narrow"):
        child, of_child, mass = choose.largest_children(values, noise, AMONG_BLOCKS, parent, perturbed, n)
    number = parent[:, None] * children + torch.arange(children)
    assert torch.equal(child, number.flatten()[place])
    assert torch.equal(mass, values.flatten()[place])
    # Two that are nearly equal in their parent lose digits of their difference.
    below = noisy.amax(1, keepdim=True) - noisy
    below = torch.where(below == 0.0, 1.0, below.clamp(max=1.0))
    allowed = (noisy.abs() + perturbed.abs()[:, None] + 1) * (1e-6 / below)
    error = (of_child - given_maximum[place]).abs()
    exists = given_maximum[place] > -math.inf
    assert bool((error <= allowed.flatten()[place])[exists].all())
    assert bool((of_child[~exists] == -math.inf).all())


@needs_kernels
@pytest.mark.parametrize("queries", [3, 700])  # the latter on all threads
def test_a_query_that_has_diverged_shows_it(queries: int) -> None:
    """Its normaliser is NaN; the others do not notice."""
    generator = torch.Generator().manual_seed(0)
    values, noise = masses(generator, queries, 300, scale=3.0, empty=0.1), noise_of(5, 6, 7, queries, 2)
    before = choose.choose_groups(values, noise, 4)
    values[1] = math.nan
    group, perturbed, log_normalizer, of_group = choose.choose_groups(values, noise, 4)
    assert bool(log_normalizer[1].isnan())
    assert bool(((group[1] >= 4) & (group[1] < 4 + 19)).all())
    others = torch.arange(queries) != 1
    same((group[others], perturbed[others], of_group[others]), tuple(before[i][others] for i in (0, 1, 3)))
    place, _ = choose.choose_children(of_group, noise, AMONG_BLOCKS, group)
    assert bool(((place >= group * BLOCKS) & (place < (group + 1) * BLOCKS)).all())


@needs_kernels
def test_ties_go_to_the_first() -> None:
    """So large that the noise is below rounding."""
    noise, parent = noise_of(5, 6, 7, 40, 2), torch.arange(80).view(40, 2)
    values = torch.full((40, 2, BLOCK), 1e9)
    values[..., :3] = 0.0
    found = choose.choose_children(values, noise, AMONG_BLOCKS, parent)
    same(found, (parent * BLOCK + 3, torch.full((40, 2), 1e9)))
    same(found, choose._choose_children(values, noise, AMONG_BLOCKS, parent))


@needs_kernels
def test_the_upper_tail_is_precise() -> None:
    """Of 4 million variates, the largest of which decide: one column at a time, so that the sum is the variate."""
    noise = noise_of(1, 2, 0, 1, 1)._replace(row=torch.arange(2**22)[:, None])
    zeros = torch.zeros(2**22, 1)
    _, perturbed, _, _ = choose.choose_groups(zeros, noise, 0)
    _, expected, _, _ = choose._choose_groups(zeros.double(), noise, 0)
    assert perturbed.max() > 14
    torch.testing.assert_close(perturbed.double(), expected, rtol=3e-7, atol=3e-7)


@needs_kernels
def test_operators_are_well_made() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = noise_of(5, 6, 7, 3, 2)
    values, children = masses(generator, 3, 40, scale=3.0, empty=0.1), torch.randn(3, 2, BLOCK, generator=generator)
    for origin, first in ((None, 3), (torch.tensor(3), 0)):
        torch.library.opcheck(torch.ops.negcache_fn.choose_groups.default, (values, *noise, origin, first))
    torch.library.opcheck(
        torch.ops.negcache_fn.choose_children.default, (children, *noise, AMONG_BLOCKS, torch.arange(6).view(3, 2))
    )
    of_batch, groups = noise_of(5, 6, 0, 1, 1), children[0, :, :BLOCKS].contiguous()
    for origin, first in ((None, 3), (torch.tensor(3), 0)):
        torch.library.opcheck(torch.ops.negcache_fn.largest_groups.default, (groups, *of_batch, origin, first, 2))
    torch.library.opcheck(
        torch.ops.negcache_fn.largest_children.default,
        (groups, *of_batch, AMONG_BLOCKS, torch.arange(2), torch.randn(2, generator=generator), 5),
    )
