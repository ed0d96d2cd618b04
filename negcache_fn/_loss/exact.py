"""The cross entropy over the whole cache, exact and differentiable: the target of `loss` for the cache as it is.

Source: Lindgren, Reddi, Guo, Kumar, NeurIPS 2021, equation 1.
"""

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.state import scalar, stored
from negcache_fn._checks import check_size, check_transforms, transforms_around
from negcache_fn._loss.batch_classes import (
    batch_classes,
    batch_scores,
    check_batch,
    known_ids,
    positive_scores,
    try_limits,
    without_idle,
)
from negcache_fn._loss.cross_entropy import cross_entropy, reduced
from negcache_fn._options import InBatch, Reduction, ScoreTransform, StepOptions
from negcache_fn._ranks.agree import check_ranks_agree, checking_arguments
from negcache_fn._ranks.group import Shards, ranks_of
from negcache_fn._scores.definition import (
    ScoreMatrix,
    Similarity,
    check_search,
    dtype_of_scores,
    full_precision,
    in_dtype,
    score_matrix,
)
from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES, Exclusions, FalseNegatives, needs_positives
from negcache_fn._scores.hardest import hardest_of_all, logsumexp_at
from negcache_fn._scores.stream import logsumexp, summarize

__all__ = ["exact_loss"]


def exact_loss(
    state: TensorDictBase,
    queries: Tensor,
    documents: Tensor,
    *,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    hardness: float = 0,
    in_batch: InBatch = True,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    positive_rows: Tensor | None = None,
    top_k: int | None = None,
    weigh_positives: bool = True,
    reduction: Reduction = "mean",
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """The cross entropy of `loss` without sampling, over the whole cache with its stale embeddings.

    Naive equivalent: `logsumexp(cat([batch_scores, score(state, queries)], 1), 1) - positive_score`. One streaming
    pass makes the value and the gradient, or two with a `score_transform`: no tensor of [B, C] (with `top_k`, one of
    [B, top_k, D]).

    It supports every transform of torch.func (grad, hessian, jvp, vmap) and forward-mode differentiation. The streaming
    pass does not, so under one of them plain torch computes all scores [B, C]. `backward` works once: for second
    derivatives, use `torch.func.hessian` or a `jvp` of `grad`.

    Args:
        state: the cache; cached documents with one of the `ids` are left out, as in `loss`.
        queries: [B, D] floating.
        documents: [N, D] floating, N >= B, as in `loss`.
        scale: number or 0-d tensor, learnable.
        score_transform: elementwise function of the scaled inner products.
        hardness: weight of negatives by their similarity, see `StepOptions`.
        in_batch: as in `loss`.
        ids: [N] int64, as in `loss`.
        log_weights: [N] floating, as in `loss`.
        false_negatives: documents of the batch and of the cache to exclude from a query's negatives.
        positive_rows: [B, P] int64, as in `loss`.
        top_k: restricts the cache to each query's `top_k` highest scores.
        weigh_positives: as in `loss`.
        reduction: "mean", "sum" or "none".
        group: ranks over which the cache is sharded; gradients as in `loss`.

    Returns:
        [] or, with reduction "none", [B]. Differentiable in `queries`, `documents` and `scale`; the cache is constant.

    Raises:
        ValueError, TypeError: as `loss`; `top_k` not in 1 ... C.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> exact_loss(state, torch.randn(2, 4), torch.randn(2, 4), in_batch=False)
        tensor(0.)

    Reference: Lindgren et al., NeurIPS 2021, equation 1.
    """
    ranks = ranks_of(group)
    with checking_arguments(ranks):
        if group is not None:  # messages have one derivative, the plain one
            check_transforms("exact_loss with a group", queries, documents, scale)
        options = StepOptions(
            score_transform=score_transform,
            hardness=hardness,
            in_batch=in_batch,
            top_k=top_k,
            weigh_positives=weigh_positives,
            reduction=reduction,
        )
        options.check_group(ranks.name is None)
        check_search(state, queries, scale)
        capacity = stored(state, "embedding").shape[0]
        check_batch(queries, documents, ids, log_weights, false_negatives, positive_rows, options, capacity)
        if top_k is not None:
            check_size("top_k", top_k, most=capacity if group is None else None)
        if group is not None:
            similarity = Similarity.of(options, scale, dtype_of_scores(state, queries))
            try_limits(similarity, queries, documents, false_negatives, positive_rows)
    with full_precision(queries):
        rows = queries.shape[0]
        queries, shards = check_ranks_agree(
            ranks,
            queries,
            capacity,
            function="exact_loss",
            options=options,
            scale=scale,
            seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
            rows={
                "state['items', 'embedding']": stored(state, "embedding"),
                "documents": documents,
                "log_weights": log_weights,
            },
            numbers={
                "queries": rows,
                "documents": documents.shape[0],
                "positive_rows": 0 if positive_rows is None else positive_rows.shape[1],
                "false_negatives.ids": 0 if false_negatives.ids is None else false_negatives.ids.shape[1],
            },
            choices={
                "ids": ids is not None,
                "log_weights": log_weights is not None,
                "max_score": false_negatives.max_score is not None,
                "labels": false_negatives.labels is not None,
            },
        )
        queries, scale = in_dtype(queries, scale, dtype_of_scores(state, queries))
        similarity = Similarity.of(options, scale, queries.dtype)
        queries = without_idle(queries, positive_rows)
        labels = false_negatives.labels
        classes = batch_classes(rows, documents, ids, log_weights, options, ranks, positive_rows, labels)
        batch = batch_scores(similarity, queries, classes, options, false_negatives)
        with torch.no_grad():  # a document is a negative or not
            scored = None
            if needs_positives(false_negatives):
                scored = positive_scores(similarity, queries, documents, positive_rows)
            known = known_ids(ids, rows, options, positive_rows)
            exclusions = Exclusions.of(queries, known, false_negatives, similarity.dtype, scored)
            _, of_all = exclusions.gathered(queries[:0], ranks)
        # Each shard's part of the sum is made where the shard is, for the queries of all ranks.
        matrix = score_matrix(state, ranks.gather(queries), similarity, of_all)
        if transforms_around():
            cache_logit = _of_all_scores(matrix, top_k)
        elif top_k is None:
            cache_logit = _over_all_ranks(summarize(matrix).log_normalizer, shards)
        else:
            with torch.no_grad():  # which ones they are is not differentiable
                scores, slots = hardest_of_all(matrix, top_k, shards)
            cache_logit = logsumexp_at(state, queries, similarity, scores, slots, shards)
        return reduced(cross_entropy(batch, cache_logit), options, batch.trained)


def _over_all_ranks(normalizers: Tensor, shards: Shards) -> Tensor:
    """[B] for this rank's queries, from each shard's normalisers [ranks * B] for the queries of all ranks."""
    ranks = shards.ranks
    return normalizers if ranks.name is None else logsumexp(ranks.by_rank(ranks.exchange(normalizers)).t())


def _of_all_scores(matrix: ScoreMatrix, top_k: int | None) -> Tensor:
    """[B] by plain torch, in memory O(B * C): with derivatives of every kind and order."""
    scores = matrix.scores()
    if top_k is not None:
        scores = scores.sort(dim=1, descending=True, stable=True).values[:, :top_k]
    return logsumexp(scores)
