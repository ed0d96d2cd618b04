"""The assembly: one training step made of the pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn.checks import (
    check_choice,
    check_embeddings,
    check_rows,
    check_scale,
    check_size,
    check_state,
)
from negcache_fn.collectives import Ranks, agree, check_placement, distribute, fetch
from negcache_fn.estimator import STALENESS_CORRECTIONS, pool_draws
from negcache_fn.features import Features, fit, leaves, map_features
from negcache_fn.objective import (
    REDUCTIONS,
    Classes,
    InBatch,
    Terms,
    check_in_batch,
    cross_entropy,
    false_negative_ids,
    loss_terms,
    reduce_loss,
)
from negcache_fn.sampling import Draw, check_draws, draw_negatives
from negcache_fn.state import as_features, feature_leaves, live, lowest, scalar, stored, stored_features
from negcache_fn.streaming import ScoreTransform
from negcache_fn.updating import EVICTIONS, Arrivals, copy_state, storable, write_

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
    num_samples: int = 1,
    top_k: int | None = None,
    in_batch: InBatch = True,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    mask: Tensor | None = None,
    share_draws: bool = True,
    staleness_correction: str = "self_normalized",
    reduction: str = "mean",
    refresh_stalest: int = 0,
    evict: str = "lru",
    group: torch.distributed.ProcessGroup | None = None,
    placement: str = "sharded",
) -> StepOutput:
    """One training step: draw negatives, encode, loss, and the next state of the cache.

    `encode` is called once, on the N documents, the B * k drawn ones and the `refresh_stalest` stalest ones of the
    cache (whose gradient is cut). What was drawn or refreshed gets its fresh embedding, then the N documents come in.

    Args:
        state: the cache, C slots.
        queries: [B, D] floating embeddings, with gradient.
        documents: features of N documents, B <= N <= C. Row i < B is the positive of query i; the others are further
            candidates (mined hard negatives, or a random stream of the corpus).
        encode: the document encoder: features of R documents, nested as `documents`, to [R, D].
        scale: number or 0-d tensor, learnable.
        score_transform: elementwise function of the scaled inner products.
        num_samples: k, draws per query.
        top_k: restricts each query's softmax to its `top_k` highest cached scores.
        in_batch: whether all documents are classes of every query; "global": those of all ranks.
        ids: [N] int64 ids of the documents, -1 where anonymous. A cached document that is a positive of the query, or
            a class in the batch, is no negative; a document whose id is cached replaces that one.
        log_weights: [N] floating, added to the documents' scores, now and while they are cached.
        mask: [N] bool, False for documents not to be cached; they are in the loss all the same.
        share_draws: whether every query uses every draw.
        staleness_correction: "none", "self_normalized" or "unnormalized", see `loss`.
        reduction: "mean", "sum" or "none".
        refresh_stalest: how many of the oldest embeddings to renew besides (each rank so many).
        evict: "lru" or "fifo", see `update`.
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
        copy_state(state),
        queries,
        documents,
        encode,
        scale=scale,
        score_transform=score_transform,
        num_samples=num_samples,
        top_k=top_k,
        in_batch=in_batch,
        ids=ids,
        log_weights=log_weights,
        mask=mask,
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
    num_samples: int = 1,
    top_k: int | None = None,
    in_batch: InBatch = True,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    mask: Tensor | None = None,
    share_draws: bool = True,
    staleness_correction: str = "self_normalized",
    reduction: str = "mean",
    refresh_stalest: int = 0,
    evict: str = "lru",
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
    ranks = distribute(group)
    with ranks.checking():
        check_placement(placement, ranks)
        check_state(state)
        if not callable(encode):
            raise TypeError(f"encode is a {type(encode).__name__}; expected a function of features, such as a module")
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("staleness_correction", staleness_correction, STALENESS_CORRECTIONS)
        check_choice("evict", evict, tuple(EVICTIONS))
        check_in_batch(in_batch, ranks)
        check_scale(scale, stored(state, "embedding").device)
        capacity = stored(state, "embedding").shape[0]
        most = capacity if placement == "sharded" else capacity // ranks.size
        check_size("refresh_stalest", refresh_stalest, least=0, most=most)
        check_draws(state, num_samples, top_k, ranks)
        documents, rows = _fit_documents(state, queries, documents, most)
        for name, values, dtype in (
            ("mask", mask, torch.bool),
            ("ids", ids, torch.int64),
            ("log_weights", log_weights, None),
        ):
            if values is not None:
                check_rows(name, values, dtype, rows, queries.device)
    queries, shards = agree(
        ranks,
        queries,
        capacity,
        placement=placement,
        options=(
            f"step in_batch={in_batch} share_draws={share_draws} evict={evict} "
            f"ids={ids is not None} log_weights={log_weights is not None}"
        ),
        seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
        top_k=0 if top_k is None else top_k,
        queries=queries.shape[0],
        documents=rows,
        num_samples=num_samples,
        refresh_stalest=refresh_stalest,
    )
    batch = queries.shape[0]

    leaves_of_state = [*feature_leaves(state), stored(state, "embedded_at")]
    draw, rows_of_draws = draw_negatives(
        state,
        queries,
        ranks,
        shards,
        num_samples=num_samples,
        scale=scale,
        score_transform=score_transform,
        exclude_ids=None if ids is None else false_negative_ids(ids, batch, in_batch=in_batch),
        top_k=top_k,
        also=leaves_of_state,
    )
    slots = draw.slot.flatten()
    drawn = slots.shape[0]
    *cached, drawn_at = rows_of_draws
    oldest = slots[:0]
    if refresh_stalest:
        oldest = lowest(stored(state, "embedded_at"), refresh_stalest * ranks.size, skip=~live(state), shards=shards)
        own_oldest = ranks.own(oldest)
        slots = torch.cat([slots, own_oldest])
        cached = [
            torch.cat(rows) for rows in zip(cached, fetch(feature_leaves(state), own_oldest, shards), strict=True)
        ]
    embeddings = encode(_join(documents, cast(Features, as_features(state, cached)), slots))
    check_embeddings("the output of encode", embeddings, stored(state, "embedding"), rows=rows + slots.shape[0])
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
        staleness_correction=staleness_correction,
    )
    loss = reduce_loss(cross_entropy(terms.batch_logits, terms.cache_logit, terms.positive), reduction)
    with torch.no_grad():  # what is looked at or cached has no gradient
        not_written = _count_not_storable(state, embeddings, mask, slots)
        metrics = _metrics(state, draw, terms, of_draws, drawn_at, not_written, ranks)
        if pool is None:
            fresh_slots, fresh = ranks.gather_all(slots[:drawn], of_draws)
        else:
            fresh_slots, fresh = pool.slot, pool.negatives
        if refresh_stalest:
            fresh_slots, fresh = torch.cat([fresh_slots, oldest]), torch.cat([fresh, ranks.gather(of_oldest)])
        write_(state, arrivals, (fresh_slots, fresh), shards, evict=evict)
    return StepOutput(loss, state, metrics, draw)


def _fit_documents(state: TensorDictBase, queries: Tensor, documents: Features, most: int) -> tuple[Features, int]:
    """The documents, as wide as the cache stores them, and their number."""
    check_embeddings("queries", queries, stored(state, "embedding"))
    name, leaf = next(leaves(documents, "documents"), ("documents", None))
    if leaf is None or leaf.ndim == 0:
        raise ValueError(f"{name} holds no rows; expected features of at least {queries.shape[0]} documents")
    rows = leaf.shape[0]
    if not queries.shape[0] <= rows <= most:
        raise ValueError(
            f"{name} has {rows} rows; expected at least {queries.shape[0]}, the number of queries, "
            f"and at most {most}, the capacity of the cache (per rank)"
        )
    return fit(stored_features(state), documents, rows, "documents"), rows


def _join(documents: Features, cached: Features, slots: Tensor) -> Features:
    """The batch's documents, then the cached ones; where there is no slot, one of the batch stands in.

    A stand-in keeps the shapes fixed and the encoder away from the zeros of an empty slot; it has no part in the loss.
    """

    def join(of_batch: Tensor, of_cache: Tensor) -> Tensor:
        stand_in = of_batch[torch.arange(slots.shape[0], device=slots.device) % of_batch.shape[0]]
        exists = (slots >= 0).view(-1, *[1] * (of_cache.ndim - 1))
        return torch.cat([of_batch, torch.where(exists, of_cache, stand_in)])

    return map_features(join, documents, cached)


def _metrics(
    state: TensorDictBase,
    draw: Draw,
    terms: Terms,
    fresh: Tensor,
    drawn_at: Tensor,
    not_written: Tensor,
    ranks: Ranks,
) -> dict[str, Tensor]:
    exact = cross_entropy(terms.batch_logits, draw.log_normalizer, terms.positive)
    step, embedded_at, drawn = scalar(state, "step"), stored(state, "embedded_at"), draw.slot >= 0
    capacity = embedded_at.new_tensor(embedded_at.shape[0])
    documents = live(state).sum()
    # Empty slots, whose entry is -1, are added back: no tensor of C ages.
    embedded_at_sum = embedded_at.sum() + capacity - documents
    fresh = fresh.to(draw.log_normalizer.dtype)
    difference = fresh - draw.embedding.flatten(0, 1)
    drift = difference.square().sum(-1) / fresh.square().sum(-1)
    sample_size = (2 * terms.log_importance.logsumexp(-1) - (2 * terms.log_importance).logsumexp(-1)).exp()
    queries = capacity.new_tensor(exact.shape[0])
    ratios = {
        "exact_loss": (exact.sum(), queries),
        "positive_probability": ((-exact).exp().sum(), queries),
        "occupancy": (documents, capacity),
        "cache_age_steps": (step * documents - embedded_at_sum, documents),
        "draw_age_steps": _sum_where(step - drawn_at, drawn.flatten()),
        "drift": _sum_where(drift, drawn.flatten()),
        "effective_sample_size": _sum_where(sample_size, drawn[:, 0]),
    }
    totals = [value for ratio in ratios.values() for value in ratio] + [not_written]
    if ranks.name is not None:
        totals = list(ranks.total(torch.stack([value.double() for value in totals])).unbind())
    dtype = exact.dtype
    metrics = {
        name: total.to(dtype) / count.to(dtype).clamp(min=1)
        for name, total, count in zip(ratios, totals[:-1:2], totals[1::2], strict=True)
    }
    metrics["non_finite"] = totals[-1].to(not_written.dtype)
    return metrics


def _sum_where(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the values that count."""
    return torch.where(where, values, torch.zeros_like(values)).sum(), where.sum()


def _count_not_storable(state: TensorDictBase, embeddings: Tensor, mask: Tensor | None, slots: Tensor) -> Tensor:
    rows = embeddings.shape[0] - slots.shape[0]
    to_insert = torch.ones(rows, dtype=torch.bool, device=slots.device) if mask is None else mask
    to_write = torch.cat([to_insert, slots >= 0])
    return (to_write & ~storable(embeddings, stored(state, "embedding").dtype)).sum()
