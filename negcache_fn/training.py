"""The assembly: one training step made of the pure functions."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn.checks import (
    check_choice,
    check_embeddings,
    check_encoder,
    check_rows,
    check_scale,
    check_size,
    check_state,
)
from negcache_fn.classes import Classes, InBatch, check_in_batch, known_ids, positive_scores
from negcache_fn.collectives import agree, check_placement, distribute, fetch
from negcache_fn.estimator import STALENESS_CORRECTIONS, pool_draws
from negcache_fn.eviction import Evict, check_evict
from negcache_fn.false_negatives import (
    NO_FALSE_NEGATIVES,
    Exclusions,
    FalseNegatives,
    check_false_negatives,
    needs_positives,
)
from negcache_fn.features import Features, fit, leaves, map_features, rows_where
from negcache_fn.metrics import count_not_storable, step_metrics
from negcache_fn.objective import (
    REDUCTIONS,
    cross_entropy,
    loss_terms,
    reduce_loss,
)
from negcache_fn.sampling import Draw, check_draws, draw_negatives, samples_of
from negcache_fn.scoring import Similarity, softmax_dtype
from negcache_fn.state import as_features, feature_leaves, live, lowest, scalar, stored, stored_features
from negcache_fn.streaming import ScoreTransform, full_precision
from negcache_fn.updating import Arrivals, copy_state, write_

__all__ = ["StepOutput", "step", "step_"]

Encoder = Callable[[Any], Tensor]


class StepOutput(NamedTuple):
    """What a step gives: `state` is carried to the next one, the rest is looked at."""

    loss: Tensor  # [] or, with reduction "none", [B]; differentiable
    state: TensorDictBase
    metrics: dict[str, Tensor]  # 0-d, detached
    draw: Draw


def step(
    state: TensorDictBase,
    queries: Tensor,
    documents: Features,
    encode: Encoder,
    *,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    num_samples: int | None = None,
    replacement: bool = True,
    num_draws: int | None = None,
    top_k: int | None = None,
    in_batch: InBatch = True,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    mask: Tensor | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    share_draws: bool = True,
    staleness_correction: str = "self_normalized",
    reduction: str = "mean",
    refresh_stalest: float = 0,
    evict: Evict = "lru",
    group: torch.distributed.ProcessGroup | None = None,
    placement: str = "sharded",
) -> StepOutput:
    """One training step: draw negatives, encode, loss, and the next state of the cache.

    `encode` is called once, on the N documents, the B * k drawn ones (M with `num_draws`) and the `refresh_stalest`
    stalest ones of the cache (whose gradient is cut). What was drawn or refreshed gets its fresh embedding, then the N
    documents come in.

    Where gradients are off (`torch.no_grad()`), the step is an evaluation: loss and metrics are the same, nothing is
    written, and the state that comes back is the one that was given.

    Args:
        state: the cache, C slots.
        queries: [B, D] floating embeddings, with gradient.
        documents: features of N documents, B <= N <= C. Row i < B is the positive of query i; the others are further
            candidates (mined hard negatives, or a random stream of the corpus).
        encode: the document encoder: features of R documents, nested as `documents`, to [R, D].
        scale: number or 0-d tensor, learnable.
        score_transform: elementwise function of the scaled inner products.
        num_samples: k, draws per query. None: 4, or 1 with `num_draws` (why 4: docs/evidence.md).
        replacement: whether a query may draw a document more than once, see `sample_gumbel`.
        num_draws: M, a divisor of B: that many of the queries draw, once each, for all (of each rank's queries).
        top_k: restricts each query's softmax to its `top_k` highest cached scores.
        in_batch: whether all documents are classes of every query; "global": those of all ranks.
        ids: [N] int64 ids of the documents, -1 where anonymous. A cached document that is a positive of the query, or
            a class in the batch, is no negative; a document whose id is cached replaces that one.
        log_weights: [N] floating, added to the documents' scores, now and while they are cached.
        mask: [N] bool, False for documents not to be cached; they are in the loss all the same.
        false_negatives: what else is no negative of a query, by id or by score. If its `max_score` is a function of
            the positives' scores, `encode` is called twice: on the documents, then on what is drawn.
        share_draws: whether every query uses every draw.
        staleness_correction: "none", "self_normalized" or "unnormalized", see `loss`.
        reduction: "mean", "sum" or "none".
        refresh_stalest: how many of the oldest embeddings to renew besides (each rank so many); a float below 1 is
            that share of the slots (of each rank's).
        evict: "lru", "fifo" or the priorities [C] of the slots, see `update`.
        group: of ranks that train together, each with its own queries and documents: draws, losses and states are those
            of one rank that has the queries, the positives and the further candidates of all, in the order of ranks.
            The loss is that of this rank's queries; see docs/scaling.md for gradients.
        placement: "sharded": each rank has a part of the cache; "replicated": each has the whole.

    Returns:
        Loss, next state, metrics and draw. The metrics, of the cache before the update:

        - `exact_loss`: mean cross entropy with the whole cache as embedded in it, the interpretable loss;
        - `positive_probability`: mean probability of the positive in that softmax;
        - `occupancy`: share of live slots;
        - `cache_age_steps`, `draw_age_steps`: mean age of the embeddings, of all and of the drawn;
        - `drift`: mean `|fresh - stale|^2 / |fresh|^2` of the drawn;
        - `effective_sample_size`: mean `(sum w)^2 / sum w^2` of the weights with which a query uses the draws;
        - `unique_draws`: distinct documents among the draws, as a share of the draws;
        - `masked_pairs`: share of the pairs of a query and a draw that are false negatives, by id or by score;
        - `non_finite`: rows that were not written because they were not finite.

        With a group they are those of all ranks' queries and the whole cache.

    Raises:
        ValueError, TypeError: whatever does not fit, named; the given state is untouched.

    Examples:
        >>> encoder = torch.nn.Linear(3, 4)
        >>> state = init_cache(8, 4, features=torch.zeros(1, 3))
        >>> for _ in range(2):
        ...     out = step(state, torch.randn(2, 4), torch.randn(2, 3), encoder, scale=20.0)
        ...     out.loss.backward()
        ...     state = out.state
        >>> occupancy(state)
        tensor(0.5000)

    Reference: Lindgren et al., NeurIPS 2021, algorithm 1.
    """
    return step_(
        copy_state(state) if torch.is_grad_enabled() else state,
        queries,
        documents,
        encode,
        scale=scale,
        score_transform=score_transform,
        num_samples=num_samples,
        replacement=replacement,
        num_draws=num_draws,
        top_k=top_k,
        in_batch=in_batch,
        ids=ids,
        log_weights=log_weights,
        mask=mask,
        false_negatives=false_negatives,
        share_draws=share_draws,
        staleness_correction=staleness_correction,
        reduction=reduction,
        refresh_stalest=refresh_stalest,
        evict=evict,
        group=group,
        placement=placement,
    )


def step_(
    state: TensorDictBase,
    queries: Tensor,
    documents: Features,
    encode: Encoder,
    *,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    num_samples: int | None = None,
    replacement: bool = True,
    num_draws: int | None = None,
    top_k: int | None = None,
    in_batch: InBatch = True,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    mask: Tensor | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    share_draws: bool = True,
    staleness_correction: str = "self_normalized",
    reduction: str = "mean",
    refresh_stalest: float = 0,
    evict: Evict = "lru",
    group: torch.distributed.ProcessGroup | None = None,
    placement: str = "sharded",
) -> StepOutput:
    """`step` in place: writes the rows that change into `state`, which it returns, and copies nothing.

    Arguments, metrics and errors as there.

    Examples:
        >>> state = init_cache(8, 4, features=torch.zeros(1, 3))
        >>> step_(state, torch.randn(2, 4), torch.randn(2, 3), torch.nn.Linear(3, 4)).state is state
        True
    """
    num_samples = samples_of(num_samples, num_draws)
    ranks = distribute(group)
    with ranks.checking():
        check_placement(placement, ranks)
        check_state(state)
        check_encoder(encode)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("staleness_correction", staleness_correction, STALENESS_CORRECTIONS)
        evict_kind = check_evict(evict, stored(state, "embedding"))
        check_in_batch(in_batch, ranks)
        check_scale(scale, stored(state, "embedding").device)
        capacity = stored(state, "embedding").shape[0]
        most = capacity if placement == "sharded" else capacity // ranks.size
        to_refresh = _number_to_refresh(refresh_stalest, capacity, most)
        documents, rows = _fit_documents(state, queries, documents, most)
        check_draws(state, queries, num_samples, replacement, num_draws, top_k, ranks)
        if num_draws is not None and not share_draws:
            raise ValueError(
                f"num_draws is {num_draws} with share_draws={share_draws}; expected share_draws=True, "
                f"as queries that do not draw use the draws of others"
            )
        for name, values, dtype in (
            ("mask", mask, torch.bool),
            ("ids", ids, torch.int64),
            ("log_weights", log_weights, None),
        ):
            if values is not None:
                check_rows(name, values, dtype, rows, queries.device)
        check_false_negatives(false_negatives, queries, knows_positives=True)
    training = torch.is_grad_enabled()
    queries, shards = agree(
        ranks,
        queries,
        capacity,
        placement=placement,
        options=(
            f"step replacement={replacement} in_batch={in_batch} share_draws={share_draws} evict={evict_kind} "
            f"ids={ids is not None} log_weights={log_weights is not None} "
            f"max_score={false_negatives.max_score is not None} gradients={training}"
        ),
        seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
        top_k=0 if top_k is None else top_k,
        exclude_ids=0 if false_negatives.ids is None else false_negatives.ids.shape[1],
        queries=queries.shape[0],
        documents=rows,
        num_samples=num_samples,
        num_draws=0 if num_draws is None else num_draws,
        refresh_stalest=to_refresh,
    )
    batch = queries.shape[0]
    cached_embeddings = stored(state, "embedding")

    encoded_first: Tensor | None = None
    positives: Tensor | None = None
    if needs_positives(false_negatives):
        encoded_first = _encode(encode, documents, rows, cached_embeddings)
        with torch.no_grad(), full_precision(queries):  # a limit is a constant
            similarity = Similarity(softmax_dtype(state, queries), scale, score_transform)
            positives = positive_scores(similarity, queries, encoded_first)
    exclusions = Exclusions.of(
        queries,
        None if ids is None else known_ids(ids, batch, in_batch=in_batch),
        false_negatives,
        softmax_dtype(state, queries),
        positives,
    )

    leaves_of_state = [*feature_leaves(state), stored(state, "embedded_at")]
    draw, rows_of_draws = draw_negatives(
        state,
        queries,
        ranks,
        shards,
        num_samples=num_samples,
        replacement=replacement,
        num_draws=num_draws,
        scale=scale,
        score_transform=score_transform,
        exclusions=exclusions,
        top_k=top_k,
        also=leaves_of_state,
    )
    slots = draw.slot.flatten()
    drawn = slots.shape[0]
    *cached, drawn_at = rows_of_draws
    oldest = slots[:0]
    if to_refresh:
        oldest = lowest(stored(state, "embedded_at"), to_refresh * ranks.size, skip=~live(state), shards=shards)
        own_oldest = ranks.own(oldest)
        slots = torch.cat([slots, own_oldest])
        cached = [
            torch.cat(rows) for rows in zip(cached, fetch(feature_leaves(state), own_oldest, shards), strict=True)
        ]
    from_cache = _with_stand_ins(documents, cast(Features, as_features(state, cached)), slots)
    if encoded_first is None:
        together = map_features(_joined, documents, from_cache)
        embeddings = _encode(encode, together, rows + slots.shape[0], cached_embeddings)
    else:
        embeddings = torch.cat([encoded_first, _encode(encode, from_cache, slots.shape[0], cached_embeddings)])
    of_documents, of_draws, of_oldest = torch.split(embeddings, [rows, drawn, slots.shape[0] - drawn])

    # What is needed of other ranks' documents goes with a gradient only where the loss uses it.
    to_cache = of_documents if in_batch == "global" else of_documents.detach()
    arrivals = Arrivals.of(documents, to_cache, ids, log_weights, mask)
    arrivals = arrivals.gathered(batch, ranks, differentiable=in_batch == "global")
    if in_batch == "global":
        classes = Classes(arrivals.embeddings, arrivals.ids, arrivals.log_weights, ranks.rank * batch)
    else:
        classes = Classes(of_documents, ids, log_weights, 0)
    pool = pool_draws(of_draws, draw, ranks) if share_draws else None
    terms = loss_terms(
        queries,
        classes,
        of_draws,
        draw,
        pool,
        scale=scale,
        score_transform=score_transform,
        in_batch=bool(in_batch),
        false_negatives=false_negatives,
        staleness_correction=staleness_correction,
    )
    loss = reduce_loss(cross_entropy(terms.batch_logits, terms.cache.logit, terms.positive), reduction)
    with torch.no_grad():  # what is looked at or cached has no gradient
        if pool is None:
            fresh_slots, fresh = ranks.gather_all(slots[:drawn], of_draws)
        else:
            fresh_slots, fresh = pool.slot, pool.negatives
        not_written = count_not_storable(state, embeddings, mask, slots)
        metrics = step_metrics(state, draw, terms, of_draws, drawn_at, fresh_slots, not_written, ranks)
        if training:
            if to_refresh:
                fresh_slots, fresh = torch.cat([fresh_slots, oldest]), torch.cat([fresh, ranks.gather(of_oldest)])
            write_(state, arrivals, (fresh_slots, fresh), shards, evict=evict)
    return StepOutput(loss, state, metrics, draw)


def _fit_documents(state: TensorDictBase, queries: Tensor, documents: Features, most: int) -> tuple[Features, int]:
    """The documents, as wide as the cache stores them, and their number."""
    check_embeddings("queries", queries, stored(state, "embedding"), of="the cache")
    name, leaf = next(leaves(documents, "documents"), ("documents", None))
    if leaf is None or leaf.ndim == 0:
        raise ValueError(f"{name} holds no rows; expected features of at least {queries.shape[0]} documents")
    rows = leaf.shape[0]
    if not queries.shape[0] <= rows <= most:
        raise ValueError(
            f"{name} has {rows} rows; expected at least {queries.shape[0]}, the number of queries, "
            f"and at most {most}, the capacity of the cache (per rank)"
        )
    return fit(stored_features(state), documents, rows, "documents", queries.device), rows


def _number_to_refresh(refresh_stalest: float, capacity: int, most: int) -> int:
    """How many slots that is, checked."""
    if isinstance(refresh_stalest, float):
        if not 0.0 <= refresh_stalest < 1.0:
            raise ValueError(f"refresh_stalest is {refresh_stalest}; expected a number of slots, or a share in 0 ... 1")
        refresh_stalest = math.ceil(refresh_stalest * capacity)
    check_size("refresh_stalest", refresh_stalest, least=0, most=most)
    return refresh_stalest


def _encode(encode: Encoder, features: Features, rows: int, like: Tensor) -> Tensor:
    """[rows, D], checked."""
    embeddings = encode(features)
    check_embeddings("the output of encode", embeddings, like, of="the cache", rows=rows)
    return embeddings


def _joined(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second])


def _with_stand_ins(documents: Features, cached: Features, slots: Tensor) -> Features:
    """Cached documents; where there is no slot, one of the batch.

    A stand-in keeps the shapes fixed and the encoder away from the zeros of an empty slot; it has no part in the loss.
    """

    def stand_in(of_batch: Tensor, of_cache: Tensor) -> Tensor:
        rows = of_batch[torch.arange(slots.shape[0], device=slots.device) % of_batch.shape[0]]
        return rows_where(slots >= 0, of_cache, rows)

    return map_features(stand_in, documents, cached)
