"""The documents of a batch as classes of each query's softmax, and their scores.

With in-batch classes every document is a class of every query, except for its false negatives: another document with
the id of its positive, a second document of any id, and those that `FalseNegatives` excludes by id or by score.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from negcache_fn._cache.ids import first_of_each, named
from negcache_fn._checks import check_embeddings, check_rows
from negcache_fn._options import StepOptions
from negcache_fn._ranks.group import Ranks, positives_first
from negcache_fn._scores.definition import Similarity, full_precision
from negcache_fn._scores.exclude import FalseNegatives, check_false_negatives, max_score_of, needs_positives

__all__ = [
    "Classes",
    "batch_classes",
    "batch_scores",
    "check_batch",
    "known_ids",
    "positive_scores",
    "try_limits",
]

_INFINITY = float("inf")


class Classes(NamedTuple):
    """The documents that are classes of every query."""

    documents: Tensor  # [N, D]
    ids: Tensor | None  # [N]
    log_weights: Tensor | None  # [N]
    first: int  # the positive of query i is document first + i


def check_batch(
    queries: Tensor,
    documents: Tensor,
    ids: Tensor | None,
    log_weights: Tensor | None,
    false_negatives: FalseNegatives,
) -> None:
    """Raises unless the documents fit the queries, and the facts about the documents fit them."""
    check_embeddings("documents", documents, queries, at_least=queries.shape[0])
    check_false_negatives(false_negatives, queries, knows_positives=True)
    if ids is not None:
        check_rows("ids", ids, torch.int64, documents.shape[0], queries.device)
    if log_weights is not None:
        check_rows("log_weights", log_weights, None, documents.shape[0], queries.device)


def try_limits(similarity: Similarity, queries: Tensor, documents: Tensor, false_negatives: FalseNegatives) -> None:
    """Raises unless a user's function of the positives' scores works; before a message, so that all ranks can raise."""
    if needs_positives(false_negatives):
        with torch.no_grad(), full_precision(queries):
            max_score_of(false_negatives, queries, similarity.dtype, positive_scores(similarity, queries, documents))


def batch_classes(
    queries: int,
    documents: Tensor,
    ids: Tensor | None,
    log_weights: Tensor | None,
    options: StepOptions,
    ranks: Ranks,
) -> Classes:
    """The batch's own documents, or those of all ranks."""
    if not options.all_ranks_in_batch:
        return Classes(documents, ids, log_weights, 0)
    documents = positives_first(ranks.gather(documents), queries, ranks)
    ids = None if ids is None else positives_first(ranks.gather(ids), queries, ranks)
    log_weights = None if log_weights is None else positives_first(ranks.gather(log_weights), queries, ranks)
    return Classes(documents, ids, log_weights, ranks.rank * queries)


def known_ids(ids: Tensor | None, queries: int, options: StepOptions) -> Tensor | None:
    """The ids that must not be drawn: those of the whole batch if it is classes, else each query's positive."""
    if ids is None:
        return None
    return ids if options.batch_is_classes else ids[:queries, None]


def positive_scores(similarity: Similarity, queries: Tensor, documents: Tensor) -> Tensor:
    """[B] the scores of the positives, without log-weights."""
    return similarity.rowwise(queries, documents[: queries.shape[0], None, :])[:, 0]


def batch_scores(
    similarity: Similarity, queries: Tensor, classes: Classes, options: StepOptions, false_negatives: FalseNegatives
) -> tuple[Tensor, Tensor]:
    """Logits of the batch's classes [B, N] or [B, 1], and of the positives [B]."""
    rows, first, log_weights = queries.shape[0], classes.first, classes.log_weights
    if not options.batch_is_classes:
        positive = similarity.rowwise(queries, classes.documents[:rows, None, :])
        if log_weights is not None:
            positive = positive + log_weights[:rows, None]
        return positive, positive[:, 0]
    products = similarity.pairwise(queries, classes.documents)
    scores = products if log_weights is None else products + log_weights
    own = torch.arange(rows, device=scores.device)[:, None] + first
    positive = scores.gather(1, own).squeeze(1)
    with torch.no_grad():  # a document is a class or not
        none = _no_classes(products, own, classes, false_negatives)
    return scores if none is None else scores.masked_fill(none, -_INFINITY), positive


def _no_classes(products: Tensor, own: Tensor, classes: Classes, false_negatives: FalseNegatives) -> Tensor | None:
    """[B, N] bool: the documents that are not classes of a query; None: all are."""
    rows, ids = products.shape[0], classes.ids
    none: list[Tensor] = []
    if ids is not None:
        none.append((ids[classes.first : classes.first + rows, None] == ids) & named(ids))
        none.append(~first_of_each(ids)[None])
        if false_negatives.ids is not None:
            excluded = (ids[None, :, None] == false_negatives.ids[:, None, :]) & named(ids)[:, None]
            none.append(excluded.any(-1))
    limit = max_score_of(false_negatives, products, products.dtype, products.gather(1, own).squeeze(1))
    if limit is not None:
        none.append(products > limit[:, None])
    if not none:
        return None
    is_positive = torch.arange(products.shape[1], device=products.device) == own
    return functools.reduce(torch.logical_or, none) & ~is_positive
