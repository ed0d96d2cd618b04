"""The batch of a step: its documents and the facts about them, checked, and agreed on by the ranks."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.arrivals import Arrivals, capacity_of, check_facts
from negcache_fn._cache.state import COLUMNS, rows_of_cache, scalar, stored, stored_features
from negcache_fn._checks import check_embeddings
from negcache_fn._codec import as_sent
from negcache_fn._draws.sample import check_draws
from negcache_fn._features import Features, fit_to_slots, in_slots, leaves
from negcache_fn._loss.batch_classes import Classes, check_targets, labels_of_classes, targets_among, trained_queries
from negcache_fn._options import StepOptions
from negcache_fn._ranks.agree import check_ranks_agree
from negcache_fn._ranks.attempts import Attempts
from negcache_fn._ranks.group import Ranks, Shards
from negcache_fn._scores.exclude import FalseNegatives, check_false_negatives, limits_by, needs_positives

__all__ = ["Batch", "Facts", "agree_on_batch", "arrivals_of", "check_batch_of_step", "classes_of", "limits_told_to_all"]


class Batch(NamedTuple):
    """The documents of a step and the facts about them, checked."""

    features: Features  # as wide as the cache stores them, for the encoder
    to_store: Features  # in the dtypes that the cache stores
    fits: Tensor | None  # [N] whether each row, and its log-weight, can be stored; None: all can
    rows: int
    to_refresh: int  # how many of the stalest documents each rank encodes again
    ids: Tensor | None
    log_weights: Tensor | None
    cacheable: Tensor | None
    false_negatives: FalseNegatives
    priorities: Tensor | None
    positive_rows: Tensor | None


# The last fields of `Batch`.
Facts = tuple[Tensor | None, Tensor | None, Tensor | None, FalseNegatives, Tensor | None, Tensor | None]


def check_batch_of_step(
    state: TensorDictBase, queries: Tensor, features: Features, facts: Facts, options: StepOptions, ranks: Ranks
) -> Batch:
    """The batch, if features and facts fit the cache and the queries, and so many documents can be drawn."""
    ids, log_weights, cacheable, false_negatives, priorities, positive_rows = facts
    cached = stored(state, "embedding")
    most = cached.shape[0] // ranks.size if options.replicated else cached.shape[0]
    features, rows = _fit_features(state, queries, features, most, ranks)
    check_draws(state, options, ranks)
    check_facts(rows, cached, ids, log_weights, cacheable, priorities)
    labelled = rows if options.batch_is_classes else None
    slots = cached.shape[0]
    check_false_negatives(false_negatives, queries, knows_positives=True, documents=labelled, slots=slots)
    check_targets(positive_rows, queries, rows, false_negatives)
    to_store, fits = in_slots(stored_features(state), features)
    if log_weights is not None:
        weighted = log_weights.to(COLUMNS["log_weight"].dtype) < float("inf")  # not NaN either
        fits = weighted if fits is None else fits & weighted
    return Batch(features, to_store, fits, rows, options.slots_to_refresh(cached.shape[0], most), *facts)


def agree_on_batch(
    state: TensorDictBase, queries: Tensor, batch: Batch, scale: float | Tensor, options: StepOptions, ranks: Ranks
) -> tuple[Tensor, Shards]:
    """`check_ranks_agree` on everything that a step is given."""
    known, device = batch.false_negatives, queries.device.type
    autocast = _knows_autocast(device) and torch.is_autocast_enabled(device)
    return check_ranks_agree(
        ranks,
        queries,
        stored(state, "embedding").shape[0],
        function="step",
        options=options,
        scale=scale,
        seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
        rows={**rows_of_cache(state), "log_weights": batch.log_weights},
        numbers={
            "queries": queries.shape[0],
            "documents": batch.rows,
            "positive_rows": 0 if batch.positive_rows is None else batch.positive_rows.shape[1],
            "refresh_stalest": batch.to_refresh,
            "false_negatives.ids": 0 if known.ids is None else known.ids.shape[1],
        },
        choices={
            "ids": batch.ids is not None,
            "log_weights": batch.log_weights is not None,
            "max_score": "a function" if needs_positives(known) else known.max_score is not None,
            "labels": known.labels is not None,
            "priorities": None if batch.priorities is None else batch.priorities.dtype,
            "gradients": torch.is_grad_enabled(),
            "autocast": torch.get_autocast_dtype(device) if autocast else None,
        },
    )


@torch.compiler.assume_constant_result  # which torch 2.11 cannot trace
def _knows_autocast(device: str) -> bool:
    return torch.amp.autocast_mode.is_autocast_available(device)


def limits_told_to_all(batch: Batch, attempts: Attempts) -> Batch:
    """The batch; if a user's function of the positives' scores raises, or returns another shape, every rank raises."""
    if not needs_positives(batch.false_negatives):
        return batch
    function = cast("Callable[[Tensor], Tensor]", batch.false_negatives.max_score)

    def attempt(positives: Tensor) -> Tensor:
        return attempts.result(lambda: limits_by(function, positives), lambda: torch.zeros_like(positives))

    return batch._replace(false_negatives=batch.false_negatives._replace(max_score=attempt))


def arrivals_of(
    batch: Batch, documents: Tensor, queries: int, options: StepOptions, storage: torch.dtype, attempts: Attempts
) -> Arrivals:
    """The documents of all ranks; with a gradient to their embeddings [N, D] if the loss uses them, else as stored."""
    differentiable = options.all_ranks_in_batch
    embeddings = documents if differentiable else as_sent(documents.detach(), storage)
    facts = (batch.ids, batch.log_weights, batch.cacheable)
    arrivals = Arrivals.of(cast(Features, batch.to_store), embeddings, *facts, fits=batch.fits)
    return arrivals.gathered(queries, attempts.ranks, differentiable=differentiable, attempts=attempts)


def classes_of(
    batch: Batch, documents: Tensor, arrivals: Arrivals, queries: int, options: StepOptions, ranks: Ranks
) -> Classes:
    """The documents of this rank or of all ranks."""
    labels = labels_of_classes(batch.false_negatives.labels, queries, options, ranks)
    trained = trained_queries(batch.positive_rows, options, ranks)
    if options.all_ranks_in_batch:
        targets = targets_among(batch.positive_rows, queries, batch.rows, ranks)
        return Classes(
            arrivals.embeddings, arrivals.ids, arrivals.log_weights, ranks.rank * queries, targets, labels, trained
        )
    return Classes(documents, batch.ids, batch.log_weights, 0, batch.positive_rows, labels, trained)


def _fit_features(
    state: TensorDictBase, queries: Tensor, features: Features, most: int, ranks: Ranks
) -> tuple[Features, int]:
    """The features, as wide as the cache stores them, and the number of documents."""
    check_embeddings("queries", queries, stored(state, "embedding"), of="the cache")
    if queries.shape[0] > most:
        raise ValueError(f"queries has {queries.shape[0]} rows; expected at most {most}, {capacity_of(ranks)}")
    name, leaf = next(leaves(features), ("features", None))
    if leaf is None or leaf.ndim == 0:
        raise ValueError(f"{name} holds no rows; expected features of at least {queries.shape[0]} documents")
    rows = leaf.shape[0]
    if rows < queries.shape[0]:
        raise ValueError(f"{name} has {rows} rows; expected at least {queries.shape[0]}, the number of queries")
    if rows > most:
        raise ValueError(f"{name} has {rows} rows; expected at most {most}, {capacity_of(ranks)}")
    return fit_to_slots(stored_features(state), features, rows, "features", queries.device), rows
