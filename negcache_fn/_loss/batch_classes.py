"""The documents of a batch as classes of each query's softmax, and their scores.

With in-batch classes every document is a class of every query, except for its false negatives: another document with
the id of its positive, a second document of any id, and those that `FalseNegatives` excludes by id or by score.

A query has one positive, the document in its own row, or those that `positive_rows` names. Each of these has a softmax
of its own, over itself and the negatives: the others are left out (the decoupled softmax of Gupta, Khatri, Rawat,
Bhojanapalli, Jain, Dhillon, ICLR 2024, section 4).
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from negcache_fn._cache.ids import among, first_of_each
from negcache_fn._checks import check_embeddings, check_positive_rows, check_rows
from negcache_fn._options import StepOptions
from negcache_fn._ranks.group import Ranks, positives_first
from negcache_fn._scores.definition import Similarity, full_precision
from negcache_fn._scores.exclude import (
    FalseNegatives,
    Labels,
    check_false_negatives,
    max_score_of,
    needs_positives,
)

__all__ = [
    "BatchScores",
    "Classes",
    "batch_classes",
    "batch_scores",
    "check_batch",
    "check_targets",
    "known_ids",
    "labels_of_classes",
    "positive_scores",
    "targets_among",
    "trained_queries",
    "try_limits",
    "without_idle",
]

_INFINITY = float("inf")


class Classes(NamedTuple):
    """The documents that are classes of every query."""

    documents: Tensor  # [N, D]
    ids: Tensor | None  # [N]
    log_weights: Tensor | None  # [N]
    first: int  # the positive of query i is document first + i
    targets: Tensor | None = None  # [B, P] or those of these numbers, -1: none
    labels: Tensor | None = None  # [N]
    trained: Tensor | None = None  # [] see `trained_queries`


class BatchScores(NamedTuple):
    """The scores of the batch's documents."""

    logits: Tensor  # [B, N], or [B, 1] without in-batch classes; -inf: not a class of this query
    positive: Tensor  # [B]; it is one of the logits. With `is_target` [B, P], and no logit
    is_target: Tensor | None = None  # [B, P] bool: whether there is such a positive; None: one for every query
    trained: Tensor | None = None  # [] see `trained_queries`

    @property
    def trains(self) -> Tensor | None:
        """[B] bool: whether the query has a positive; None: all have."""
        return None if self.is_target is None else self.is_target.any(1)


def check_batch(
    queries: Tensor,
    documents: Tensor,
    ids: Tensor | None,
    log_weights: Tensor | None,
    false_negatives: FalseNegatives,
    positives: Tensor | None,
    options: StepOptions,
    slots: int | None = None,
) -> None:
    """Raises unless the documents fit the queries, and the facts about the documents and the slots fit them."""
    check_embeddings("documents", documents, queries, at_least=queries.shape[0])
    labelled = documents.shape[0] if options.batch_is_classes else None
    check_false_negatives(false_negatives, queries, knows_positives=True, documents=labelled, slots=slots)
    check_targets(positives, queries, documents.shape[0], false_negatives)
    if ids is not None:
        check_rows("ids", ids, torch.int64, documents.shape[0], queries.device)
    if log_weights is not None:
        check_rows("log_weights", log_weights, None, documents.shape[0], queries.device)


def check_targets(positives: Tensor | None, queries: Tensor, documents: int, false_negatives: FalseNegatives) -> None:
    """Raises unless they are rows of the documents for each query, and the limits know which score to go by."""
    if positives is None:
        return
    check_positive_rows(positives, queries, documents)
    if needs_positives(false_negatives) and positives.shape[1] > 1:
        raise ValueError(
            f"false_negatives.max_score is a function of the positive's score, and positive_rows has shape "
            f"{tuple(positives.shape)}; expected one positive for each query, or the limits [{queries.shape[0]}]"
        )


def without_idle(queries: Tensor, positives: Tensor | None) -> Tensor:
    """The queries, zero where they have no positive: whatever is there, no gradient comes from it."""
    return queries if positives is None else torch.where((positives >= 0).any(1, keepdim=True), queries, 0.0)


def targets_among(positives: Tensor | None, queries: int, documents: int, ranks: Ranks) -> Tensor | None:
    """The numbers that this rank's `positives` have among the documents of all ranks, positives first."""
    if positives is None or ranks.name is None:
        return positives
    own, others = ranks.rank * queries, ranks.size * queries + ranks.rank * (documents - queries) - queries
    number = positives + torch.where(positives < queries, own, others)
    # A row that this rank does not have stays an error, and is not one of the next rank.
    return torch.where(positives < 0, -1, torch.where(positives < documents, number, ranks.size * documents))


def trained_queries(positives: Tensor | None, options: StepOptions, ranks: Ranks) -> Tensor | None:
    """[] how many queries have a positive, the mean over the ranks: a mean loss divides by it. None: all have.

    So the average of the ranks' losses is the mean over all queries, wherever the idle ones are.
    """
    if positives is None or not options.averages_losses:
        return None
    count = (positives >= 0).any(1).sum()
    if ranks.name is None:
        return count.clamp(min=1)
    return ranks.all_sum(count.double()).clamp(min=1) / ranks.size


def try_limits(
    similarity: Similarity,
    queries: Tensor,
    documents: Tensor,
    false_negatives: FalseNegatives,
    positives: Tensor | None,
) -> None:
    """Raises unless a user's function of the positives' scores works: before a message, so that all can be told."""
    if needs_positives(false_negatives):
        with torch.no_grad(), full_precision(queries):
            found = positive_scores(similarity, queries, documents, positives)
            max_score_of(false_negatives, queries, similarity.dtype, found)


def batch_classes(
    queries: int,
    documents: Tensor,
    ids: Tensor | None,
    log_weights: Tensor | None,
    options: StepOptions,
    ranks: Ranks,
    positives: Tensor | None = None,
    labels: Labels | None = None,
) -> Classes:
    """The batch's own documents, or those of all ranks."""
    labelled, trained = labels_of_classes(labels, queries, options, ranks), trained_queries(positives, options, ranks)
    if not options.all_ranks_in_batch:
        return Classes(documents, ids, log_weights, 0, positives, labelled, trained)
    positives = targets_among(positives, queries, documents.shape[0], ranks)
    documents = positives_first(ranks.gather(documents), queries, ranks)
    ids = None if ids is None else positives_first(ranks.gather(ids), queries, ranks)
    log_weights = None if log_weights is None else positives_first(ranks.gather(log_weights), queries, ranks)
    return Classes(documents, ids, log_weights, ranks.rank * queries, positives, labelled, trained)


def labels_of_classes(labels: Labels | None, queries: int, options: StepOptions, ranks: Ranks) -> Tensor | None:
    """[N] those of the batch's documents, or of all ranks' in the order of `Classes`; None without labels."""
    if labels is None or labels.documents is None or not options.batch_is_classes:
        return None
    if not options.all_ranks_in_batch:
        return labels.documents
    return positives_first(ranks.gather_all(labels.documents)[0], queries, ranks)


def known_ids(ids: Tensor | None, queries: int, options: StepOptions, positives: Tensor | None = None) -> Tensor | None:
    """The ids that must not be drawn: those of the whole batch if it is classes, else of each query's positives."""
    if ids is None:
        return None
    if options.batch_is_classes:
        return ids
    return ids[:queries, None] if positives is None else _ids_of(ids, positives)


def positive_scores(
    similarity: Similarity, queries: Tensor, documents: Tensor, positives: Tensor | None = None
) -> Tensor:
    """[B] the scores of the positives, or of the first of each query's, without log-weights."""
    first = documents[: queries.shape[0]] if positives is None else documents[positives[:, 0].clamp(min=0)]
    return similarity.rowwise(queries, first[:, None, :])[:, 0]


def batch_scores(
    similarity: Similarity, queries: Tensor, classes: Classes, options: StepOptions, false_negatives: FalseNegatives
) -> BatchScores:
    """The logits of the batch's classes, and of the positives."""
    if classes.targets is not None or not options.weights_count_everywhere:
        return _scores_and_targets(similarity, queries, classes, options, false_negatives)
    rows, first, log_weights = queries.shape[0], classes.first, classes.log_weights
    if not options.batch_is_classes:
        positive = similarity.of_positives.rowwise(queries, classes.documents[:rows, None, :])
        if log_weights is not None:
            positive = positive + log_weights[:rows, None]
        return BatchScores(positive, positive[:, 0])
    products = similarity.pairwise(queries, classes.documents)
    scores = products if log_weights is None else products + log_weights
    own = torch.arange(rows, device=scores.device)[:, None] + first
    scores = _with_positives(scores, similarity, queries, classes, own)
    positive = scores.gather(1, own).squeeze(1)
    with torch.no_grad():  # a document is a class or not
        none = _no_classes(products, own, classes, false_negatives)
    return BatchScores(scores if none is None else scores.masked_fill(none, -_INFINITY), positive)


def _scores_and_targets(
    similarity: Similarity, queries: Tensor, classes: Classes, options: StepOptions, false_negatives: FalseNegatives
) -> BatchScores:
    """With the positives of each query apart from its negatives."""
    rows, targets, log_weights = queries.shape[0], classes.targets, classes.log_weights
    if targets is None:
        targets = torch.arange(rows, device=queries.device)[:, None] + classes.first
    is_target, place = targets >= 0, targets.clamp(min=0)
    if not options.batch_is_classes:
        positive = similarity.of_positives.rowwise(queries, classes.documents[place])
        negatives = positive.new_full((rows, 1), -_INFINITY)
        weights = None if log_weights is None else log_weights[place]
    else:
        products = similarity.pairwise(queries, classes.documents)
        if similarity.weighs_negatives:
            positive = similarity.of_positives.rowwise(queries, classes.documents[place])
        else:
            positive = products.gather(1, place)
        with torch.no_grad():  # a document is a class or not
            none = _no_classes(products, targets, classes, false_negatives)
            own = _rows_among(targets, products.shape[1])
            none = own if none is None else none | own
        negatives = products if log_weights is None else products + log_weights
        negatives = negatives.masked_fill(none, -_INFINITY)
        weights = None if log_weights is None else log_weights[place]
    if weights is not None and options.weights_count_everywhere:
        positive = positive + weights
    return BatchScores(negatives, torch.where(is_target, positive, 0.0), is_target, classes.trained)


def _with_positives(scores: Tensor, similarity: Similarity, queries: Tensor, classes: Classes, own: Tensor) -> Tensor:
    """The scores [B, N], without hardness where the document is the positive, in column `own` [B, 1]."""
    if not similarity.weighs_negatives:
        return scores
    positive = similarity.of_positives.rowwise(queries, classes.documents[own])
    weights = 0.0 if classes.log_weights is None else classes.log_weights[own]
    return scores.scatter(1, own, positive + weights)


def _no_classes(products: Tensor, own: Tensor, classes: Classes, false_negatives: FalseNegatives) -> Tensor | None:
    """[B, N] bool: the documents that are not classes of a query, whose positives are its `own`; None: all are."""
    ids = classes.ids
    none: list[Tensor] = []
    if ids is not None:
        first, rows = classes.first, own.shape[0]
        of_positives = ids[first : first + rows, None] if classes.targets is None else _ids_of(ids, classes.targets)
        none.append(among(ids, of_positives))
        none.append(~first_of_each(ids)[None])
        if false_negatives.ids is not None:
            none.append(among(ids, false_negatives.ids))
    if classes.labels is not None and false_negatives.labels is not None:
        none.append(among(classes.labels, false_negatives.labels.queries[:, None]))
    positive = products.gather(1, own[:, :1].clamp(min=0))[:, 0] if needs_positives(false_negatives) else None
    limit = max_score_of(false_negatives, products, products.dtype, positive)
    if limit is not None:
        none.append(products > limit[:, None])
    if not none:
        return None
    return functools.reduce(torch.logical_or, none) & ~_rows_among(own, products.shape[1])


def _rows_among(own: Tensor, documents: int) -> Tensor:
    """[B, P] -> [B, N] bool: which of the documents these are; -1: none."""
    if own.shape[1] == 1:
        return torch.arange(documents, device=own.device) == own
    found = torch.zeros(own.shape[0], documents + 1, dtype=torch.bool, device=own.device)
    return found.scatter(1, torch.where(own >= 0, own, documents), True)[:, :documents]


def _ids_of(ids: Tensor, positives: Tensor) -> Tensor:
    """[B, P] the ids of the positives, -1 where there is none."""
    return torch.where(positives >= 0, ids[positives.clamp(min=0)], -1)
