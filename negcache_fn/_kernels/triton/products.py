# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportReturnType=false
# ruff: noqa: ANN001, ANN202 - as for pyright: Triton is untyped, and a kernel's arguments are not what Python sees
"""The part that the kernels share: a tile of scores, up to exclusions by slot."""

import triton
import triton.language as tl

__all__ = ["LN_2", "LOG2_E", "tile_of_products", "tile_of_scores"]

# Scores are in units of log 2, which is what the hardware's exponential and logarithm take.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_of_products(
    query,  # [BLOCK_M, BLOCK_D] pointers to the first numbers of the first part
    embedding,  # [BLOCK_D, BLOCK_N] pointers to the first numbers
    column,  # [BLOCK_D]
    B,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # pragma: no cover - compiled, or run by the interpreter in another process
    """[BLOCK_M, BLOCK_N] products, in float32."""
    products = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    # The parts take turns: the compiler overlaps one product, not two, with the loads for the next step.
    for step in range(tl.cdiv(D, BLOCK_D) * PARTS):
        start = step // PARTS * BLOCK_D
        part = step % PARTS * tl.cast(B, tl.int64) * D  # which can exceed 2^31
        if D % BLOCK_D == 0:
            q = tl.load(query + (part + start))
            e = tl.load(embedding + start)
        else:
            q = tl.load(query + (part + start), mask=column[None, :] < D - start, other=0.0)
            e = tl.load(embedding + start, mask=column[:, None] < D - start, other=0.0)
        if WIDEN:
            q, e = q.to(tl.float32), e.to(tl.float32)
        else:
            e = e.to(q.dtype)  # int8, which bfloat16 holds exactly
        products = tl.dot(q, e, products, input_precision=PRECISION)
    return products


@triton.jit
def tile_of_scores(
    products,  # [BLOCK_M, BLOCK_N], the scales of the rows included
    bias,  # [BLOCK_N], in units of log 2
    magnitude,  # [BLOCK_M] pointers
    max_score,  # [BLOCK_M] pointers; anything without LIMITED
    row_labels,  # [BLOCK_M] pointers; anything without LABELLED
    of_slots,  # [BLOCK_N] labels; anything without LABELLED
    LIMITED: tl.constexpr,
    LABELLED: tl.constexpr,
):  # pragma: no cover - compiled, or run by the interpreter in another process
    """[BLOCK_M, BLOCK_N] scores in units of log 2, -inf above the limit and where the labels are equal."""
    similarity = products * (tl.load(magnitude) * LOG2_E)[:, None]
    scores = similarity + bias[None, :]
    if LIMITED:
        scores = tl.where(similarity > (tl.load(max_score) * LOG2_E)[:, None], float("-inf"), scores)
    if LABELLED:
        scores = tl.where(tl.load(row_labels)[:, None] == of_slots[None, :], float("-inf"), scores)
    return scores
