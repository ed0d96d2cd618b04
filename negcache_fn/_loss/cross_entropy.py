"""The loss: softmax cross entropy over batch and cache, the cache entering as a single class.

    loss_i = logsumexp(s_positive, [in-batch scores], c_i) - s_positive

`c_i` is the log-sum-exp of query i's scores over the cache (`exact_loss`), or the estimate of it whose gradient comes
from the drawn documents (`loss`; see `cache_class`).

Source: Lindgren, Reddi, Guo, Kumar, NeurIPS 2021. Proofs: docs/method.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from negcache_fn._checks import check_embeddings, check_scale, check_transforms
from negcache_fn._draws.draw import Draw, check_draw
from negcache_fn._loss.batch_classes import batch_classes, batch_scores, check_batch, try_limits
from negcache_fn._loss.cache_class import CacheClass, estimate_cache_logit, gather_draws
from negcache_fn._options import InBatch, Reduction, ScoreTransform, StalenessCorrection, StepOptions
from negcache_fn._ranks.agree import check_ranks_agree, checking_arguments
from negcache_fn._ranks.group import ranks_of
from negcache_fn._scores.definition import Similarity, full_precision, in_dtype
from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES, FalseNegatives

__all__ = ["Terms", "cross_entropy", "loss", "reduced"]


class Terms(NamedTuple):
    """The classes of every query's softmax."""

    batch_logits: Tensor  # [B, N], or [B, 1] without in-batch classes; -inf: not a class of this query
    positive: Tensor  # [B]
    cache: CacheClass


def loss(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor,
    draw: Draw,
    *,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    in_batch: InBatch = True,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    share_draws: bool = True,
    staleness_correction: StalenessCorrection = "self_normalized",
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
        in_batch: whether all documents are classes of every query; "global": those of all ranks.
        ids: [N] int64 ids of the documents, -1 where anonymous. A document with the id of a query's positive is not
            among its negatives, and of several documents with one id only the first is a class. Pass the same ids as
            `exclude_ids` when drawing (all of them with `in_batch`, else `ids[:B, None]`); `step` does.
        log_weights: [N] floating, added to the documents' scores (log-Q correction, importance).
        false_negatives: documents of the batch to exclude from a query's negatives; the draw has excluded those of
            the cache.
        share_draws: with draws of each query, whether every query uses every draw (multiple importance sampling with
            the balance heuristic).
        staleness_correction: "self_normalized": the expected loss is that of the fresh softmax, up to O(1/M) or O(1/k);
            "none": drift is not corrected, except to first order with draws for the batch.
        reduction: "mean", "sum" or "none".
        group: ranks that share their draws. The loss is that of this rank's queries; the gradient of this rank's
            embeddings is that of the sum of all ranks' losses.

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

    Reference: Lindgren et al., NeurIPS 2021, equations 5-8; Veach and Guibas, SIGGRAPH 1995, section 3.3.
    """
    ranks = ranks_of(group)
    with checking_arguments(ranks):
        check_transforms("loss", vmap=True)
        check_draw("draw", draw)
        options = StepOptions(
            draws_per_query=None if draw.for_batch else draw.slot.shape[1],
            score_transform=score_transform,
            in_batch=in_batch,
            share_draws=share_draws,
            staleness_correction=staleness_correction,
            reduction=reduction,
        )
        options.check_group(ranks.name is None)
        check_embeddings("queries", queries, draw.embedding, rows=draw.log_normalizer.shape[0])
        check_embeddings("negatives", negatives, queries, rows=draw.slot.numel())
        check_scale(scale, queries.device)
        check_batch(queries, documents, ids, log_weights, false_negatives)
        if draw.for_batch and torch.is_grad_enabled() and queries.requires_grad:
            _check_gradient_of_draw(draw)
        if group is not None:
            similarity = Similarity.of(options, scale, draw.log_normalizer.dtype)
            try_limits(similarity, queries, documents, false_negatives)
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
        },
        choices={"ids": ids is not None, "log_weights": log_weights is not None},
    )
    classes = batch_classes(queries.shape[0], documents, ids, log_weights, options, ranks)
    shared = gather_draws(negatives, draw, ranks) if share_draws else None
    queries, scale = in_dtype(queries, scale, draw.log_normalizer.dtype)
    similarity = Similarity.of(options, scale, draw.log_normalizer.dtype)
    with full_precision(queries):
        batch_logits, positive = batch_scores(similarity, queries, classes, options, false_negatives)
        cache = estimate_cache_logit(similarity, queries, negatives, draw, shared, options)
    return reduced(cross_entropy(batch_logits, cache.logit, positive), options)


def _check_gradient_of_draw(draw: Draw) -> None:
    """Raises if the queries' gradient from the whole cache, which the draw carries, was cut."""
    if not draw.log_normalizer.requires_grad:
        raise ValueError(
            "draw.log_normalizer has no gradient; expected that of the queries, which require one: call sample_gumbel "
            "on them, not detached and not under torch.no_grad()"
        )


def cross_entropy(batch_logits: Tensor, cache_logit: Tensor, positive: Tensor) -> Tensor:
    """[B]: the loss of each query, with the cache as one class."""
    return torch.cat([batch_logits, cache_logit[:, None]], dim=1).logsumexp(1) - positive


def reduced(losses: Tensor, options: StepOptions) -> Tensor:
    """[B] -> [] by "mean" or "sum"; as it is with "none"."""
    if options.reduction == "none":
        return losses
    return losses.mean() if options.reduction == "mean" else losses.sum()
