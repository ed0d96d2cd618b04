"""Mining: the cached documents of highest score, exactly, without the [B, C] matrix of scores."""

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import pad

from negcache_fn._cache.state import scalar, stored
from negcache_fn._cache.take import fetch_embeddings
from negcache_fn._checks import check_size
from negcache_fn._kernels import dispatch
from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.problem import SCHEMA
from negcache_fn._operators import operator
from negcache_fn._options import ScoreTransform, StepOptions
from negcache_fn._ranks.agree import check_ranks_agree, checking_arguments
from negcache_fn._ranks.group import Shards, ranks_of
from negcache_fn._scores.definition import (
    ScoreMatrix,
    Similarity,
    check_search,
    dtype_of_scores,
    full_precision,
    score_matrix,
)
from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES, Exclusions, FalseNegatives, check_false_negatives
from negcache_fn._scores.stream import logsumexp, reduce_blocks, score_blocks

__all__ = ["hardest", "hardest_of_all", "logsumexp_at", "top_negatives"]

_SLAB = 32  # blocks rescored at a time
_INFINITY = float("inf")


def top_negatives(
    state: TensorDictBase,
    queries: Tensor,
    n: int,
    *,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    exclude_ids: Tensor | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The `n` cached documents with the highest scores for every query: exact, streaming, ties by slot.

    Args:
        state: the cache.
        queries: [B, D] floating.
        n: how many, at most the capacity.
        scale: number or 0-d tensor.
        score_transform: elementwise function of the scaled inner products.
        exclude_ids: int64 ids of documents to leave out, [P] for all queries or [B, P] for each; -1 means none.
        false_negatives: further documents to leave out, by id or by score.
        group: ranks over which the cache is sharded; each passes its own queries, and slots are numbered over the whole
            cache. Ids [P] are left out for the queries of every rank.

    Returns:
        Scores [B, n] in descending order, without gradient, and slots [B, n] int64, padded with (-inf, -1).

    Raises:
        ValueError, TypeError: as `score`; `n` not in 1 ... C; `exclude_ids` or `false_negatives` of another shape or
            dtype.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> scores, slots = top_negatives(state, torch.ones(2, 4), 3)
        >>> scores.shape, slots[0]
        (torch.Size([2, 3]), tensor([-1, -1, -1]))
    """
    ranks = ranks_of(group)
    with checking_arguments(ranks):
        options = StepOptions(score_transform=score_transform)
        check_search(state, queries, scale, exclude_ids)
        capacity = stored(state, "embedding").shape[0]
        check_size("n", n, most=capacity if group is None else None)
        check_false_negatives(false_negatives, queries, knows_positives=False, slots=capacity)
        similarity = Similarity.of(options, scale, dtype_of_scores(state, queries))
        exclusions = Exclusions.of(queries, exclude_ids, false_negatives, similarity.dtype)
    with torch.no_grad(), full_precision(queries):  # mining is a look-up
        queries, shards = check_ranks_agree(
            ranks,
            queries,
            capacity,
            function="top_negatives",
            options=options,
            scale=scale,
            seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
            numbers={"queries": queries.shape[0], "n": n, **exclusions.numbers},
            choices=exclusions.choices,
        )
        everyone, of_all = exclusions.gathered(queries, ranks)
        return hardest_of_all(score_matrix(state, everyone, similarity, of_all), n, shards)


def hardest_of_all(matrix: ScoreMatrix, n: int, shards: Shards) -> tuple[Tensor, Tensor]:
    """`hardest` for this rank's queries [B] among the slots of all ranks; the matrix has the queries of all ranks."""
    capacity = matrix.embeddings.shape[0]
    scores, slots = hardest(matrix, min(n, capacity))
    if n > capacity:
        scores, slots = pad(scores, (0, n - capacity), value=-_INFINITY), pad(slots, (0, n - capacity), value=-1)
    ranks = shards.ranks
    if ranks.name is None:
        return scores, slots
    slots = shards.numbered(slots)
    # Slot numbers are exact in float64, so one exchange is enough.
    of_ranks = ranks.by_rank(ranks.exchange(torch.stack([scores.double(), slots.double()], dim=1)))
    all_scores, all_slots = of_ranks.permute(2, 1, 0, 3).flatten(2)  # [2, B, ranks * n]
    # Slots ascend from rank to rank, so that a stable sort breaks ties by slot.
    best, columns = _top(all_scores[:, :0], all_scores, n)
    return best.to(scores.dtype).contiguous(), all_slots.gather(1, columns).to(torch.int64)


def logsumexp_at(
    state: TensorDictBase, queries: Tensor, similarity: Similarity, scores: Tensor, slots: Tensor, shards: Shards
) -> Tensor:
    """[B]: log-sum-exp of the `scores` of this rank's queries at `slots`, [B, n]; differentiable by scoring again."""
    scale = similarity.scale
    if not torch.is_grad_enabled() or not (
        queries.requires_grad or (isinstance(scale, Tensor) and scale.requires_grad)
    ):
        return scores.logsumexp(-1)
    embedding, (log_weight,) = fetch_embeddings(state, slots.flatten(), shards, [stored(state, "log_weight")])
    own = similarity.rowwise(queries, embedding.view(*slots.shape, -1)) + log_weight.view(slots.shape)
    return logsumexp(torch.where(scores > -_INFINITY, own, -_INFINITY))


def hardest(matrix: ScoreMatrix, n: int) -> tuple[Tensor, Tensor]:
    """The `n` highest scores of each row and their slots, ties by slot; (-inf, -1) where there are fewer."""
    if matrix.transform is not None:
        return _hardest(matrix, n)
    return _hardest_op(*matrix.problem, n)


def _hardest(matrix: ScoreMatrix, n: int) -> tuple[Tensor, Tensor]:
    """`hardest` in plain torch.

    The `n` blocks of largest maximum, ties by block, hold them all: any other block is preceded by `n` blocks that each
    have an element that precedes every element of it.
    """
    maxima = reduce_blocks(matrix, "max")
    blocks = _top(maxima, maxima.new_empty(maxima.shape[0], 0), n)[1].sort(dim=1).values
    scores = maxima.new_empty(maxima.shape[0], 0)
    slots = blocks.new_empty(blocks.shape[0], 0)
    # Slots ascend from slab to slab, so that a stable sort breaks ties by slot.
    for slab in torch.split(blocks, _SLAB, dim=1):
        nothing = maxima.gather(1, slab) == -_INFINITY  # of such a block `score_blocks` may leave a score
        found = score_blocks(matrix, slab).masked_fill(nothing[..., None], -_INFINITY).flatten(1)
        places = (slab[..., None] * BLOCK + torch.arange(BLOCK, device=slab.device)).flatten(1)
        scores, order = _top(scores, found, n)
        slots = torch.cat([slots, places], dim=1).gather(1, order)
    return scores.contiguous(), slots.masked_fill(scores == -_INFINITY, -1).contiguous()


def _top(left: Tensor, right: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The `n` largest values of each row of `cat([left, right], 1)`, descending, ties by column; their columns."""
    ordered, columns = torch.cat([left, right], dim=1).sort(dim=1, descending=True, stable=True)
    return ordered[:, :n], columns[:, :n]


def _fake_hardest(*arguments: Any) -> tuple[Tensor, Tensor]:
    queries, _, _, excluded, *_, n = arguments
    return queries.new_empty(queries.shape[0], n), excluded.new_empty(queries.shape[0], n)


@operator("hardest", fake=_fake_hardest, schema=f"({SCHEMA}, SymInt n) -> (Tensor, Tensor)")
def _hardest_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    *problem, n = arguments
    problem = dispatch.Problem(*problem)
    found = dispatch.hardest(problem, n)
    return _hardest(ScoreMatrix.of(problem), n) if found is None else found
