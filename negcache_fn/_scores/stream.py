"""The passes over the scores of a batch against the cache, without the [B, C] matrix of them.

A `ScoreMatrix` is read in two ways only: reduced block by block in one streaming pass (`reduce_blocks`, and
`cache_logsumexp` with a gradient), or scored again in a few chosen blocks (`score_blocks`). Each is a custom operator,
opaque to the compiler; with a transform, which an operator cannot take, the same Python code runs inline.

A block is `BLOCK` consecutive slots. The last one is filled up with slots of score -inf.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType] - untyped in torch

from negcache_fn._kernels import dispatch
from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._scores.definition import ScoreMatrix, full_precision

__all__ = ["cache_logsumexp", "logsumexp", "reduce_blocks", "score_blocks"]

_CHUNK = 2048  # slots scored at a time; a multiple of BLOCK
_GATHER_BYTES = 2**23
_INFINITY = float("inf")


def reduce_blocks(matrix: ScoreMatrix, by: str) -> Tensor:
    """[B, ceil(C / BLOCK)]: the "logsumexp" or "max" of every block of scores, in one streaming pass."""
    if matrix.transform is not None:
        return _reduce_blocks(matrix, by)
    return cast(Tensor, _reduce_blocks_op(*matrix.problem, by))


def score_blocks(matrix: ScoreMatrix, blocks: Tensor) -> Tensor:
    """[B, m, BLOCK]: the scores in the blocks [B, m] chosen for each query, see `ScoreMatrix.scores_at`."""
    if matrix.transform is not None:
        return _score_blocks(matrix, blocks)
    return cast(Tensor, _score_blocks_op(*matrix.problem, blocks))


def cache_logsumexp(matrix: ScoreMatrix) -> Tensor:
    """[B]: log-sum-exp of every row. Differentiable in the queries by recomputation: memory stays O(B * chunk)."""
    if matrix.transform is None:
        return cast(Tensor, _cache_logsumexp_op(*matrix.problem))

    def chunk_logsumexp(start: int, *fields: Any) -> Tensor:
        return logsumexp(_chunk(ScoreMatrix(*fields), start).scores())

    parts = [
        cast(Tensor, checkpoint(chunk_logsumexp, start, *matrix, use_reentrant=False))
        for start in range(0, matrix.embeddings.shape[0], _CHUNK)
    ]
    return logsumexp(torch.stack(parts, dim=-1))


def logsumexp(values: Tensor) -> Tensor:
    """[..., n] -> [...]: log-sum-exp whose gradient is 0, not NaN, where every value is -inf."""
    empty = (values == -_INFINITY).all(-1)
    return values.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, -_INFINITY)


def _chunk(matrix: ScoreMatrix, start: int) -> ScoreMatrix:
    return matrix.of_slots(start, start + _CHUNK)


def _reduce_blocks(matrix: ScoreMatrix, by: str) -> Tensor:
    parts: list[Tensor] = []
    for start in range(0, matrix.embeddings.shape[0], _CHUNK):
        blocks = _chunk(matrix, start).scores()
        blocks = blocks.view(blocks.shape[0], -1, BLOCK)
        parts.append(blocks.amax(-1) if by == "max" else blocks.logsumexp(-1))
    return torch.cat(parts, dim=1)


def _score_blocks(matrix: ScoreMatrix, blocks: Tensor) -> Tensor:
    dim = matrix.embeddings.shape[1]
    rows = torch.arange(blocks.shape[0], device=blocks.device).repeat_interleave(blocks.shape[1])
    within = torch.arange(BLOCK, device=blocks.device)
    # The gather is done in slabs of bounded size.
    slab = max(1, _GATHER_BYTES // (BLOCK * dim * matrix.queries.element_size()))
    parts = [
        matrix.scores_at(row, block[:, None] * BLOCK + within)
        for row, block in zip(torch.split(rows, slab), torch.split(blocks.flatten(), slab), strict=True)
    ]
    return torch.cat(parts).view(*blocks.shape, BLOCK)


def _block_logsumexp(problem: dispatch.Problem) -> Tensor:
    found = dispatch.block_logsumexp(problem)
    return _reduce_blocks(ScoreMatrix(*problem, None), "logsumexp") if found is None else found


@torch.library.custom_op("negcache_fn::reduce_blocks", mutates_args=())
def _reduce_blocks_op(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None, by: str
) -> Tensor:
    problem = dispatch.Problem(queries, embeddings, bias, excluded, max_score)
    return _block_logsumexp(problem) if by == "logsumexp" else _reduce_blocks(ScoreMatrix(*problem, None), by)


@_reduce_blocks_op.register_fake
def _(queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None, by: str) -> Tensor:
    return queries.new_empty(queries.shape[0], -(-embeddings.shape[0] // BLOCK))


@torch.library.custom_op("negcache_fn::score_blocks", mutates_args=())
def _score_blocks_op(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None, blocks: Tensor
) -> Tensor:
    problem = dispatch.Problem(queries, embeddings, bias, excluded, max_score)
    found = dispatch.score_blocks(problem, blocks)
    return _score_blocks(ScoreMatrix(*problem, None), blocks) if found is None else found


@_score_blocks_op.register_fake
def _(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None, blocks: Tensor
) -> Tensor:
    return queries.new_empty(*blocks.shape, BLOCK)


@torch.library.custom_op("negcache_fn::cache_logsumexp", mutates_args=())
def _cache_logsumexp_op(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None
) -> Tensor:
    return _block_logsumexp(dispatch.Problem(queries, embeddings, bias, excluded, max_score)).logsumexp(1)


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
    # The scores of an empty row are -inf, so any finite stand-in gives them probability 0.
    normalizer = torch.where(logsumexp > -_INFINITY, logsumexp, 0.0)[:, None]
    total = torch.zeros_like(queries)
    matrix = ScoreMatrix(queries, embeddings, bias, excluded, max_score, None)
    # `backward` may be called under autocast; scores in half precision would be far off.
    with full_precision(queries):
        for start in range(0, embeddings.shape[0], _CHUNK):
            chunk = _chunk(matrix, start)
            scores = chunk.scores()[:, : chunk.bias.shape[0]]
            total.add_(chunk.pull_back((scores - normalizer).exp_().mul_(gradient[:, None])))
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
