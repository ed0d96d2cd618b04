"""The passes over the scores of a batch against the cache, without the [B, C] matrix of them.

A `ScoreMatrix` is read in two ways only: reduced block by block in one streaming pass (`reduce_blocks`, and `summarize`
with a gradient), or scored again in a few chosen blocks (`score_blocks`, and `slot_masses` in `masses.py`). Each is a
custom operator, opaque to the compiler; with a transform, which an operator cannot take, the same Python code runs
inline.

A block is `BLOCK` consecutive slots. The last one is filled up with slots of score -inf.

The gradient of a row's log-sum-exp in its query is the mean of the embeddings under the row's softmax, which the same
pass accumulates as attention does (keys and values being the embeddings): relative to the largest score so far. So the
backward pass reads [B, D] numbers, not the cache.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType] - untyped in torch

from negcache_fn._kernels import dispatch
from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.problem import SCHEMA
from negcache_fn._operators import operator
from negcache_fn._scores.definition import ScoreMatrix

__all__ = [
    "Summary",
    "blocks_and_mean",
    "in_stretches",
    "logsumexp",
    "reduce_blocks",
    "score_blocks",
    "summarize",
]

_CHUNK = 2048  # slots scored at a time; a multiple of BLOCK
_CHUNKS_IN_GRAPH = 4  # at a time in a graph, which has a part for each time
_GATHER_BYTES = 2**23
_INFINITY = float("inf")
# Of a row's weights, whose sum is at least 1: smaller ones are zeros. A CPU takes up to a hundred times as long for
# numbers at the end of float32's range as for others.
_NOTHING = 1e-25
_LEAST_EXPONENT = -80.0  # whose exponential is less, and not at that end


def reduce_blocks(matrix: ScoreMatrix, by: str) -> Tensor:
    """[B, ceil(C / BLOCK)]: the "logsumexp" or "max" of every block of scores, in one streaming pass."""
    if matrix.transform is not None:
        return _reduce_blocks(matrix, by)
    return _reduce_blocks_op(*matrix.problem, by)


def score_blocks(matrix: ScoreMatrix, blocks: Tensor) -> Tensor:
    """[B, m, BLOCK]: the scores in the blocks [B, m] chosen for each query, see `ScoreMatrix.scores_at`."""
    if matrix.transform is not None:
        return _score_blocks(matrix, blocks)
    return _score_blocks_op(*matrix.problem, blocks)


class Summary(NamedTuple):
    """The result of a pass over the scores."""

    stretches: Tensor  # [B, ceil(C / length)] log-sum-exp of every stretch of scores; without a gradient
    log_normalizer: Tensor  # [B] log-sum-exp of every row; differentiable in the queries


def summarize(matrix: ScoreMatrix, length: int = BLOCK) -> Summary:
    """`scores.view(B, -1, length).logsumexp(-1)` and `scores.logsumexp(-1)`, in one streaming pass.

    The length is a multiple of `BLOCK`, and the last stretch is filled up like the last block. A row without a finite
    score has -inf and the gradient 0. The gradient is computed with the value if there may be one, in memory O(B * D).
    """
    wanted = torch.is_grad_enabled() and matrix.queries.requires_grad
    if matrix.transform is None:
        stretches, log_normalizer, _ = _summarize_op(*matrix.problem, length, wanted)
    elif wanted:
        blocks, log_normalizer = _summarize_transformed(matrix)
        stretches = in_stretches(blocks, length)
    else:
        blocks = _reduce_blocks(matrix, "logsumexp")
        stretches, log_normalizer = in_stretches(blocks, length), blocks.logsumexp(-1)
    return Summary(stretches.detach(), log_normalizer)


def in_stretches(blocks: Tensor, length: int) -> Tensor:
    """[B, ceil(C / length)] from the log-sum-exp of the blocks."""
    if length == BLOCK:
        return blocks
    if missing := -blocks.shape[1] % (length // BLOCK):
        blocks = pad(blocks, (0, missing), value=-_INFINITY)
    return blocks.view(blocks.shape[0], -1, length // BLOCK).logsumexp(-1)


def logsumexp(values: Tensor) -> Tensor:
    """[..., n] -> [...]: log-sum-exp whose gradient is 0, not NaN, where every value is -inf."""
    empty = (values == -_INFINITY).all(-1)
    return values.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, -_INFINITY)


def _chunks(matrix: ScoreMatrix) -> list[tuple[int, int]]:
    """First and last slot (exclusive) of the columns that are scored at a time."""
    size = _CHUNK * _CHUNKS_IN_GRAPH if torch.compiler.is_compiling() else _CHUNK
    return [(start, start + size) for start in range(0, matrix.embeddings.shape[0], size)]


def _reduce_blocks(matrix: ScoreMatrix, by: str) -> Tensor:
    parts: list[Tensor] = []
    for chunk in _chunks(matrix):
        blocks = matrix.of_slots(*chunk).scores()
        blocks = blocks.view(blocks.shape[0], -1, BLOCK)
        parts.append(blocks.amax(-1) if by == "max" else blocks.logsumexp(-1))
    return torch.cat(parts, dim=1)


def _summarize_transformed(matrix: ScoreMatrix) -> tuple[Tensor, Tensor]:
    """Recomputes in the backward pass, as a transform may have parameters, whose gradients are exact too."""

    def summarize_chunk(chunk: tuple[int, int], *fields: Any) -> tuple[Tensor, Tensor]:
        scores = ScoreMatrix(*fields).of_slots(*chunk).scores()
        # Not the log-sum-exp of the blocks: of padded scores, Inductor gets the gradient of that wrong.
        return scores.detach().view(scores.shape[0], -1, BLOCK).logsumexp(-1), logsumexp(scores)

    parts = [
        cast("tuple[Tensor, Tensor]", checkpoint(summarize_chunk, chunk, *matrix, use_reentrant=False))
        for chunk in _chunks(matrix)
    ]
    blocks, log_normalizers = zip(*parts, strict=True)
    return torch.cat(blocks, dim=1), logsumexp(torch.stack(log_normalizers, dim=-1))


def blocks_and_mean(matrix: ScoreMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """The log-sum-exp [B, ceil(C / BLOCK)] of the blocks and [B] of the rows, and the latter's gradient [B, D].

    Itself not differentiable. A transform's parameters, if it has any, are constants.
    """
    found = dispatch.blocks_and_sums(matrix.problem) if matrix.transform is None else None
    blocks, total, log_scale = _blocks_and_sums(matrix) if found is None else found
    log_normalizer = _logsumexp_of_rows(blocks) if matrix.transform is None else blocks.logsumexp(1)
    empty = log_normalizer == -_INFINITY
    return blocks, log_normalizer, total.mul_((log_scale - log_normalizer).masked_fill_(empty, 0.0).exp_()[:, None])


def _blocks_and_sums(matrix: ScoreMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """See `dispatch.blocks_and_sums`; with a transform the sums are of its derivatives times the embeddings."""
    parts: list[Tensor] = []
    total = torch.zeros_like(matrix.queries)
    log_scale = torch.full_like(total[:, 0], -_INFINITY)
    for first, end in _chunks(matrix):
        chunk = matrix.of_slots(first, end)
        scores = chunk.scores()
        parts.append(scores.view(scores.shape[0], -1, BLOCK).logsumexp(-1))
        larger = torch.maximum(log_scale, parts[-1].amax(-1))
        # While a row is empty, any finite stand-in gives its slots the weight 0.
        shift = larger.masked_fill(larger == -_INFINITY, 0.0)
        exponents = (scores[:, : chunk.bias.shape[0]] - shift[:, None]).clamp_(min=_LEAST_EXPONENT)
        weights = torch.threshold_(exponents.exp_(), _NOTHING, 0.0)
        if chunk.transform is not None:
            weights.mul_(chunk.slopes())
        total.mul_((log_scale - shift).exp_()[:, None]).add_(chunk.pull_back(weights))
        log_scale = larger
    return torch.cat(parts, dim=1), total, log_scale


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


def _logsumexp_of_rows(blocks: Tensor) -> Tensor:
    """In an operator: kernels cannot be traced."""
    found = dispatch.logsumexp(blocks)
    return blocks.logsumexp(1) if found is None else found


def _block_logsumexp(problem: dispatch.Problem) -> Tensor:
    found = dispatch.block_logsumexp(problem)
    return _reduce_blocks(ScoreMatrix.of(problem), "logsumexp") if found is None else found


def _fake_blocks(*arguments: Any) -> Tensor:
    queries, embeddings = arguments[:2]
    return queries.new_empty(queries.shape[0], -(-embeddings.shape[0] // BLOCK))


@operator("reduce_blocks", fake=_fake_blocks, schema=f"({SCHEMA}, str by) -> Tensor")
def _reduce_blocks_op(*arguments: Any) -> Tensor:
    *problem, by = arguments
    problem = dispatch.Problem(*problem)
    return _block_logsumexp(problem) if by == "logsumexp" else _reduce_blocks(ScoreMatrix.of(problem), by)


def _fake_scores(*arguments: Any) -> Tensor:
    return arguments[0].new_empty(*arguments[-1].shape, BLOCK)


@operator("score_blocks", fake=_fake_scores, schema=f"({SCHEMA}, Tensor blocks) -> Tensor")
def _score_blocks_op(*arguments: Any) -> Tensor:
    *problem, blocks = arguments
    problem = dispatch.Problem(*problem)
    found = dispatch.score_blocks(problem, blocks)
    return _score_blocks(ScoreMatrix.of(problem), blocks) if found is None else found


def _fake_summary(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    queries, embeddings, *_, length, differentiable = arguments
    rows, dim = queries.shape
    stretches = queries.new_empty(rows, -(-embeddings.shape[0] // length))
    return stretches, queries.new_empty(rows), queries.new_empty(rows if differentiable else 0, dim)


def _save_mean(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _gradient(
    ctx: torch.autograd.function.FunctionCtx,
    of_stretches: Tensor | None,
    gradient: Tensor | None,
    of_mean: Tensor | None,
) -> tuple[Tensor | None, ...]:
    if of_stretches is not None or of_mean is not None:
        raise NotImplementedError("the log-sum-exp of the cache is differentiable once only")
    (mean,) = cast("tuple[Tensor]", ctx.saved_tensors)  # pyright: ignore[reportAttributeAccessIssue] - undeclared
    return None if gradient is None else gradient[:, None] * mean, *(None for _ in range(9))


@operator(
    "summarize",
    fake=_fake_summary,
    schema=f"({SCHEMA}, SymInt length, bool differentiable) -> (Tensor, Tensor, Tensor)",
    gradient=_gradient,
    keep=_save_mean,
)
def _summarize_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The stretches, the normalisers and, if they are to be differentiable, their gradient [B, D], else [0, D]."""
    *problem, length, differentiable = arguments
    problem = dispatch.Problem(*problem)
    if differentiable:
        blocks, log_normalizer, mean = blocks_and_mean(ScoreMatrix.of(problem))
    else:
        blocks = _block_logsumexp(problem)
        log_normalizer, mean = _logsumexp_of_rows(blocks), torch.empty_like(problem.queries[:0])
    return in_stretches(blocks, length), log_normalizer, mean
