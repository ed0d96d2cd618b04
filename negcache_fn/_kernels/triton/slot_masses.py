# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportReturnType=false
# ruff: noqa: ANN001, ANN202 - as for pyright: Triton is untyped, and a kernel's arguments are not what Python sees
"""The Triton kernel behind `call.slot_masses`: a product and the log-sum-exp over the queries, in one pass.

A program takes BLOCK_N slots and goes over all queries, BLOCK_M at a time; no score reaches memory.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from negcache_fn._kernels.triton.products import LN_2, LOG2_E, tile_of_products, tile_of_scores

__all__ = ["launch"]

_INTERPRETED = triton.knobs.runtime.interpret
_ROWS, _SLOTS, _BYTES = 64, 64, 128  # of a tile; bytes of an embedding at a time


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
    log_weight,  # [B]
    row_scale,  # [C]; anything without SCALED
    out,  # [C]
    B,
    C,
    D: tl.constexpr,
    P: tl.constexpr,
    LIMITED: tl.constexpr,
    LABELLED: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # pragma: no cover - compiled, or run by the interpreter in another process
    # int64: C * D and B * D can exceed 2^31.
    slot = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    embedding = embeddings + tl.minimum(slot, C - 1)[None, :] * D + column[:, None]
    if SCALED:
        scale = tl.load(row_scale + slot, mask=slot < C, other=0.0)
    offset = tl.load(bias + slot, mask=slot < C, other=float("-inf")) * LOG2_E
    labels = slot
    if LABELLED:
        labels = tl.load(slot_labels + slot, mask=slot < C, other=0)

    peak = tl.full([BLOCK_N], 0.0, tl.float32)
    total = tl.full([BLOCK_N], 0.0, tl.float32)
    for first_row in range(0, B, BLOCK_M):
        place = first_row + tl.arange(0, BLOCK_M)
        row = tl.minimum(place, B - 1).to(tl.int64)
        query = queries + row[:, None] * D + column[None, :]
        products = tile_of_products(query, embedding, column, B, D, PARTS, PRECISION, WIDEN, BLOCK_M, BLOCK_N, BLOCK_D)
        if SCALED:
            products *= scale[None, :]
        scores = tile_of_scores(
            products, offset, magnitude + row, max_score + row, row_labels + row, labels, LIMITED, LABELLED
        )
        for p in range(P):
            place_excluded = tl.load(excluded + row * P + p)
            scores = tl.where(place_excluded[:, None] == slot[None, :], float("-inf"), scores)
        weight = tl.load(log_weight + row, mask=place < B, other=float("-inf")) * LOG2_E
        counts = weight > float("-inf")
        scores = tl.where(counts[:, None], scores + weight[:, None], float("-inf"))

        # Relative to the largest so far, of those that are finite. A maximum passes over NaN, a sum does not.
        larger = tl.max(scores, 0)
        larger = tl.where(total == 0.0, larger, tl.maximum(peak, larger))
        larger = tl.where(tl.abs(larger) == float("inf"), 0.0, larger)
        total = tl.where(total == 0.0, 0.0, total * tl.exp2(peak - larger))
        total += tl.sum(tl.exp2(scores - larger[None, :]), 0)
        peak = larger
    tl.store(out + slot, (tl.log2(total) + peak) * LN_2, mask=slot < C)


def launch(
    queries: Tensor,
    magnitude: Tensor,
    embeddings: Tensor,
    bias: Tensor,
    excluded: Tensor,
    max_score: Tensor | None,
    row_labels: Tensor | None,
    slot_labels: Tensor | None,
    log_weight: Tensor,
    precision: str,
    out: Tensor,
    row_scale: Tensor | None = None,
) -> None:  # pragma: no cover - tested in another process, with the interpreter
    """Writes the masses to `out` [C]; the other arguments as the kernel's, contiguous."""
    parts, rows, dim = queries.shape
    capacity = embeddings.shape[0]
    exclusions = triton.next_power_of_2(excluded.shape[1])  # each number of them is another kernel: let there be few
    excluded = pad(excluded, (0, exclusions - excluded.shape[1]), value=-1)
    kernel: Any = _kernel
    kernel[(triton.cdiv(capacity, _SLOTS),)](
        queries,
        magnitude,
        embeddings,
        bias,
        excluded,
        magnitude if max_score is None else max_score.contiguous(),
        magnitude if row_labels is None else row_labels.contiguous(),
        magnitude if slot_labels is None else slot_labels.contiguous(),
        log_weight.contiguous(),
        magnitude if row_scale is None else row_scale,
        out,
        rows,
        capacity,
        D=dim,
        P=exclusions,
        LIMITED=max_score is not None,
        LABELLED=row_labels is not None,
        SCALED=row_scale is not None,
        PARTS=parts,
        PRECISION=precision,
        WIDEN=_INTERPRETED,  # it has no bfloat16 products
        BLOCK_M=_ROWS,
        BLOCK_N=_SLOTS,
        BLOCK_D=_BYTES // queries.element_size(),
        num_warps=4,
        num_stages=3,
    )
