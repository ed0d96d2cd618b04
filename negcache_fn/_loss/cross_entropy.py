"""The loss: softmax cross entropy over batch and cache, the cache entering as a single class.

    loss_i = logsumexp(s_positive, [in-batch scores], c_i) - s_positive

`c_i` is the log-sum-exp of query i's scores over the cache (`exact_loss`), or the estimate of it whose gradient comes
from the drawn documents (`loss`; see `cache_class`). Several positives of a query have such a loss each, without the
others among its classes, and the query has their mean.

Source: Lindgren, Reddi, Guo, Kumar, NeurIPS 2021. Proofs: docs/method.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from negcache_fn._checks import check_embeddings, check_scale, check_transforms
from negcache_fn._draws.draw import Draw, check_draw
from negcache_fn._loss.batch_classes import (
    BatchScores,
    batch_classes,
    batch_scores,
    check_batch,
    try_limits,
)
from negcache_fn._loss.cache_class import CacheClass, estimate_cache_logit, gather_draws
from negcache_fn._options import InBatch, Reduction, ScoreTransform, StalenessCorrection, StepOptions
from negcache_fn._ranks.agree import check_ranks_agree, checking_arguments
from negcache_fn._ranks.group import Ranks, ranks_of
from negcache_fn._scores.definition import Similarity, full_precision, in_dtype
from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES, FalseNegatives
from negcache_fn._scores.stream import logsumexp

__all__ = [
    "Terms",
    "cross_entropy",
    "log_share_of_cache",
    "loss",
    "losses_of_positives",
    "mean_of_positives",
    "reduced",
    "reduced_loss",
    "terms_of_draw",
]

_INFINITY = float("inf")


class Terms(NamedTuple):
    """The classes of every query's softmax."""

    batch: BatchScores
    cache: CacheClass


def loss(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor,
    draw: Draw,
    *,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    hardness: float = 0,
    in_batch: InBatch = True,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    positive_rows: Tensor | None = None,
    share_draws: bool = True,
    staleness_correction: StalenessCorrection = "self_normalized",
    weigh_positives: bool = True,
    reduction: Reduction = "mean",
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Cross entropy of each query's positive against batch and cache, from the draws' fresh embeddings.

    The cache is one class, with a logit `c_i` (see `docs/method.md`). If nothing is stale, draws for the batch give the
    value of the exact softmax and its gradients to `queries` and `scale`, for any draw; the expected gradient
    to `negatives` is right ("none": exactly; "self_normalized": up to O(1/M)). With draws of each query the value is
    exact, and the expected gradients are those of the exact softmax ("none": exactly; "self_normalized": up to O(1/k)).

    Args:
        queries: [B, D] floating.
        documents: [N, D] floating, N >= B. Row i < B is the positive of query i; the others are further candidates,
            and count only with `in_batch`.
        negatives: [R * m, D] floating: the fresh embeddings of the drawn documents, in the order of
            `draw.slot.flatten()`.
        draw: the result of `sample_gumbel` for these queries, with the same scale and transform. For the batch, its
            `log_normalizer` carries the gradient of the whole cache to `queries` and `scale`, so draw with the same
            `queries`, not detached.
        scale: number or 0-d tensor, learnable.
        score_transform: elementwise function of the scaled inner products.
        hardness: weight of negatives by their similarity, see `StepOptions`; draw with the same.
        in_batch: whether all documents are classes of every query; "global": those of all ranks.
        ids: [N] int64 ids of the documents, -1 where anonymous. A document with the id of a query's positive is not
            among its negatives, and of several documents with one id only the first is a class. Pass the same ids as
            `exclude_ids` when drawing (all of them with `in_batch`, else `ids[:B, None]`); `step` does.
        log_weights: [N] floating, added to the documents' scores (log-Q correction, importance).
        false_negatives: documents of the batch to exclude from a query's negatives; the draw has excluded those of
            the cache.
        positive_rows: [B, P] int64, the rows of `documents` that are positives of each query, -1 where there are fewer;
            instead of row i for query i. With the set P_i of them and `Z_i` the sum of `exp(score)` over its negatives,
            the loss is the mean over p in P_i of `-log(exp(s_ip) / (exp(s_ip) + Z_i))`: each has a softmax of its own,
            without the others. A query that has none has the loss 0, and is not in the mean. Pass the ids of all its
            positives as `exclude_ids` when drawing; `step` does.
        share_draws: with draws of each query, whether every query uses every draw (multiple importance sampling with
            the balance heuristic).
        staleness_correction: "self_normalized": in expectation, the loss of the fresh softmax, up to O(1/M) or O(1/k);
            "none": no correction for drift, except to first order with draws for the batch.
        weigh_positives: whether a document's log-weight counts where it is the positive, too; see `StepOptions`.
        reduction: "mean", "sum" or "none".
        group: ranks that share their draws. The loss covers this rank's queries; the gradient of this rank's embeddings
            is the gradient of the sum of all ranks' losses.

    Returns:
        [] or, with reduction "none", [B]; float32 or wider. Differentiable in `queries`, `documents`, `negatives` and
        `scale`. A query without cached documents gets the in-batch loss, or 0 without in-batch classes. A query whose
        softmax contains cached documents but none of the draws gets the cache's log-sum-exp as it is.

    Raises:
        ValueError, TypeError: invalid shapes, dtypes or devices, fewer documents than queries, an unknown
            `staleness_correction` or `reduction`.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> state = update(state, torch.ones(6, 3), torch.randn(6, 4))
        >>> queries, documents = torch.randn(2, 4), torch.randn(2, 4)
        >>> draw = sample_gumbel(state, queries, draws_per_query=3)
        >>> loss(queries, documents, draw.embedding.flatten(0, 1), draw).shape
        torch.Size([])

    Reference: Lindgren et al., NeurIPS 2021, equations 5-8; Veach and Guibas, SIGGRAPH 1995, section 3.3; several
    positives: Gupta et al., ICLR 2024, section 4.
    """
    ranks = ranks_of(group)
    with checking_arguments(ranks):
        check_transforms("loss", vmap=True)
        check_draw("draw", draw)
        options = StepOptions(
            draws_per_query=None if draw.for_batch else draw.slot.shape[1],
            score_transform=score_transform,
            hardness=hardness,
            in_batch=in_batch,
            share_draws=share_draws,
            staleness_correction=staleness_correction,
            weigh_positives=weigh_positives,
            reduction=reduction,
        )
    facts = (ids, log_weights, false_negatives, positive_rows)
    return reduced_loss(terms_of_draw(queries, documents, negatives, draw, scale, facts, options, ranks), options)


def terms_of_draw(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor,
    draw: Draw,
    scale: float | Tensor,
    facts: tuple[Tensor | None, Tensor | None, FalseNegatives, Tensor | None],
    options: StepOptions,
    ranks: Ranks,
) -> Terms:
    """The classes from which `loss` is made; the facts are ids, log-weights, false negatives and positive rows."""
    ids, log_weights, false_negatives, positive_rows = facts
    with checking_arguments(ranks):
        options.check_group(ranks.name is None)
        check_embeddings("queries", queries, draw.embedding, rows=draw.log_normalizer.shape[0])
        check_embeddings("negatives", negatives, queries, rows=draw.slot.numel())
        check_scale(scale, queries.device)
        check_batch(queries, documents, ids, log_weights, false_negatives, positive_rows, options)
        _check_labels_of_draw(draw, false_negatives, options)
        if draw.for_batch and torch.is_grad_enabled() and queries.requires_grad:
            _check_gradient_of_draw(draw)
        if ranks.name is not None:
            similarity = Similarity.of(options, scale, draw.log_normalizer.dtype)
            try_limits(similarity, queries, documents, false_negatives, positive_rows)
    queries, _ = check_ranks_agree(
        ranks,
        queries,
        0,
        function="loss",
        options=options,
        scale=scale,
        rows={
            "documents": documents,
            "log_weights": log_weights,
            "negatives": negatives,
            "draw.embedding": draw.embedding[0],
            "draw.score": draw.score[0],
        },
        numbers={
            "queries": queries.shape[0],
            "documents": documents.shape[0],
            "draws": draw.slot.numel(),
            "positive_rows": 0 if positive_rows is None else positive_rows.shape[1],
        },
        choices={
            "ids": ids is not None,
            "log_weights": log_weights is not None,
            "labels": false_negatives.labels is not None,
            "labels of the draw": draw.exclude_labels.shape[1] > 0,
        },
    )
    labels = false_negatives.labels
    classes = batch_classes(queries.shape[0], documents, ids, log_weights, options, ranks, positive_rows, labels)
    shared = gather_draws(negatives, draw, ranks) if options.share_draws else None
    queries, scale = in_dtype(queries, scale, draw.log_normalizer.dtype)
    similarity = Similarity.of(options, scale, draw.log_normalizer.dtype)
    with full_precision(queries):
        batch = batch_scores(similarity, queries, classes, options, false_negatives)
        cache = estimate_cache_logit(similarity, queries, negatives, draw, shared, options)
    return Terms(batch, cache)


def _check_labels_of_draw(draw: Draw, false_negatives: FalseNegatives, options: StepOptions) -> None:
    """Raises if batch and cache would exclude different labels."""
    labelled, drawn_with = false_negatives.labels is not None, draw.exclude_labels.shape[1] > 0
    if labelled and not drawn_with:
        raise ValueError(
            "false_negatives.labels is given and the draw has none; expected them in sample_gumbel as well"
        )
    if drawn_with and not labelled and options.batch_is_classes:
        raise ValueError("false_negatives.labels is None and the draw has labels; expected those that it was made with")


def _check_gradient_of_draw(draw: Draw) -> None:
    """Raises if the queries' gradient from the whole cache, which the draw carries, was cut."""
    if not draw.log_normalizer.requires_grad:
        raise ValueError(
            "draw.log_normalizer has no gradient; expected that of the queries, which require one: call sample_gumbel "
            "on them, not detached and not under torch.no_grad()"
        )


def cross_entropy(batch: BatchScores, cache_logit: Tensor) -> Tensor:
    """[B]: the loss of each query, the cache being one class."""
    logits = torch.cat([batch.logits, cache_logit[:, None]], dim=1)
    # Without targets the positive is among the logits, which are not all -inf.
    log_total = logits.logsumexp(1) if batch.is_target is None else logsumexp(logits)
    return mean_of_positives(losses_of_positives(batch, log_total), batch)


def losses_of_positives(batch: BatchScores, log_total: Tensor) -> Tensor:
    """[B, P]: the loss of each positive, 0 where there is none; `log_total` [B] is the log-sum-exp of all logits."""
    if batch.is_target is None:
        return (log_total - batch.positive)[:, None]
    has_any = log_total != -_INFINITY  # where there are no negatives the loss is 0, with derivatives of every order
    relative = torch.where(has_any, log_total, 0.0)[:, None] - batch.positive
    losses = torch.logaddexp(relative, torch.zeros_like(relative))
    return torch.where(batch.is_target & has_any[:, None], losses, 0.0)


def mean_of_positives(values: Tensor, batch: BatchScores) -> Tensor:
    """[B, P] -> [B]: the mean over a query's positives; 0 where it has none, as have the values there."""
    if batch.is_target is None:
        return values[:, 0]
    return values.sum(1) / batch.is_target.sum(1).clamp(min=1)


def log_share_of_cache(batch: BatchScores, of_batch: Tensor, log_normalizer: Tensor) -> Tensor:
    """[B]: logarithm of the share of the cached documents in the query's softmax, on average over its positives.

    -inf where it has none. `of_batch` [B] is the log-sum-exp of the batch's logits. Without gradient.
    """
    if batch.is_target is None:
        return torch.nn.functional.logsigmoid(log_normalizer - of_batch)
    with_positive = torch.logaddexp(of_batch[:, None], batch.positive.detach())
    shares = torch.nn.functional.logsigmoid(log_normalizer[:, None] - with_positive)
    mean = logsumexp(torch.where(batch.is_target, shares, -_INFINITY))
    return mean - batch.is_target.sum(1).clamp(min=1).log().to(mean.dtype)


def reduced_loss(terms: Terms, options: StepOptions) -> Tensor:
    """The cross entropies, reduced."""
    return reduced(cross_entropy(terms.batch, terms.cache.logit), options, terms.batch.trained)


def reduced(losses: Tensor, options: StepOptions, trained: Tensor | None = None) -> Tensor:
    """[B] -> [] by "mean", over the queries that have a positive, or "sum"; as it is with "none"."""
    if options.reduction == "none":
        return losses
    if options.reduction == "sum":
        return losses.sum()
    return losses.mean() if trained is None else losses.sum() / trained.to(losses.dtype)
