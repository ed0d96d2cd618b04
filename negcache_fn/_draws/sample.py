"""Draws from the softmax over the cache: for the whole batch (`for_batch`) or for each query (`gumbel_tree`).

Source of the cache softmax: Lindgren, Reddi, Guo, Kumar, NeurIPS 2021, section 3.
"""

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.state import scalar, stored
from negcache_fn._checks import check_rows, check_size
from negcache_fn._draws.draw import Draw, describe
from negcache_fn._draws.for_batch import (
    Importance,
    Largest,
    as_on_first_rank,
    draw_largest,
    draw_largest_among,
    largest_of_ranks,
    pass_over,
)
from negcache_fn._draws.gumbel_tree import DrawnSlots, draw_among, draw_slots, merge_shards, restricted
from negcache_fn._draws.noise import Noise
from negcache_fn._options import Placement, ScoreTransform, StepOptions
from negcache_fn._ranks.agree import check_ranks_agree, checking_arguments
from negcache_fn._ranks.group import ALONE, Ranks, Shards, ranks_of
from negcache_fn._scores.definition import (
    ScoreMatrix,
    Similarity,
    check_search,
    dtype_of_scores,
    full_precision,
    score_matrix,
)
from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES, Exclusions, FalseNegatives, check_false_negatives
from negcache_fn._scores.hardest import hardest_of_all, logsumexp_at
from negcache_fn._scores.stream import logsumexp

__all__ = ["check_draws", "draw_for_batch", "draw_for_queries", "sample_gumbel"]

_INFINITY = float("inf")


def sample_gumbel(
    state: TensorDictBase,
    queries: Tensor,
    *,
    num_draws: int | None = None,
    importance: Tensor | None = None,
    draws_per_query: int | None = None,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    hardness: float = 0,
    exclude_ids: Tensor | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    top_k: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    placement: Placement = "sharded",
) -> Draw:
    """Draws cached documents: `num_draws` different ones for the whole batch, or `draws_per_query` for each query.

    For the batch, equivalent to `(log_mass + gumbel_noise).topk(num_draws)`, where document j has the mass
    `sum_i importance[i] * softmax(score(state, queries))[i, j]`. For each query, equivalent to
    `(score(state, queries)[:, None, :] + gumbel_noise).argmax(-1)`, independently for every query and sample. Neither
    makes a [B, C] matrix. The draws are a function of the arguments alone; `state["step"]`, which every update
    advances, gives every step new draws.

    Args:
        state: the cache.
        queries: [B, D] floating.
        num_draws: M, for the batch; with a group for the batches of all ranks, a multiple of their number. None: as
            many as there are queries (on all ranks), unless `draws_per_query` is given.
        importance: [B] floating, positive: how much each query counts in the draw. The best choice, which `step` makes,
            is the share of the cache in the query's softmax over batch and cache; no choice biases `loss`. All equal by
            default.
        draws_per_query: k, instead of `num_draws`.
        scale: number or 0-d tensor.
        score_transform: elementwise function of the scaled inner products.
        hardness: weight of negatives by their similarity, see `StepOptions`.
        exclude_ids: int64 ids of documents that must not be drawn (positives, and documents that are classes already),
            [P] for all queries or [B, P] for each; -1 means none.
        false_negatives: further documents to exclude from a query's negatives, by id or by score.
        top_k: restricts each query's softmax to its `top_k` highest scores, exactly, ties by slot.
        group: ranks that draw together, each for its own queries. They draw the same documents as a single rank with
            the queries of all ranks, in the order of ranks. Ids [P] are excluded for the queries of every rank. Of M
            documents each rank gets M / ranks.
        placement: "sharded": each rank has a part of the cache, and slots are numbered over the whole cache;
            "replicated": each rank has the whole.

    Returns:
        The draws. If there are fewer than `num_draws` documents, all of them, then slot -1. A query without any
        document to draw has the log-normaliser -inf and, with `draws_per_query`, slot -1. For the batch,
        `log_normalizer` is differentiable in `queries` and `scale`; `loss` needs that.

    Raises:
        ValueError, TypeError: queries that are not [B, D] floating on the device of the state; non-positive
            `num_draws` or `draws_per_query`, both, or `num_draws` that is not a multiple of the number of ranks;
            `importance` of another shape or dtype, or with `draws_per_query`; `top_k` not in 1 ... C; `exclude_ids` or
            `false_negatives` of another shape or dtype.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> state = update(state, torch.ones(3, 3), torch.randn(3, 4))
        >>> queries = torch.randn(5, 4)
        >>> sample_gumbel(state, queries, num_draws=4).slot.sort().values
        tensor([[-1,  0,  1,  2]])
        >>> sample_gumbel(state, queries, num_draws=2, importance=torch.rand(5)).slot.shape
        torch.Size([1, 2])
        >>> sample_gumbel(state, queries, draws_per_query=3).slot.shape
        torch.Size([5, 3])

    Reference: Lindgren et al., NeurIPS 2021, section 3 and algorithm 1; Kool et al., ICML 2019, section 3.
    """
    ranks = ranks_of(group)
    with checking_arguments(ranks):
        options = StepOptions(
            num_draws=num_draws,
            draws_per_query=draws_per_query,
            top_k=top_k,
            score_transform=score_transform,
            hardness=hardness,
            placement=placement,
        )
        options.check_group(ranks.name is None)
        check_search(state, queries, scale, exclude_ids)
        capacity = stored(state, "embedding").shape[0]
        check_false_negatives(false_negatives, queries, knows_positives=False, slots=capacity)
        check_draws(state, options, ranks)
        if importance is not None:
            if not options.for_batch:
                raise ValueError("importance is given with draws_per_query; expected num_draws, or no importance")
            check_rows("importance", importance, None, queries.shape[0], queries.device)
        similarity = Similarity.of(options, scale, dtype_of_scores(state, queries))
        exclusions = Exclusions.of(queries, exclude_ids, false_negatives, similarity.dtype)
    queries, shards = check_ranks_agree(
        ranks,
        queries,
        capacity,
        function="sample_gumbel",
        options=options,
        scale=scale,
        seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
        rows={"state['items', 'embedding']": stored(state, "embedding")},
        numbers={"queries": queries.shape[0], **exclusions.numbers},
        choices=exclusions.choices,
    )
    if not options.for_batch:
        return draw_for_queries(state, queries, similarity, exclusions, options, ranks, shards, [])[0]

    def log_importance(log_normalizer: Tensor) -> Tensor:
        if importance is None:
            return torch.zeros_like(log_normalizer)
        return importance.detach().to(log_normalizer.dtype).log()

    return draw_for_batch(state, queries, similarity, exclusions, options, ranks, shards, [], log_importance)[0]


def draw_for_queries(
    state: TensorDictBase,
    queries: Tensor,
    similarity: Similarity,
    exclusions: Exclusions,
    options: StepOptions,
    ranks: Ranks,
    shards: Shards,
    extra_columns: list[Tensor],
) -> tuple[Draw, list[Tensor]]:
    """`sample_gumbel` for each of this rank's queries, on checked arguments, from slots wherever they are.

    Also returns the drawn rows [B * k, ...] of `extra_columns`, tensors [C, ...].
    """
    rows = queries.shape[0]
    samples, first = options.draws_for(rows) // rows, ranks.rank * rows
    with torch.no_grad(), full_precision(queries):  # these draws have no gradient
        matrix, excluded = _matrix(state, queries, similarity, exclusions, ranks, shards)
        if options.top_k is not None:
            noise = Noise.of_queries(state, first, rows, samples)
            drawn = draw_among(*hardest_of_all(matrix, options.top_k + 1, shards), noise)
        else:
            of_all = matrix.queries.shape[0]
            noise = Noise.of_queries(state, 0 if of_all > rows else first, of_all, samples)
            drawn = merge_shards(draw_slots(matrix, noise, shards.first), shards.ranks)
        return _described(state, drawn, shards, exclusions, excluded, extra_columns)


def draw_for_batch(
    state: TensorDictBase,
    queries: Tensor,
    similarity: Similarity,
    exclusions: Exclusions,
    options: StepOptions,
    ranks: Ranks,
    shards: Shards,
    extra_columns: list[Tensor],
    log_importance: Callable[[Tensor], Tensor],
) -> tuple[Draw, list[Tensor]]:
    """`sample_gumbel` for the batch, on checked arguments: this rank's part of the drawn documents.

    Also returns their rows [M / ranks, ...] of `extra_columns`. `log_importance` is a function of this rank's
    log-normalisers [B].
    """
    n = options.draws_for(queries.shape[0] * ranks.size)
    with full_precision(queries):
        matrix, excluded = _matrix(state, queries, similarity, exclusions, ranks, shards)
        if options.top_k is None:
            log_normalizer, largest = _largest_of_all(state, matrix, log_importance, ranks, shards, n + 1)
            cutoff = torch.full_like(largest.perturbed[:1], -_INFINITY).expand(queries.shape[0], 1)
        else:
            with torch.no_grad():  # which documents they are is not differentiable
                scores, slots, cutoff = restricted(*hardest_of_all(matrix, options.top_k + 1, shards))
            log_normalizer = logsumexp_at(state, queries, similarity, scores, slots, shards)
            with torch.no_grad():  # which of them are drawn is a constant
                weight = _log_weight(log_normalizer, log_importance)
                of_all = ranks.gather_all(scores, slots, weight)
                largest = draw_largest_among(of_all[0], of_all[1], of_all[2], Noise.of_batch(state), n + 1)
                largest = as_on_first_rank(largest, ranks)
    with torch.no_grad():
        share = n // ranks.size
        own = slice(ranks.rank * share, (ranks.rank + 1) * share)
        slot, log_mass, perturbed = largest.slot[None], largest.log_mass[None], largest.perturbed[None]
        chosen = (slot[:, own], log_mass[:, own], perturbed[:, own], perturbed[:, n:])
        return describe(state, chosen, log_normalizer, cutoff, shards, exclusions, excluded, extra_columns)


def _largest_of_all(
    state: TensorDictBase,
    matrix: ScoreMatrix,
    log_importance: Callable[[Tensor], Tensor],
    ranks: Ranks,
    shards: Shards,
    n: int,
) -> tuple[Tensor, Largest]:
    """This rank's log-normalisers [B], and the `n` largest perturbed masses of the whole cache."""
    found = pass_over(matrix)
    log_normalizer = found.log_normalizer
    if shards.ranks.name is not None:
        log_normalizer = logsumexp(ranks.by_rank(ranks.exchange(log_normalizer)).t())
    with torch.no_grad():  # which documents are drawn is a constant
        weight = _log_weight(log_normalizer, log_importance)
        # A shard has been searched for the queries of all ranks, a replica for this rank's own.
        importance = Importance(shards.ranks.gather(weight), ranks if shards.ranks.name is None else ALONE)
        largest = draw_largest(matrix, found, importance, Noise.of_batch(state), shards.first, n)
        return log_normalizer, largest_of_ranks(largest, shards.ranks)


def check_draws(state: TensorDictBase, options: StepOptions, ranks: Ranks) -> None:
    """Raises unless so many draws can be made from the cache, by so many ranks."""
    if options.num_draws is not None and options.num_draws % ranks.size:
        raise ValueError(f"num_draws is {options.num_draws}; expected a multiple of {ranks.size}, the number of ranks")
    if options.top_k is not None:
        check_size("top_k", options.top_k, most=stored(state, "embedding").shape[0] if ranks.name is None else None)


def _matrix(
    state: TensorDictBase, queries: Tensor, similarity: Similarity, exclusions: Exclusions, ranks: Ranks, shards: Shards
) -> tuple[ScoreMatrix, Tensor]:
    """The scores of the queries that are to be searched for here, and the ids that the draw keeps."""
    if shards.ranks.name is not None:
        # A shard is searched for the queries of all ranks.
        if torch.is_grad_enabled():
            everyone, of_all = ranks.gather(queries), exclusions.gathered(queries[:0], ranks)[1]
        else:
            everyone, of_all = exclusions.gathered(queries, ranks)
    else:
        everyone, of_all = queries, exclusions
        if of_all.for_all.shape[0] > 0:
            of_all = of_all._replace(for_all=ranks.gather(of_all.for_all))
    # Documents excluded for all queries are not among the draws, so only those excluded for each are kept.
    excluded = exclusions.for_each if exclusions.for_each.shape[1] > 0 else of_all.for_all[None]
    return score_matrix(state, everyone, similarity, of_all), excluded


def _log_weight(log_normalizer: Tensor, log_importance: Callable[[Tensor], Tensor]) -> Tensor:
    """[B] as `Importance` takes it: queries without documents, or diverged ones, have no weight."""
    log_normalizer = log_normalizer.detach()
    weight = log_importance(log_normalizer) - log_normalizer
    return torch.where(log_normalizer.isfinite(), weight, -_INFINITY)


def _described(
    state: TensorDictBase,
    drawn: DrawnSlots,
    shards: Shards,
    exclusions: Exclusions,
    excluded: Tensor,
    extra_columns: list[Tensor],
) -> tuple[Draw, list[Tensor]]:
    """The draws of each query."""
    # A comparison that NaN fails: queries that have diverged draw nothing, and their loss says so.
    has_documents = drawn.log_normalizer > -_INFINITY
    perturbed = drawn.perturbed.masked_fill(~has_documents[:, None], -_INFINITY)
    chosen = (drawn.slot, drawn.score, perturbed, perturbed[:, :0])
    return describe(state, chosen, drawn.log_normalizer, drawn.cutoff, shards, exclusions, excluded, extra_columns)
