"""Scores of a batch of queries against the cache, without the [B, C] matrix of them.

The matrix is *defined* by `ScoreMatrix` (and written out by `score`, the readable definition that tests compare with)
and only ever read in two ways: reduced block by block in one streaming pass (`reduce_blocks`), or rescored in a few
chosen blocks (`score_blocks`). Both are custom operators, opaque to the compiler; with a `score_transform`, which an
operator cannot take, the same Python code runs inline.

A block is `BLOCK` consecutive slots. The last one is filled up with slots of score -inf.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from negcache_fn.checks import check_embeddings, check_ids, check_scale, check_size, check_state
from negcache_fn.state import live, stored

__all__ = [
    "BLOCK",
    "ScoreMatrix",
    "ScoreTransform",
    "cache_logsumexp",
    "find_slots",
    "hardest",
    "logsumexp",
    "reduce_blocks",
    "score",
    "score_blocks",
    "score_matrix",
    "top_negatives",
]

BLOCK = 64
_CHUNK = 2048
_GATHER_BYTES = 2**23
_INFINITY = float("inf")

ScoreTransform = Callable[[Tensor], Tensor]


class ScoreMatrix(NamedTuple):
    """`scores[i, j] = transform(queries[i] . embeddings[j]) + bias[j]`, -inf where `j` is in `excluded[i]`."""

    queries: Tensor  # [B, D] float32 or float64, the scale folded in
    embeddings: Tensor  # [C, D], storage dtype
    bias: Tensor  # [C], dtype of the queries: log-weight, -inf at empty slots and at those excluded for all
    excluded: Tensor  # [B, P] int64 slots, -1: none; P may be 0
    transform: ScoreTransform | None


def score(
    state: TensorDictBase,
    queries: Tensor,
    *,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
) -> Tensor:
    """All scores: `transform(scale * queries @ embeddings.T) + log_weight`, -inf at empty slots.

    This is the readable definition; it materialises [B, C] and nothing else in this package calls it.

    Args:
        state: the cache.
        queries: [B, D] floating.
        scale: number or 0-d tensor (inverse temperature, beta).
        score_transform: elementwise function of the scaled inner products.

    Returns:
        [B, C], float32 or wider. Differentiable in `queries` and `scale`.

    Raises:
        ValueError, TypeError: `queries` that are not [B, D] floating on the device of the state; a scale that is no
            scalar.

    Example:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> score(state, torch.ones(2, 4)).shape
        torch.Size([2, 8])
    """
    matrix = score_matrix(state, queries, scale=scale, score_transform=score_transform)
    with torch.autocast(queries.device.type, enabled=False):
        return (
            _transformed(matrix.queries @ matrix.embeddings.to(matrix.queries.dtype).T, score_transform) + matrix.bias
        )


def top_negatives(
    state: TensorDictBase,
    queries: Tensor,
    n: int,
    *,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    exclude_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `n` cached documents of highest score of every query: exact, streaming, ties by slot.

    Args:
        state: the cache.
        queries: [B, D] floating.
        n: how many, at most the capacity.
        scale: number or 0-d tensor.
        score_transform: elementwise function of the scaled inner products.
        exclude_ids: int64 ids of documents to leave out, [P] for all queries or [B, P] for each; -1 means none.

    Returns:
        Scores [B, n] in descending order, without gradient, and slots [B, n] int64; (-inf, -1) where there are fewer.

    Raises:
        ValueError, TypeError: as `score`; `n` not in 1 ... C; `exclude_ids` of another shape or dtype.

    Example:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> scores, slots = top_negatives(state, torch.ones(2, 4), 3)
        >>> scores.shape, slots[0]
        (torch.Size([2, 3]), tensor([-1, -1, -1]))
    """
    with torch.no_grad():  # mining is a look-up
        matrix = score_matrix(state, queries, scale=scale, score_transform=score_transform, exclude_ids=exclude_ids)
        check_size("n", n, most=matrix.embeddings.shape[0])
        return hardest(matrix, n)


def score_matrix(
    state: TensorDictBase,
    queries: Tensor,
    *,
    scale: float | Tensor,
    score_transform: ScoreTransform | None,
    exclude_ids: Tensor | None = None,
) -> ScoreMatrix:
    """The (unevaluated) scores of `queries` against the cache, after the checks that all readers of it share."""
    check_state(state)
    embeddings = stored(state, "embedding")
    check_embeddings("queries", queries, embeddings)
    check_scale(scale, queries.device)
    rows = queries.shape[0]
    excluded = torch.empty((rows, 0), dtype=torch.int64, device=queries.device)
    kept = live(state)
    if exclude_ids is not None:
        check_ids("exclude_ids", exclude_ids, queries)
        if exclude_ids.shape[-1] == 0:
            pass
        elif exclude_ids.ndim == 1:
            kept = kept & ~_look_up(state, exclude_ids)[1]
        else:
            excluded = find_slots(state, exclude_ids)
    dtype = torch.promote_types(torch.promote_types(queries.dtype, embeddings.dtype), torch.float32)
    bias = stored(state, "log_weight").to(dtype).masked_fill(~kept, -_INFINITY)
    return ScoreMatrix(queries.to(dtype) * scale, embeddings, bias, excluded, score_transform)


def find_slots(state: TensorDictBase, ids: Tensor) -> Tensor:
    """The live slot of each id, -1 where the cache does not have it or the id is negative; the shape of `ids`."""
    ordered = ids.flatten().sort().values
    place, hit = _look_up(state, ordered)
    slots = torch.arange(hit.shape[0], device=ids.device).masked_fill(~hit, -1)
    found = torch.full_like(ordered, -1).scatter_reduce(0, place, slots, "amax")
    return found[torch.searchsorted(ordered, ids)].masked_fill(ids < 0, -1)


def hardest(matrix: ScoreMatrix, n: int) -> tuple[Tensor, Tensor]:
    """The `n` highest scores of each row and their slots, by (score descending, slot ascending); (-inf, -1) if fewer.

    The `n` blocks of largest maximum, ties by block, hold them all: a block outside is preceded by `n` others, each of
    which has an element that precedes every element of it.
    """
    maxima = reduce_blocks(matrix, "max")
    blocks = _stable_top(maxima, min(n, maxima.shape[1]))[1].sort(dim=1).values
    scores, places = _stable_top(score_blocks(matrix, blocks).flatten(1), n)
    slots = blocks.gather(1, places // BLOCK) * BLOCK + places % BLOCK
    return scores, slots.masked_fill(scores == -_INFINITY, -1)


def reduce_blocks(matrix: ScoreMatrix, reduction: str) -> Tensor:
    """[B, ceil(C / BLOCK)]: the "logsumexp" or "max" of every block of scores, in one streaming pass."""
    if matrix.transform is not None:
        return _reduce_blocks(*matrix, reduction)
    return cast(Tensor, _reduce_blocks_op(*matrix[:4], reduction))


def score_blocks(matrix: ScoreMatrix, blocks: Tensor) -> Tensor:
    """[B, m, BLOCK]: the scores in the blocks [B, m] chosen for each query."""
    if matrix.transform is not None:
        return _score_blocks(*matrix, blocks)
    return cast(Tensor, _score_blocks_op(*matrix[:4], blocks))


def cache_logsumexp(matrix: ScoreMatrix) -> Tensor:
    """[B]: log-sum-exp of every row. Differentiable in the queries by recomputation: memory stays O(B * chunk)."""
    if matrix.transform is None:
        return cast(Tensor, _cache_logsumexp_op(*matrix[:4]))
    parts = [
        cast(Tensor, checkpoint(_chunk_logsumexp, *matrix, start, use_reentrant=False))
        for start in range(0, matrix.embeddings.shape[0], _CHUNK)
    ]
    return logsumexp(torch.stack(parts, dim=-1))


def logsumexp(values: Tensor) -> Tensor:
    """[..., n] -> [...]: log-sum-exp whose gradient is 0, not NaN, where every value is -inf."""
    empty = (values == -_INFINITY).all(-1)
    return values.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, -_INFINITY)


def _look_up(state: TensorDictBase, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[C] for every slot: the place of its id among the sorted `ids` [P], and whether it is there and live."""
    known = stored(state, "id")
    # Sort the few ids, not the cache.
    ordered = ids.sort().values
    place = torch.searchsorted(ordered, known).clamp(max=ordered.shape[0] - 1)
    return place, (ordered[place] == known) & (known >= 0) & live(state)


def _transformed(products: Tensor, transform: ScoreTransform | None) -> Tensor:
    return products if transform is None else transform(products)


def _stable_top(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    ordered, places = values.sort(dim=1, descending=True, stable=True)
    return ordered[:, :n], places[:, :n]


def _chunk_scores(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, transform: ScoreTransform | None, start: int
) -> Tensor:
    """Scores of the slots `start ... start + _CHUNK - 1`, [B, a multiple of BLOCK], filled up with -inf."""
    rows = embeddings[start : start + _CHUNK].to(queries.dtype)
    if transform is None:
        scores = torch.addmm(bias[start : start + _CHUNK], queries, rows.T)
    else:
        scores = transform(queries @ rows.T) + bias[start : start + _CHUNK]
    width = scores.shape[1]
    if width % BLOCK:
        scores = pad(scores, (0, -width % BLOCK), value=-_INFINITY)
    if excluded.shape[1]:
        column = excluded - start
        here = (column >= 0) & (column < width)
        ceiling = torch.where(here, -_INFINITY, _INFINITY).to(scores.dtype)
        scores = scores.scatter_reduce(1, column.clamp(0, width - 1), ceiling, "amin")
    return scores


def _reduce_blocks(
    queries: Tensor,
    embeddings: Tensor,
    bias: Tensor,
    excluded: Tensor,
    transform: ScoreTransform | None,
    reduction: str,
) -> Tensor:
    parts: list[Tensor] = []
    for start in range(0, embeddings.shape[0], _CHUNK):
        blocks = _chunk_scores(queries, embeddings, bias, excluded, transform, start).unflatten(1, (-1, BLOCK))
        parts.append(blocks.amax(-1) if reduction == "max" else blocks.logsumexp(-1))
    return torch.cat(parts, dim=1)


def _score_blocks(
    queries: Tensor,
    embeddings: Tensor,
    bias: Tensor,
    excluded: Tensor,
    transform: ScoreTransform | None,
    blocks: Tensor,
) -> Tensor:
    capacity, dim = embeddings.shape
    rows = torch.arange(blocks.shape[0], device=blocks.device).repeat_interleave(blocks.shape[1])
    within = torch.arange(BLOCK, device=blocks.device)
    # The gather is done in slabs of bounded size.
    slab = max(1, _GATHER_BYTES // (BLOCK * dim * queries.element_size()))
    parts: list[Tensor] = []
    for row, block in zip(rows.split(slab), blocks.flatten().split(slab), strict=True):
        slots = block[:, None] * BLOCK + within
        outside = slots >= capacity
        slots = slots.clamp(max=capacity - 1)
        products = torch.bmm(embeddings[slots].to(queries.dtype), queries[row, :, None]).squeeze(-1)
        outside |= (slots[:, :, None] == excluded[row, None, :]).any(-1)
        parts.append((_transformed(products, transform) + bias[slots]).masked_fill(outside, -_INFINITY))
    return torch.cat(parts).view(*blocks.shape, BLOCK)


def _chunk_logsumexp(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, transform: ScoreTransform | None, start: int
) -> Tensor:
    return logsumexp(_chunk_scores(queries, embeddings, bias, excluded, transform, start))


@torch.library.custom_op("negcache_fn::reduce_blocks", mutates_args=())
def _reduce_blocks_op(queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, reduction: str) -> Tensor:
    return _reduce_blocks(queries, embeddings, bias, excluded, None, reduction)


@_reduce_blocks_op.register_fake
def _(queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, reduction: str) -> Tensor:
    return queries.new_empty(queries.shape[0], -(-embeddings.shape[0] // BLOCK))


@torch.library.custom_op("negcache_fn::score_blocks", mutates_args=())
def _score_blocks_op(queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, blocks: Tensor) -> Tensor:
    return _score_blocks(queries, embeddings, bias, excluded, None, blocks)


@_score_blocks_op.register_fake
def _(queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, blocks: Tensor) -> Tensor:
    return queries.new_empty(*blocks.shape, BLOCK)


@torch.library.custom_op("negcache_fn::cache_logsumexp", mutates_args=())
def _cache_logsumexp_op(queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor) -> Tensor:
    return _reduce_blocks(queries, embeddings, bias, excluded, None, "logsumexp").logsumexp(1)


@_cache_logsumexp_op.register_fake
def _(queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor) -> Tensor:
    return queries.new_empty(queries.shape[0])


@torch.library.custom_op("negcache_fn::cache_logsumexp_backward", mutates_args=())
def _cache_logsumexp_backward_op(
    gradient: Tensor, logsumexp: Tensor, queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor
) -> Tensor:
    # Of an empty row nothing is taken: its scores are -inf, so that any finite stand-in gives probability 0.
    normalizer = torch.where(logsumexp > -_INFINITY, logsumexp, 0.0)[:, None]
    total = torch.zeros_like(queries)
    for start in range(0, embeddings.shape[0], _CHUNK):
        rows = embeddings[start : start + _CHUNK].to(queries.dtype)
        scores = _chunk_scores(queries, embeddings, bias, excluded, None, start)[:, : rows.shape[0]]
        total.addmm_((scores - normalizer).exp_().mul_(gradient[:, None]), rows)
    return total


@_cache_logsumexp_backward_op.register_fake
def _(
    gradient: Tensor, logsumexp: Tensor, queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor
) -> Tensor:
    return torch.empty_like(queries)


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _cache_logsumexp_gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    saved = cast("tuple[Tensor, ...]", ctx.saved_tensors)  # pyright: ignore[reportAttributeAccessIssue]
    return cast(Tensor, _cache_logsumexp_backward_op(gradient.contiguous(), *saved)), None, None, None


_cache_logsumexp_op.register_autograd(_cache_logsumexp_gradient, setup_context=_save_for_backward)
