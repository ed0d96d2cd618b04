# pyright: basic, reportGeneralTypeIssues=false, reportMissingImports=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportReturnType=false
# ruff: noqa: ANN001, ANN202 - as for pyright: Triton is untyped, and a kernel's arguments are not what Python sees
"""The Triton kernel behind `call.gumbel`: the variates of `negcache_fn.random.gumbel` in one launch instead of 130."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch"]

_LANES = tl.constexpr(4)
_WIDTH = 256  # quads of a program
_LARGEST = tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def _kernel(seed, step, row, quad, out, count, LEVEL: tl.constexpr, WIDTH: tl.constexpr):  # pragma: no cover - compiled
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = place < count
    word0 = tl.load(quad + place, mask=inside, other=0).to(tl.uint32)
    word1 = tl.load(row + place, mask=inside, other=0).to(tl.uint32)
    key = tl.load(seed)
    key0, key1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    word2 = tl.full([WIDTH], 0, tl.uint32) + tl.load(step).to(tl.uint32)
    word3 = tl.full([WIDTH], LEVEL, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.math.umulhi(word0, 0xD2511F53), word0 * 0xD2511F53
        high1, low1 = tl.math.umulhi(word2, 0xCD9E8D57), word2 * 0xCD9E8D57
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    target = out + place * _LANES
    tl.store(target, _gumbel(word0), mask=inside)
    tl.store(target + 1, _gumbel(word1), mask=inside)
    tl.store(target + 2, _gumbel(word2), mask=inside)
    tl.store(target + 3, _gumbel(word3), mask=inside)


@triton.jit
def _gumbel(word):  # pragma: no cover - compiled
    uniform = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, _LARGEST)
    # log1p(-v) after Kahan: of 1 - v as it was rounded, scaled back to v.
    rest = 1.0 - uniform
    exponential = tl.where(rest == 1.0, uniform, -tl.log(rest) * uniform / (1.0 - rest))
    return -tl.log(exponential)


def launch(seed: Tensor, step: Tensor, row: Tensor, quad: Tensor, level: int, out: Tensor) -> None:
    """Writes the variates to `out` [n, 4]; `row` and `quad` [n] are contiguous, `seed` and `step` lie beside them."""
    kernel: Any = _kernel
    count = row.numel()
    kernel[(triton.cdiv(count, _WIDTH),)](seed, step, row, quad, out, count, LEVEL=level, WIDTH=_WIDTH)
