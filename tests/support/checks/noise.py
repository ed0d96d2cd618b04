"""Checks of a Philox and of a Gumbel noise function."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from tests.support import oracles

Philox = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]
Noise = Callable[..., Tensor]

KNOWN_ANSWERS = [
    # Random123 1.14, kat_vectors, philox4x32 10: counter, key, output.
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[Tensor, ...]:
    """Hexadecimal words as int64 tensors."""
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


def known_answers(philox: Philox) -> None:
    """The three published vectors, bit for bit."""
    for counter, key, expected in KNOWN_ANSWERS:
        given = philox(words(counter), words(key))
        assert [f"{int(x):08x}" for x in given] == expected.split()


def same_as_integers(philox: Philox, seed: int = 0) -> None:
    """Equal to Philox in Python integers, at random and extreme words, elementwise over a batch."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 2**32, size=(6, 300), dtype=np.int64)
    drawn[:, :64] = np.array([[(n >> w & 1) * 0xFFFFFFFF for n in range(64)] for w in range(6)])
    columns = [torch.from_numpy(row) for row in drawn]
    given = torch.stack(list(philox(tuple(columns[:4]), tuple(columns[4:]))), -1)
    assert given.dtype == torch.int64
    for n in range(drawn.shape[1]):
        expected = oracles.philox4x32(drawn[:4, n].tolist(), drawn[4:, n].tolist())
        assert given[n].tolist() == expected


def noise_block(gumbel: Noise, count: int, *, seed: int = 7, step: int = 3, row: int = 0, level: int = 0) -> np.ndarray:
    """`count` values of one stream, in column order."""
    quads = torch.arange(-(-count // 4))
    values = gumbel(torch.tensor(seed), torch.tensor(step), torch.tensor(row), quads, level=level)
    return values.reshape(-1)[:count].double().numpy()


def moments(gumbel: Noise, count: int = 1_000_000) -> None:
    """Mean Euler's constant, variance pi^2 / 6: within 5 standard errors each (false alarm 6e-7)."""
    values = noise_block(gumbel, count)
    variance = math.pi**2 / 6
    assert abs(values.mean() - np.euler_gamma) < 5 * math.sqrt(variance / count)
    fourth = (12 / 5 + 3) * variance**2
    assert abs(values.var() - variance) < 5 * math.sqrt((fourth - variance**2) / count)


def kolmogorov_smirnov(gumbel: Noise, count: int = 1_000_000) -> None:
    """Distribution function exp(-exp(-x)), at both levels (false alarm `oracles.FALSE_ALARM`)."""
    for level in (0, 1):
        assert stats.kstest(noise_block(gumbel, count, level=level), "gumbel_r").pvalue > oracles.FALSE_ALARM


def upper_tail(gumbel: Noise, count: int = 10_000_000, repeats: int = 3) -> None:
    """The largest of 10^7 as theory has it, exceedances binomial, and a tail finer than 23 bits.

    The maximum of n Gumbels is a Gumbel shifted by log n; it leaves its 1e-7 quantiles with probability 2e-7 each time.
    The 20 largest of 10^7 lie in about 8600 steps of a 32-bit grid but in 17 of a 23-bit one: more than 3 ties have
    probability under 1e-6 on the former.
    """
    shift = math.log(count)
    for repeat in range(repeats):
        values = noise_block(gumbel, count, step=repeat)
        assert np.isfinite(values).all()
        low, high = shift + stats.gumbel_r.ppf(1e-7), shift - math.log(1e-7)
        assert low < values.max() < high
        for threshold in (8.0, 10.0, 12.0, 14.0):
            chance = -math.expm1(-math.exp(-threshold))
            beyond = int((values > threshold).sum())
            assert stats.binomtest(beyond, count, chance).pvalue > oracles.FALSE_ALARM
        assert len(np.unique(np.sort(values)[-20:])) >= 17


def extremes(gumbel_of_words: Callable[[int], Tensor]) -> None:
    """Finite for every 32-bit output, and the tail of at least 32 bits: 22.18 = -log(2^-32) or beyond at one end.

    The other end is 1 - v = 2^-24 in float32 or less: between -4 and -2.7.
    """
    ends = [gumbel_of_words(word).double() for word in (0, 0xFFFFFFFF)]
    assert all(torch.isfinite(end).all() for end in ends)
    low, high = sorted(float(end.reshape(-1)[0]) for end in ends)
    assert high >= 22.0
    assert -4.0 <= low <= -2.7
    middle = [float(gumbel_of_words(word).reshape(-1)[0]) for word in (1, 2**20, 2**31, 2**32 - 2**20, 2**32 - 2)]
    assert all(math.isfinite(value) and low <= value <= high for value in middle)


def streams_differ(gumbel: Noise, count: int = 100_000) -> None:
    """Seed, step, row and level each give an unrelated stream: correlation within 5 / sqrt(n) (false alarm 6e-7)."""
    base = noise_block(gumbel, count)
    others = [
        noise_block(gumbel, count, seed=8),
        noise_block(gumbel, count, seed=7 + 2**32),
        noise_block(gumbel, count, step=4),
        noise_block(gumbel, count, row=1),
        noise_block(gumbel, count, level=1),
        np.roll(base, 1),
        np.roll(base, 4),
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / math.sqrt(count)


def noise_is_a_function(gumbel: Noise) -> None:
    """One value per counter, however the call is cut or broadcast."""
    seed, step = torch.tensor(11), torch.tensor(5)
    rows, quads = torch.arange(6), torch.arange(50)
    whole = gumbel(seed, step, rows[:, None], quads[None], level=1)
    assert whole.shape == (6, 50, 4)
    assert torch.equal(whole, gumbel(seed, step, rows[:, None], quads[None], level=1))
    parts = [gumbel(seed, step, rows[:, None], part[None], level=1) for part in quads.split(7)]
    assert torch.equal(whole, torch.cat(parts, 1))
    assert torch.equal(whole[4, 9], gumbel(seed, step, torch.tensor(4), torch.tensor(9), level=1))
