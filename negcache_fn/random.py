"""Noise as a function: Philox-4x32-10 and Gumbel variates without a generator.

Every variate is a pure function of (seed, step, row, column, level). Nothing reads or advances a random number
generator, so eager, compiled, chunked, sharded and resumed runs see the same noise.

Source: Salmon, Moraes, Dror, Shaw, *Parallel random numbers: as easy as 1, 2, 3*, SC 2011 (Philox, Random123).
"""

import torch
from torch import Tensor

__all__ = ["gumbel", "philox"]

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# The largest float32 below 1: cuts the *lower* Gumbel tail at probability 2**-24, which no maximum ever sees.
_BELOW_ONE = 1.0 - 2.0**-24


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit random words per counter, bit for bit the same as Random123's `philox4x32_R(10, ...)`.

    Args:
        counter: four int64 tensors that broadcast together, each holding values in [0, 2**32).
        key: two int64 tensors, likewise.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).

    Examples:
        >>> zero = torch.tensor(0)
        >>> [hex(int(word)) for word in philox((zero, zero, zero, zero), (zero, zero))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']

    Reference: Salmon et al., SC 2011, section 3.3.
    """
    word0, word1, word2, word3 = counter
    rounds = torch.arange(_ROUNDS, device=word0.device)
    keys = [((word[..., None] + rounds * weyl) & _MASK).unbind(-1) for word, weyl in zip(key, _WEYL, strict=True)]
    for key0, key1 in zip(*keys, strict=True):
        high0, low0 = _multiply(_MULTIPLIERS[0], word0)
        high1, low1 = _multiply(_MULTIPLIERS[1], word2)
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
    return word0, word1, word2, word3


def gumbel(seed: Tensor, step: Tensor, row: Tensor, quad: Tensor, *, level: int) -> Tensor:
    """Standard Gumbel variates for the four columns `4 * quad ... 4 * quad + 3`.

    One Philox call gives four words, so columns come in quads. With `v` uniform on the midpoints of 2**32 cells,
    `-log(-log1p(-v))` is Gumbel and keeps full relative precision where it is large (`v` small): the upper tail
    reaches 22.9, where a 23-bit `-log(-log(u))` stops at 16.6.

    Args:
        seed: [] int64.
        step: [] int64, non-negative, below 2**32.
        row: int64, the row of the noise matrix (query x sample), broadcast against `quad`.
        quad: int64, column // 4, below 2**32.
        level: which noise matrix: the levels of a hierarchical draw must not share noise.

    Returns:
        [..., 4] float32, `...` being the broadcast shape of `row` and `quad`.

    Examples:
        >>> noise = gumbel(torch.tensor(0), torch.tensor(0), torch.arange(3)[:, None], torch.arange(5), level=0)
        >>> noise.shape, noise.flatten(1).shape
        (torch.Size([3, 5, 4]), torch.Size([3, 20]))
    """
    counter = (quad, row, step & _MASK, torch.full_like(step, level))
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    uniform = (torch.stack(words, dim=-1).to(torch.float32) + 0.5) * 2.0**-32
    exponential = -torch.log1p(-uniform.clamp(max=_BELOW_ONE))
    return -torch.log(exponential)


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of two unsigned 32-bit values, in int64 without overflow.

    `multiplier - 2**32` is negative and above -2**31, so its product with `word` fits; the missing `word * 2**32`
    belongs to the high half alone.
    """
    product = (multiplier - 2**32) * word
    return word + (product >> 32), product & _MASK
