"""Philox against published vectors and Python integers; the noise against the Gumbel distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from negcache_fn import random
from tests.support.checks import noise


def test_known_answers() -> None:
    """The three Random123 vectors of philox4x32-10."""
    noise.known_answers(random.philox)


def test_equal_to_python_integers() -> None:
    """At random words, and at every corner of 0 and 0xffffffff."""
    noise.same_as_integers(random.philox)


def test_mean_and_variance() -> None:
    """Euler's constant and pi^2 / 6."""
    noise.moments(random.gumbel)


def test_distribution_function() -> None:
    """Kolmogorov-Smirnov over 10^6."""
    noise.kolmogorov_smirnov(random.gumbel)


def test_upper_tail_of_ten_million() -> None:
    """The largest of 10^7, exceedances and ties."""
    noise.upper_tail(random.gumbel)


def test_streams_are_unrelated() -> None:
    """Seed (all 64 bits of it), step, row, level and column."""
    noise.streams_differ(random.gumbel)


def test_noise_is_a_function_of_its_counters() -> None:
    """Cut, broadcast or repeated."""
    noise.noise_is_a_function(random.gumbel)


def test_finite_at_the_extreme_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Philox outputs of all zeros and all ones, and the tail beyond 32 bits at one of them."""

    def gumbel_of_words(word: int) -> Tensor:
        def constant(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            shape = torch.broadcast_shapes(*(x.shape for x in (*counter, *key)))
            return tuple(torch.full(shape, word) for _ in range(4))

        monkeypatch.setattr(random, "philox", constant)
        zero = torch.tensor(0)
        return random.gumbel(zero, zero, zero, torch.arange(3), level=0)

    noise.extremes(gumbel_of_words)


@pytest.mark.parametrize("place", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_finite_at_the_extreme_counters(place: int, seed: int) -> None:
    """Any seed, any step, rows and columns up to 32 bits."""
    at = torch.tensor(place)
    for step in (0, 2**32, 2**63 - 1):
        for level in (0, 1):
            values = random.gumbel(torch.tensor(seed), torch.tensor(step), at, at, level=level)
            assert values.shape == (4,)
            assert values.dtype == torch.float32
            assert bool(torch.isfinite(values).all())


def test_global_generators_are_left_alone() -> None:
    """No global RNG is read or changed."""
    before = torch.get_rng_state()
    first = random.gumbel(torch.tensor(1), torch.tensor(2), torch.tensor(3), torch.arange(4), level=0)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert torch.equal(
        first, random.gumbel(torch.tensor(1), torch.tensor(2), torch.tensor(3), torch.arange(4), level=0)
    )
