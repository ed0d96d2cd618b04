"""The passes over the scores of a batch against the cache, without the [B, C] matrix of them.

`ScoreMatrix` defines that matrix; it is read in two ways only: reduced block by block in one streaming pass
(`reduce_blocks`, and `cache_logsumexp` with a gradient), or rescored in a few chosen blocks (`score_blocks`). Each is a
custom operator, opaque to the compiler; with a `score_transform`, which an operator cannot take, the same Python code
runs inline.

A block is `BLOCK` consecutive slots. The last one is filled up with slots of score -inf.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType] - untyped in torch

from negcache_fn._kernels import dispatch
from negcache_fn._kernels.blocks import BLOCK

__all__ = [
    "BLOCK",
    "ScoreMatrix",
    "ScoreTransform",
    "cache_logsumexp",
    "full_precision",
    "logsumexp",
    "reduce_blocks",
    "score_blocks",
]

_CHUNK = 2048  # slots scored at a time; a multiple of BLOCK
_GATHER_BYTES = 2**23
_INFINITY = float("inf")

ScoreTransform = Callable[[Tensor], Tensor]


class ScoreMatrix(NamedTuple):
    """`scores[i, j] = transform(queries[i] . embeddings[j]) + bias[j]`.

    -inf where `j` is in `excluded[i]`, or the transformed product is above `max_score[i]`.
    """

    queries: Tensor  # [B, D] float32 or float64, the scale folded in
    embeddings: Tensor  # [C, D], storage dtype
    bias: Tensor  # [C], dtype of the queries: log-weight, -inf at empty slots and at those excluded for all
    excluded: Tensor  # [B, P] int64 slots, -1: none; P may be 0
    max_score: Tensor | None  # [B], dtype of the queries; None: no limit
    transform: ScoreTransform | None

    def of(self, rows: Tensor) -> "ScoreMatrix":
        """The rows [M] alone."""
        limit = None if self.max_score is None else self.max_score[rows]
        return self._replace(queries=self.queries[rows], excluded=self.excluded[rows], max_score=limit)


def reduce_blocks(matrix: ScoreMatrix, reduction: str) -> Tensor:
    """[B, ceil(C / BLOCK)]: the "logsumexp" or "max" of every block of scores, in one streaming pass."""
    if matrix.transform is not None:
        return _reduce_blocks(matrix, reduction)
    return cast(Tensor, _reduce_blocks_op(*matrix[:5], reduction))


def score_blocks(matrix: ScoreMatrix, blocks: Tensor) -> Tensor:
    """[B, m, BLOCK]: the scores in the blocks [B, m] chosen for each query.

    The lowest score of a block is never above `max_score`: a block that was chosen has something to draw, even where
    rounding here differs from that of the pass that chose it.
    """
    if matrix.transform is not None:
        return _score_blocks(matrix, blocks)
    return cast(Tensor, _score_blocks_op(*matrix[:5], blocks))


def cache_logsumexp(matrix: ScoreMatrix) -> Tensor:
    """[B]: log-sum-exp of every row. Differentiable in the queries by recomputation: memory stays O(B * chunk)."""
    if matrix.transform is None:
        return cast(Tensor, _cache_logsumexp_op(*matrix[:5]))

    def chunk_logsumexp(start: int, *fields: Any) -> Tensor:
        return logsumexp(_chunk_scores(ScoreMatrix(*fields), start))

    parts = [
        cast(Tensor, checkpoint(chunk_logsumexp, start, *matrix, use_reentrant=False))
        for start in range(0, matrix.embeddings.shape[0], _CHUNK)
    ]
    return logsumexp(torch.stack(parts, dim=-1))


def logsumexp(values: Tensor) -> Tensor:
    """[..., n] -> [...]: log-sum-exp whose gradient is 0, not NaN, where every value is -inf."""
    empty = (values == -_INFINITY).all(-1)
    return values.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, -_INFINITY)


def full_precision(like: Tensor) -> torch.autocast:
    """A context without autocast: scores are accumulated in float32 or wider whatever surrounds the call."""
    return torch.autocast(like.device.type, enabled=False)


def _transformed(products: Tensor, transform: ScoreTransform | None) -> Tensor:
    return products if transform is None else transform(products)


def _chunk_scores(matrix: ScoreMatrix, start: int) -> Tensor:
    """Scores of the slots `start ... start + _CHUNK - 1`, [B, a multiple of BLOCK], filled up with -inf."""
    queries, embeddings, bias, excluded, max_score, transform = matrix
    rows, bias = embeddings[start : start + _CHUNK].to(queries.dtype), bias[start : start + _CHUNK]
    if transform is None and max_score is None:
        scores = torch.addmm(bias, queries, rows.T)
    else:
        products = _transformed(queries @ rows.T, transform)
        scores = products + bias
        if max_score is not None:
            scores = scores.masked_fill(products > max_score[:, None], -_INFINITY)
    width = scores.shape[1]
    if width % BLOCK:
        scores = pad(scores, (0, -width % BLOCK), value=-_INFINITY)
    if excluded.shape[1]:
        column = excluded - start
        here = (column >= 0) & (column < width)
        ceiling = torch.where(here, -_INFINITY, _INFINITY).to(scores.dtype)
        scores = scores.scatter_reduce(1, column.clamp(0, width - 1), ceiling, "amin")
    return scores


def _reduce_blocks(matrix: ScoreMatrix, reduction: str) -> Tensor:
    parts: list[Tensor] = []
    for start in range(0, matrix.embeddings.shape[0], _CHUNK):
        blocks = _chunk_scores(matrix, start)
        blocks = blocks.view(blocks.shape[0], -1, BLOCK)
        parts.append(blocks.amax(-1) if reduction == "max" else blocks.logsumexp(-1))
    return torch.cat(parts, dim=1)


def _score_blocks(matrix: ScoreMatrix, blocks: Tensor) -> Tensor:
    queries, embeddings, bias, excluded, max_score, transform = matrix
    capacity, dim = embeddings.shape
    rows = torch.arange(blocks.shape[0], device=blocks.device).repeat_interleave(blocks.shape[1])
    within = torch.arange(BLOCK, device=blocks.device)
    # The gather is done in slabs of bounded size.
    slab = max(1, _GATHER_BYTES // (BLOCK * dim * queries.element_size()))
    parts: list[Tensor] = []
    for row, block in zip(torch.split(rows, slab), torch.split(blocks.flatten(), slab), strict=True):
        slots = block[:, None] * BLOCK + within
        outside = slots >= capacity
        slots = slots.clamp(max=capacity - 1)
        products = torch.bmm(embeddings[slots].to(queries.dtype), queries[row, :, None]).squeeze(-1)
        products = _transformed(products, transform)
        outside |= (slots[:, :, None] == excluded[row, None, :]).any(-1)
        scores = (products + bias[slots]).masked_fill(outside, -_INFINITY)
        if max_score is not None:
            lowest = products.masked_fill(scores == -_INFINITY, _INFINITY).amin(-1)
            scores = scores.masked_fill(products > torch.maximum(max_score[row], lowest)[:, None], -_INFINITY)
        parts.append(scores)
    return torch.cat(parts).view(*blocks.shape, BLOCK)


def _block_logsumexp(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None
) -> Tensor:
    found = dispatch.block_logsumexp(dispatch.Problem(queries, embeddings, bias, excluded, max_score))
    if found is not None:
        return found
    return _reduce_blocks(ScoreMatrix(queries, embeddings, bias, excluded, max_score, None), "logsumexp")


@torch.library.custom_op("negcache_fn::reduce_blocks", mutates_args=())
def _reduce_blocks_op(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None, reduction: str
) -> Tensor:
    if reduction == "logsumexp":
        return _block_logsumexp(queries, embeddings, bias, excluded, max_score)
    return _reduce_blocks(ScoreMatrix(queries, embeddings, bias, excluded, max_score, None), reduction)


@_reduce_blocks_op.register_fake
def _(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None, reduction: str
) -> Tensor:
    return queries.new_empty(queries.shape[0], -(-embeddings.shape[0] // BLOCK))


@torch.library.custom_op("negcache_fn::score_blocks", mutates_args=())
def _score_blocks_op(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None, blocks: Tensor
) -> Tensor:
    found = dispatch.score_blocks(dispatch.Problem(queries, embeddings, bias, excluded, max_score), blocks)
    if found is not None:
        return found
    return _score_blocks(ScoreMatrix(queries, embeddings, bias, excluded, max_score, None), blocks)


@_score_blocks_op.register_fake
def _(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None, blocks: Tensor
) -> Tensor:
    return queries.new_empty(*blocks.shape, BLOCK)


@torch.library.custom_op("negcache_fn::cache_logsumexp", mutates_args=())
def _cache_logsumexp_op(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None
) -> Tensor:
    return _block_logsumexp(queries, embeddings, bias, excluded, max_score).logsumexp(1)


@_cache_logsumexp_op.register_fake
def _(queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None) -> Tensor:
    return queries.new_empty(queries.shape[0])


@torch.library.custom_op("negcache_fn::cache_logsumexp_backward", mutates_args=())
def _cache_logsumexp_backward_op(
    gradient: Tensor,
    logsumexp: Tensor,
    queries: Tensor,
    embeddings: Tensor,
    bias: Tensor,
    excluded: Tensor,
    max_score: Tensor | None,
) -> Tensor:
    # Of an empty row nothing is taken: its scores are -inf, so that any finite stand-in gives probability 0.
    normalizer = torch.where(logsumexp > -_INFINITY, logsumexp, 0.0)[:, None]
    total = torch.zeros_like(queries)
    matrix = ScoreMatrix(queries, embeddings, bias, excluded, max_score, None)
    # `backward` may be called where autocast is on; scores in half precision would be wrong by more than they are.
    with full_precision(queries):
        for start in range(0, embeddings.shape[0], _CHUNK):
            rows = embeddings[start : start + _CHUNK].to(queries.dtype)
            scores = _chunk_scores(matrix, start)[:, : rows.shape[0]]
            total.addmm_((scores - normalizer).exp_().mul_(gradient[:, None]), rows)
    return total


@_cache_logsumexp_backward_op.register_fake
def _(
    gradient: Tensor,
    logsumexp: Tensor,
    queries: Tensor,
    embeddings: Tensor,
    bias: Tensor,
    excluded: Tensor,
    max_score: Tensor | None,
) -> Tensor:
    return torch.empty_like(queries)


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor | None, ...], output: Tensor
) -> None:
    ctx.save_for_backward(output, *inputs)  # pyright: ignore[reportArgumentType] - None is one of them


def _cache_logsumexp_gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    saved = cast("tuple[Tensor | None, ...]", ctx.saved_tensors)  # pyright: ignore[reportAttributeAccessIssue] - undeclared
    return cast(Tensor, _cache_logsumexp_backward_op(gradient.contiguous(), *saved)), None, None, None, None


_cache_logsumexp_op.register_autograd(_cache_logsumexp_gradient, setup_context=_save_for_backward)
