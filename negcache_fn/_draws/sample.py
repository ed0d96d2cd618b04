"""Draws from the softmax over the cache, and what is known of them.

How slots are drawn: see `gumbel_tree`. Source of the cache softmax: Lindgren, Reddi, Guo, Kumar, NeurIPS 2021,
section 3.
"""

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.state import scalar, stored
from negcache_fn._checks import check_size
from negcache_fn._draws.gumbel_tree import DrawnSlots, draw_among, draw_slots, merge_shards
from negcache_fn._draws.noise import Noise
from negcache_fn._options import Placement, ScoreTransform, StepOptions
from negcache_fn._ranks.agree import check_ranks_agree, checking_arguments
from negcache_fn._ranks.group import Ranks, Shards, fetch_rows, ranks_of
from negcache_fn._scores.definition import Similarity, check_search, dtype_of_scores, full_precision, score_matrix
from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES, Exclusions, FalseNegatives, check_false_negatives
from negcache_fn._scores.hardest import hardest_of_all

__all__ = ["Draw", "check_draw", "check_draws", "draw_negatives", "sample_gumbel"]

_INFINITY = float("inf")


class Draw(NamedTuple):
    """k draws for each of B queries, with or without replacement, and what their weights need. No gradient.

    With `num_draws` M of the queries have drawn, once each: the fields [B, k, ...] are [M, 1, ...].
    """

    query: Tensor  # [B] int64: whose draws those of a row are; its own, where all have drawn
    slot: Tensor  # [B, k] int64; -1: the query has no document to draw, or without replacement no other one
    score: Tensor  # [B, k] stale score of the drawn document, log-weight included
    perturbed: Tensor  # [B, k] perturbed score: the largest of each sample; or the k largest, in descending order
    threshold: Tensor  # [B, 1]: the (k+1)-th largest perturbed score, -inf if all are drawn; [B, 0] with replacement
    log_normalizer: Tensor  # [B] log-sum-exp of the scores, -inf where there is no document
    embedding: Tensor  # [B, k, D] stale embedding, storage dtype
    id: Tensor  # [B, k] int64
    log_weight: Tensor  # [B, k] float32
    source: Tensor  # [B, k] int64: of which of S merged caches the slot is
    cutoff: Tensor  # [B, S]: documents of that source with a lower score have probability 0; -inf without top_k
    max_score: Tensor  # [B, S]: those with a higher one, log-weight not included, too; +inf without such a limit
    exclude_ids: Tensor  # [1 or B, P] int64: documents that have probability 0; P may be 0

    @property
    def distinct(self) -> bool:
        """Whether the documents that a query has drawn are all different: without replacement."""
        return self.threshold.shape[1] > 0

    @property
    def of_all_queries(self) -> bool:
        """Whether every query has drawn."""
        return self.query.shape[0] == self.log_normalizer.shape[0]

    @property
    def has_documents(self) -> Tensor:
        """[B] bool: whether there is anything that the query could draw."""
        return self.log_normalizer > -_INFINITY  # not where it is NaN


def sample_gumbel(
    state: TensorDictBase,
    queries: Tensor,
    *,
    draws_per_query: int | None = None,
    replacement: bool = True,
    num_draws: int | None = None,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    exclude_ids: Tensor | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    top_k: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    placement: Placement = "sharded",
) -> Draw:
    """Draws documents from `softmax(score(state, queries))`, independently for every query and sample.

    Equivalent to `(score(state, queries)[:, None, :] + gumbel_noise).argmax(-1)`, without the [B, C] matrices; without
    replacement to `(score(state, queries) + gumbel_noise).topk(draws_per_query)`: each sample comes from the softmax
    over the documents that are left. The draws are a function of the arguments alone; `state["step"]`, which every
    update advances, makes them new.

    Args:
        state: the cache.
        queries: [B, D] floating.
        draws_per_query: k. None: 4, or 1 with `num_draws`.
        replacement: whether a query may draw a document more than once.
        num_draws: M, a divisor of B: of each B / M consecutive queries one draws, chosen at random. The others use its
            draws (`loss` with `share_draws=True`). None: every query draws.
        scale: number or 0-d tensor.
        score_transform: elementwise function of the scaled inner products.
        exclude_ids: int64 ids of documents that must not be drawn (positives, and what is a class already), [P] for
            all queries or [B, P] for each; -1 means none.
        false_negatives: further documents to exclude from a query's negatives, by id or by score.
        top_k: restricts each query's softmax to its `top_k` highest scores, exactly, ties by slot.
        group: of ranks that draw together, each for its own queries: what they draw is what one rank draws that has
            the queries of all, in the order of ranks. Ids [P] are excluded for the queries of every rank.
        placement: "sharded": each rank has a part of the cache, and slots are numbers of all its slots; "replicated":
            each has the whole.

    Returns:
        The draws. A query that has no document gets slot -1 and log-normaliser -inf; without replacement, one that has
        fewer than k documents gets each of them, then slot -1. With `num_draws` they are those that `query` have
        without it; the normalisers are of all queries.

    Raises:
        ValueError, TypeError: queries that are not [B, D] floating on the device of the state; non-positive
            `draws_per_query`; `num_draws` that does not divide B, with several samples or without replacement; `top_k`
            not in 1 ... C; `exclude_ids` or `false_negatives` of another shape or dtype.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> state = update(state, torch.ones(2, 3), torch.randn(2, 4))
        >>> draw = sample_gumbel(state, torch.randn(5, 4), draws_per_query=3)
        >>> draw.slot.shape, bool((draw.slot < 2).all())
        (torch.Size([5, 3]), True)
        >>> sample_gumbel(state, torch.zeros(1, 4), draws_per_query=3, replacement=False).slot.sort()[0]
        tensor([[-1,  0,  1]])
        >>> sample_gumbel(state, torch.randn(6, 4), num_draws=2).slot.shape
        torch.Size([2, 1])

    Reference: Lindgren et al., NeurIPS 2021, section 3 and algorithm 1; Kool et al., ICML 2019, section 3.
    """
    ranks = ranks_of(group)
    with checking_arguments(ranks):
        options = StepOptions(
            draws_per_query=draws_per_query,
            replacement=replacement,
            num_draws=num_draws,
            top_k=top_k,
            score_transform=score_transform,
            placement=placement,
        )
        options.check_group(ranks.name is None)
        check_search(state, queries, scale, exclude_ids)
        check_false_negatives(false_negatives, queries, knows_positives=False)
        check_draws(state, queries, options, ranks)
        similarity = Similarity.of(options, scale, dtype_of_scores(state, queries))
        exclusions = Exclusions.of(queries, exclude_ids, false_negatives, similarity.dtype)
    queries, shards = check_ranks_agree(
        ranks,
        queries,
        stored(state, "embedding").shape[0],
        function="sample_gumbel",
        options=options,
        scale=scale,
        seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
        numbers={"queries": queries.shape[0], **exclusions.numbers},
        choices=exclusions.choices,
    )
    return draw_negatives(state, queries, similarity, exclusions, options, ranks, shards, [])[0]


def draw_negatives(
    state: TensorDictBase,
    queries: Tensor,
    similarity: Similarity,
    exclusions: Exclusions,
    options: StepOptions,
    ranks: Ranks,
    shards: Shards,
    extra_columns: list[Tensor],
) -> tuple[Draw, list[Tensor]]:
    """`sample_gumbel` on checked arguments: for this rank's queries, from slots wherever they are.

    Also returns the drawn rows [B * k, ...] of `extra_columns`, tensors [C, ...].
    """
    rows = queries.shape[0]
    drawing = rows if options.num_draws is None else options.num_draws
    with torch.no_grad(), full_precision(queries):  # sampling has no gradient
        if shards.ranks.name is not None:
            # A shard is searched for the queries of all ranks.
            everyone, of_all = exclusions.gathered(queries, ranks)
        else:
            everyone, of_all = queries, exclusions
            if of_all.for_all.shape[0] > 0:
                of_all = of_all._replace(for_all=ranks.gather(of_all.for_all))
        matrix = score_matrix(state, everyone, similarity, of_all)
        first_row = ranks.rank * rows
        if options.top_k is not None:
            noise = Noise.of(state, first_row, rows, drawing, options)
            drawn = draw_among(*hardest_of_all(matrix, options.top_k + 1, shards), noise)
        else:
            if shards.ranks.name is not None:
                first_row, rows, drawing = 0, everyone.shape[0], drawing * ranks.size
            noise = Noise.of(state, first_row, rows, drawing, options)
            drawn = merge_shards(draw_slots(matrix, noise, shards.first), noise.distinct, shards.ranks)
        # Documents excluded for all queries are not among the draws, so only those excluded for each are kept.
        excluded = exclusions.for_each if exclusions.for_each.shape[1] > 0 else of_all.for_all[None]
        return _describe(state, drawn, options.samples, shards, exclusions.max_score, excluded, extra_columns)


def check_draws(state: TensorDictBase, queries: Tensor, options: StepOptions, ranks: Ranks) -> None:
    """Raises unless so many draws can be made for the queries, from the cache."""
    if options.num_draws is not None and queries.shape[0] % options.num_draws:
        raise ValueError(
            f"num_draws is {options.num_draws}; expected a divisor of {queries.shape[0]}, the number of queries "
            f"(drop_last=True, if the last batch has fewer)"
        )
    if options.top_k is not None:
        check_size("top_k", options.top_k, most=stored(state, "embedding").shape[0] if ranks.name is None else None)


def check_draw(name: str, value: object) -> None:
    """Raises unless `value` is a `Draw`."""
    if not isinstance(value, Draw):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected a Draw, as made by negcache_fn.sample_gumbel(...)"
        )


def _describe(
    state: TensorDictBase,
    drawn_slots: DrawnSlots,
    samples: int,
    shards: Shards,
    max_score: Tensor | None,
    excluded: Tensor,
    extra_columns: list[Tensor],
) -> tuple[Draw, list[Tensor]]:
    # Without replacement there is one more than is drawn.
    slot, score, perturbed = (
        values[:, :samples] for values in (drawn_slots.slot, drawn_slots.score, drawn_slots.perturbed)
    )
    # Comparisons that NaN fails: queries that have diverged draw nothing, and their loss says so.
    drawn = (drawn_slots.log_normalizer > -_INFINITY)[drawn_slots.query, None] & (perturbed > -_INFINITY)
    slot = torch.where(drawn, slot, -1)
    leaves = [stored(state, name) for name in ("embedding", "id", "log_weight")]
    embedding, document, log_weight, *others = fetch_rows([*leaves, *extra_columns], slot.flatten(), shards)
    draw = Draw(
        query=drawn_slots.query,
        slot=slot,
        score=torch.where(drawn, score, -_INFINITY),
        perturbed=perturbed.contiguous(),
        threshold=drawn_slots.perturbed[:, samples:].contiguous(),
        log_normalizer=drawn_slots.log_normalizer,
        embedding=embedding.view(*slot.shape, -1),
        id=torch.where(drawn, document.view(slot.shape), -1),
        log_weight=torch.where(drawn, log_weight.view(slot.shape), 0.0),
        source=torch.zeros_like(slot),
        cutoff=drawn_slots.cutoff,
        max_score=torch.full_like(drawn_slots.cutoff, _INFINITY) if max_score is None else max_score[:, None].clone(),
        exclude_ids=excluded,
    )
    return draw, others
