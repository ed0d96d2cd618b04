# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportReturnType=false
# ruff: noqa: ANN001, ANN202 - as for pyright: Triton is untyped, and a kernel's arguments are not what Python sees
"""The Triton kernel behind `call.block_logsumexp`: product, bias, exclusions and block log-sum-exp in one pass.

A program scores BLOCK_M queries against BLOCK_N slots, a few whole blocks, in float32 accumulators, reduces every block
in registers and writes one number for each: no score reaches memory. On request it also writes the softmax inside every
block, from which `call.py` computes a mean of the embeddings. Programs that share embeddings run side by side, so that
the embeddings are read once and the queries stay in the L2 cache. `call.py` imports this file only if Triton is there.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, are_deterministic_algorithms_enabled
from torch.nn.functional import pad

from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.triton.products import LN_2, LOG2_E, tile_of_products, tile_of_scores

__all__ = ["configs", "launch", "suitable"]

_INTERPRETED = triton.knobs.runtime.interpret
_BLOCK = tl.constexpr(BLOCK)
_GROUP = tl.constexpr(16)  # tiles of queries
_FIXED = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3}


@triton.jit
def _kernel(
    queries,  # [PARTS, B, D], their sum times the magnitude being the queries
    magnitude,  # [B]
    embeddings,  # [C, D]
    bias,  # [C]
    excluded,  # [B, P]
    max_score,  # [B]; anything without LIMITED
    row_labels,  # [B] int32; anything without LABELLED
    slot_labels,  # [C] int32; anything without LABELLED
    out,  # [B, blocks]
    weights,  # [B, blocks * _BLOCK] in units of 1 / UNIT; anything without WEIGHTED
    row_scale,  # [C]; anything without SCALED
    B,
    C,
    blocks,
    bucket,  # B rounded up to a power of two: for the autotuner alone
    D: tl.constexpr,
    P: tl.constexpr,
    LIMITED: tl.constexpr,
    LABELLED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # pragma: no cover - compiled, or run by the interpreter in another process
    tiles_m = tl.cdiv(B, BLOCK_M)
    per_group = _GROUP * tl.cdiv(C, BLOCK_N)
    first_tile = tl.program_id(0) // per_group * _GROUP
    width = tl.minimum(tiles_m - first_tile, _GROUP)
    within = tl.program_id(0) % per_group
    # int64: C * D, B * D and B * blocks can exceed 2^31, a tile cannot.
    first_row = (first_tile + within % width).to(tl.int64) * BLOCK_M
    first_slot = (within // width).to(tl.int64) * BLOCK_N

    # Rows past the end are read again from the last one, without masks, and never written.
    row = tl.minimum(tl.arange(0, BLOCK_M), B - 1 - first_row).to(tl.int32)
    slot = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    query = queries + first_row * D + (row[:, None] * D + column[None, :])
    last_slot = (C - 1 - first_slot).to(tl.int32)
    embedding = embeddings + first_slot * D + (tl.minimum(slot, last_slot)[None, :] * D + column[:, None])

    products = tile_of_products(query, embedding, column, B, D, PARTS, PRECISION, WIDEN, BLOCK_M, BLOCK_N, BLOCK_D)
    inside = slot <= last_slot
    if SCALED:
        scale = tl.load(row_scale + first_slot + slot, mask=inside, other=0.0)
        products *= scale[None, :]
    offset = tl.load(bias + first_slot + slot, mask=inside, other=float("-inf")) * LOG2_E
    labels = slot
    if LABELLED:
        labels = tl.load(slot_labels + first_slot + slot, mask=inside, other=0)
    scores = tile_of_scores(
        products,
        offset,
        magnitude + first_row + row,
        max_score + first_row + row,
        row_labels + first_row + row,
        labels,
        LIMITED,
        LABELLED,
    )
    if P > 0:
        found = tl.full([BLOCK_M], 0, tl.int32)
        exclusions = excluded + (first_row + row) * P
        for p in range(P):
            place = tl.load(exclusions + p) - first_slot
            found |= ((place >= 0) & (place < BLOCK_N)).to(tl.int32)
        if tl.max(found, 0) > 0:  # seldom
            for p in range(P):
                place = tl.load(exclusions + p) - first_slot
                scores = tl.where(place[:, None] == slot[None, :], float("-inf"), scores)

    scores = tl.reshape(scores, [BLOCK_M, BLOCK_N // _BLOCK, _BLOCK])
    peak = tl.max(scores, 2)
    # Of an empty block log(0) remains, and of NaN, which a maximum passes over, NaN.
    peak = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    exponentials = tl.exp2(scores - peak[:, :, None])
    total = tl.sum(exponentials, 2)
    place = tl.arange(0, BLOCK_N // _BLOCK)[None, :]
    block = first_slot // _BLOCK + place
    target = out + (first_row + row)[:, None] * blocks + block
    inside = (tl.arange(0, BLOCK_M)[:, None] < B - first_row) & (block < blocks)
    tl.store(target, (tl.log2(total) + peak) * LN_2, mask=inside)
    if WEIGHTED:
        shares = exponentials * (UNIT / tl.where(total == 0.0, 1.0, total))[:, :, None]
        shares = tl.reshape(shares, [BLOCK_M, BLOCK_N])
        if SCALED:
            shares *= scale[None, :]
        shares = shares.to(weights.dtype.element_ty)
        width = tl.cast(blocks, tl.int64) * _BLOCK
        target = weights + (first_row + row)[:, None] * width + (first_slot + slot)[None, :]
        inside = (tl.arange(0, BLOCK_M)[:, None] < B - first_row) & ((first_slot + slot)[None, :] < width)
        tl.store(target, shares, mask=inside)


def configs(element_size: int) -> list[triton.Config]:
    """Tiles to choose from, for products of numbers of `element_size` bytes: steps in D of 128 bytes."""
    return [
        triton.Config(
            {"BLOCK_M": rows, "BLOCK_N": slots, "BLOCK_D": 128 // element_size}, num_warps=warps, num_stages=stages
        )
        for rows, slots, warps, stages in (
            (16, 128, 4, 4),
            (32, 128, 4, 4),
            (64, 128, 4, 4),
            (128, 128, 4, 3),
            (128, 128, 8, 3),
            (128, 256, 8, 3),
        )
    ]


def suitable(candidates: list[triton.Config], arguments: dict[str, int], **_: object) -> list[triton.Config]:
    """Those candidates whose rows fit the batch: few of them idle, and the embeddings read few times."""
    bucket = arguments["bucket"]
    return [config for config in candidates if min(64, bucket) <= config.kwargs["BLOCK_M"] <= max(16, bucket)]


_TUNED = {
    size: triton.autotune(
        configs(size),
        key=["bucket", "D", "PARTS", "PRECISION", "WEIGHTED"],
        prune_configs_by={"early_config_prune": suitable},
    )(_kernel)
    for size in (2, 4)
}


def launch(
    queries: Tensor,
    magnitude: Tensor,
    embeddings: Tensor,
    bias: Tensor,
    excluded: Tensor,
    max_score: Tensor | None,
    precision: str,
    out: Tensor,
    weights: Tensor | None = None,
    unit: float = 1.0,
    row_labels: Tensor | None = None,
    slot_labels: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> None:  # pragma: no cover - tested in another process, with the interpreter
    """Writes the log-sum-exp of every block to `out` [B, blocks]; the arguments as the kernel's, contiguous.

    To `weights` [B, blocks * BLOCK], if given, the softmax inside each block times `unit`, and times the
    rows' scales if they have any; 0 where a block is empty.

    The first call for a kind of problem tries the tiles and keeps the fastest. These may differ in the last bit, so
    that `torch.use_deterministic_algorithms` fixes them.
    """
    parts, rows, dim = queries.shape
    capacity, blocks = embeddings.shape[0], out.shape[1]
    exclusions = triton.next_power_of_2(excluded.shape[1])  # each number of them is another kernel: let there be few
    excluded = pad(excluded, (0, exclusions - excluded.shape[1]), value=-1)
    fixed = _INTERPRETED or are_deterministic_algorithms_enabled()
    kernel: Any = _kernel if fixed else _TUNED[queries.element_size()]

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(capacity, tile["BLOCK_N"]),)

    kernel[grid](
        queries,
        magnitude,
        embeddings,
        bias,
        excluded,
        magnitude if max_score is None else max_score.contiguous(),
        magnitude if row_labels is None else row_labels.contiguous(),
        magnitude if slot_labels is None else slot_labels.contiguous(),
        out,
        out if weights is None else weights,
        magnitude if row_scale is None else row_scale,
        rows,
        capacity,
        blocks,
        max(16, triton.next_power_of_2(rows)),
        D=dim,
        P=exclusions,
        LIMITED=max_score is not None,
        LABELLED=row_labels is not None,
        WEIGHTED=weights is not None,
        SCALED=row_scale is not None,
        UNIT=unit,
        PARTS=parts,
        PRECISION=precision,
        WIDEN=_INTERPRETED,  # it has no bfloat16 products
        **(_FIXED if fixed else {}),
    )
