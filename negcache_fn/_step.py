"""The assembly: one training step made of the pure functions."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._batch import (
    Batch,
    Facts,
    agree_on_batch,
    arrivals_of,
    check_batch_of_step,
    classes_of,
    limits_told_to_all,
)
from negcache_fn._cache.arrivals import Arrivals
from negcache_fn._cache.recomputation import check_not_recomputed, same_when_recomputed
from negcache_fn._cache.state import check_state, check_writable, feature_leaves, scalar, stored
from negcache_fn._cache.update import copy_state, write_
from negcache_fn._checks import check_encoder, check_scale, check_transforms
from negcache_fn._draws.draw import Draw
from negcache_fn._draws.sample import draw_for_batch, draw_for_queries
from negcache_fn._encoders.one_pass import Encoder, encode_checked, encode_in_one_pass, told_to_all, with_stalest
from negcache_fn._features import Features, copied
from negcache_fn._loss.batch_classes import BatchScores, batch_scores, known_ids, positive_scores, without_idle
from negcache_fn._loss.cache_class import SharedDraws, estimate_cache_logit, gather_draws
from negcache_fn._loss.cross_entropy import Terms, log_share_of_cache, reduced_loss
from negcache_fn._monitor.metrics import count_not_storable, draw_noise, step_metrics
from negcache_fn._options import StepOptions, check_options
from negcache_fn._ranks.agree import checking_arguments
from negcache_fn._ranks.attempts import Attempts
from negcache_fn._ranks.group import Ranks, ranks_of
from negcache_fn._scores.definition import Similarity, dtype_of_scores, full_precision, in_dtype
from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES, Exclusions, FalseNegatives, needs_positives

__all__ = ["StepOutput", "step", "step_", "take_step_"]


class StepOutput(NamedTuple):
    """The result of a step: call `loss.backward()`, pass `state` on, log `metrics`."""

    loss: Tensor
    """[], or [B] with `reduction="none"`; differentiable."""
    state: TensorDictBase
    """The next state: pass it to the next step."""
    metrics: dict[str, Tensor]
    """0-d tensors, detached: see `step` for their names."""
    draw: Draw
    """The drawn documents, detached."""


def step(
    state: TensorDictBase,
    queries: Tensor,
    features: Features,
    encode: Encoder,
    *,
    options: StepOptions = StepOptions(),
    scale: float | Tensor = 1.0,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    cacheable: Tensor | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    priorities: Tensor | None = None,
    positive_rows: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> StepOutput:
    """One training step: draw negatives, encode, loss, and the next state of the cache.

    `encode` is called twice: on the N documents, whose scores tell how much each query needs the cache, then on the
    drawn documents, with the stalest documents (whose gradient is cut) if `options` refresh some. With
    `draws_per_query` it is called once, on all of them. The fresh embeddings of the drawn and refreshed documents are
    written back, then the N documents are inserted.

    With gradients off (`torch.no_grad()`), the step is an evaluation: loss and metrics are the same, nothing is
    written, and `out.state` is the given state.

    Args:
        state: the cache, C slots.
        queries: [B, D] floating embeddings, with gradient.
        features: of N documents, B <= N <= C. Row i < B is the positive of query i; the others are further candidates
            (mined hard negatives, or a random stream of the corpus). Floats may have another dtype than the cache
            stores; `encode` then gets those of cached documents in it too.
        encode: the document encoder: features of R documents, nested as `features`, to [R, D].
        options: the options that are constant during a run, see `StepOptions`.
        scale: number or 0-d tensor, learnable.
        ids: [N] int64 ids of the documents, -1 where anonymous. A cached document that is a positive of the query, or
            a class in the batch, is left out of the query's negatives; a document whose id is cached replaces that
            entry.
        log_weights: [N] floating, added to the documents' scores, now and while they are cached.
        cacheable: [N] bool, False for documents not to be cached; they still take part in the loss.
        false_negatives: further documents to exclude from a query's negatives, by id or by score. If its `max_score`
            is a function of the positives' scores, `encode` is called twice with `draws_per_query` as well.
        priorities: [C] instead of `options.evict`: the priority of every slot here, see `update`.
        positive_rows: [B, P] int64: the rows of `features` that are positives of each query, -1 where there are fewer;
            instead of row i for query i. The loss is the mean over them, each in a softmax without the others, see
            `loss`. A query without any (a masked one) has the loss 0, is not in the mean, and does not influence
            the draws for the batch.
        group: ranks that train together, each with its own queries and documents. Draws, losses and states are the same
            as on one rank that has the queries, the positives and the further candidates of all ranks, in the order of
            ranks. The loss covers this rank's queries; see docs/scaling.md for gradients.

    Returns:
        Loss, next state, metrics and draw. The metrics, of the cache before the update:

        - `exact_loss`: mean cross entropy over batch and whole cache, with the stale embeddings and without sampling;
        - `positive_probability`: mean probability of the positive in that softmax;
        - `cache_share`: mean probability of the cached documents together in that softmax;
        - `occupancy`: share of live slots;
        - `cache_age_steps`, `draw_age_steps`: mean age of all embeddings, and of the drawn ones;
        - `drift`: mean `|fresh - stale|^2 / |fresh|^2` of the drawn documents;
        - `effective_sample_size`: mean `(sum w)^2 / sum w^2` of the weights with which a query uses the draws;
        - `draw_noise`: with draws for the batch, the relative error of the documents' gradient from drawing only M of
          them, estimated from the draws; above about .3 a larger `num_draws` pays;
        - `unique_draws`: with `draws_per_query`, distinct documents among the draws, as a share of the draws;
        - `masked_pairs`: share of the pairs of a query and a draw that are false negatives, by id or by score;
        - `non_finite`: rows that were not written because they were not finite.

        With a group they cover the queries of all ranks and the whole cache.

    Raises:
        ValueError, TypeError: an invalid argument, which the message names; the given state is unchanged.

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
    facts = (ids, log_weights, cacheable, false_negatives, priorities, positive_rows)
    state = copy_state(state) if torch.is_grad_enabled() else state
    return take_step_(state, queries, features, encode, options, scale, facts, ranks_of(group))


def step_(
    state: TensorDictBase,
    queries: Tensor,
    features: Features,
    encode: Encoder,
    *,
    options: StepOptions = StepOptions(),
    scale: float | Tensor = 1.0,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    cacheable: Tensor | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    priorities: Tensor | None = None,
    positive_rows: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> StepOutput:
    """`step` in place: writes the rows that change into `state`, which it returns, and copies nothing.

    It has the same arguments, metrics and errors. It raises under `torch.utils.checkpoint`, which would call it again
    in the backward pass.

    Examples:
        >>> state = init_cache(8, 4, features=torch.zeros(1, 3))
        >>> step_(state, torch.randn(2, 4), torch.randn(2, 3), torch.nn.Linear(3, 4)).state is state
        True
    """
    facts, ranks = (ids, log_weights, cacheable, false_negatives, priorities, positive_rows), ranks_of(group)
    with checking_arguments(ranks):
        check_not_recomputed()
    return take_step_(state, queries, features, encode, options, scale, facts, ranks)


def take_step_(
    state: TensorDictBase,
    queries: Tensor,
    features: Features,
    encode: Encoder,
    options: StepOptions,
    scale: float | Tensor,
    facts: Facts,
    ranks: Ranks,
    finish: Callable[[Terms, StepOptions], Tensor] = reduced_loss,
) -> StepOutput:
    """`step_`, wherever it is called, with a function that makes the loss from the classes."""
    training = torch.is_grad_enabled()
    with checking_arguments(ranks):
        check_options(options)
        check_transforms("step", *((queries, scale) if options.for_batch else ()))
        options.check_group(ranks.name is None)
        check_state(state)
        if training:
            check_writable(state)
        check_encoder(encode)
        check_scale(scale, stored(state, "embedding").device)
        batch = check_batch_of_step(state, queries, features, facts, options, ranks)
    queries, shards = agree_on_batch(state, queries, batch, scale, options, ranks)
    attempts = Attempts(ranks)
    encode, batch = told_to_all(encode, attempts, queries.detach()), limits_told_to_all(batch, attempts)

    queries, scale = in_dtype(without_idle(queries, batch.positive_rows), scale, dtype_of_scores(state, queries))
    similarity = Similarity.of(options, scale, queries.dtype)
    first = _encoded_first(state, batch, encode, options)
    known = None if first is None else _classes(state, similarity, queries, first, batch, options, attempts)
    exclusions = _exclusions(similarity, queries, first, batch, options)
    columns = [*feature_leaves(state), stored(state, "embedded_at")]
    if options.for_batch:
        assert known is not None
        share = partial(log_share_of_cache, known.scores, known.log_total)
        found = draw_for_batch(state, queries, similarity, exclusions, options, ranks, shards, columns, share)
    else:
        found = draw_for_queries(state, queries, similarity, exclusions, options, ranks, shards, columns)
    draw, (*drawn, drawn_at) = found
    again = with_stalest(state, draw.slot.flatten(), drawn, batch.to_refresh, ranks, shards)
    fresh = encode_in_one_pass(encode, cast(Features, batch.features), first, state, again)

    if known is None:
        known = _classes(state, similarity, queries, fresh.documents, batch, options, attempts)
    shared = gather_draws(fresh.draws, draw, ranks) if options.share_draws else None
    with full_precision(queries):
        cache = estimate_cache_logit(similarity, queries, fresh.draws, draw, shared, options)
    terms = Terms(known.scores, cache)
    loss = finish(terms, options)
    loss = same_when_recomputed(loss, scalar(state, "step"))
    with torch.no_grad():  # metrics and cached embeddings are constants
        slots, embeddings = _drawn_by_all(draw, fresh.draws, shared, ranks)
        not_written = count_not_storable(state, fresh.all, batch.cacheable, batch.fits, again.slots)
        log_share = log_share_of_cache(known.scores, known.log_total, draw.log_normalizer)
        log_total, failed = torch.logaddexp(known.log_total, draw.log_normalizer), attempts.failures(slots.device)
        metrics, failures = step_metrics(
            state, draw, terms, log_total, log_share, fresh.draws, drawn_at, slots, not_written, failed, ranks
        )
        attempts.raise_if_any(failures)
        if draw.for_batch and shared is not None:
            metrics["draw_noise"] = draw_noise(queries, draw, terms, log_share, shared)
        if training:
            if batch.to_refresh:
                slots = torch.cat([slots, again.stalest])
                embeddings = torch.cat([embeddings, ranks.gather(fresh.stalest)])
            write_(state, known.arrivals, (slots, embeddings), shards, options, batch.priorities)
    # Not `draw._replace`, whose result torch 2.11 cannot return from a graph.
    constant = Draw(**{**draw._asdict(), "log_normalizer": draw.log_normalizer.detach()})
    return StepOutput(loss, state, metrics, constant)


class _Classes(NamedTuple):
    """The documents of the batch, encoded."""

    arrivals: Arrivals
    scores: BatchScores
    log_total: Tensor  # [B] log-sum-exp of the logits; without gradient


def _classes(
    state: TensorDictBase,
    similarity: Similarity,
    queries: Tensor,
    documents: Tensor,
    batch: Batch,
    options: StepOptions,
    attempts: Attempts,
) -> _Classes:
    """From the embeddings [N, D]."""
    rows = queries.shape[0]
    arrivals = arrivals_of(batch, documents, rows, options, stored(state, "embedding").dtype, attempts)
    classes = classes_of(batch, documents, arrivals, rows, options, attempts.ranks)
    with full_precision(queries):
        scores = batch_scores(similarity, queries, classes, options, batch.false_negatives)
    return _Classes(arrivals, scores, scores.logits.detach().logsumexp(1))


def _encoded_first(state: TensorDictBase, batch: Batch, encode: Encoder, options: StepOptions) -> Tensor | None:
    """[N, D] the documents, if the draws depend on their scores."""
    if not options.for_batch and not needs_positives(batch.false_negatives):
        return None
    features = copied(cast(Features, batch.features))  # the encoder may write into them
    return encode_checked(encode, features, batch.rows, stored(state, "embedding"))


def _exclusions(
    similarity: Similarity, queries: Tensor, documents: Tensor | None, batch: Batch, options: StepOptions
) -> Exclusions:
    """The documents that must not be drawn; `documents` come from `_encoded_first`."""
    positives = None
    if documents is not None and needs_positives(batch.false_negatives):
        with torch.no_grad(), full_precision(queries):  # a limit is a constant
            positives = positive_scores(similarity, queries, documents, batch.positive_rows)
    known = known_ids(batch.ids, queries.shape[0], options, batch.positive_rows)
    return Exclusions.of(queries, known, batch.false_negatives, similarity.dtype, positives)


def _drawn_by_all(draw: Draw, embeddings: Tensor, shared: SharedDraws | None, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The slots that all ranks have drawn, and their fresh embeddings."""
    if shared is not None:
        return shared.slot, shared.negatives
    slots, fresh = ranks.gather_all(draw.slot.flatten(), embeddings)
    return slots, fresh
