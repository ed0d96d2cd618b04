"""The loss: softmax cross entropy over batch and cache, the cache entering as a single class.

    loss_i = logsumexp(s_positive, [in-batch scores], c_i) - s_positive

`c_i` is the log-sum-exp of query i's scores over the cache (`exact_loss`), or the estimate of it whose gradient comes
from the drawn documents (`loss`; see `estimator`).

Source: Lindgren, Reddi, Guo, Kumar, NeurIPS 2021. Proofs: docs/method.md.
"""

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn.checks import check_choice, check_embeddings, check_scale, check_size
from negcache_fn.classes import (
    Classes,
    InBatch,
    batch_classes,
    batch_scores,
    check_batch,
    known_ids,
    positive_scores,
)
from negcache_fn.collectives import agree, distribute, fetch
from negcache_fn.estimator import STALENESS_CORRECTIONS, CacheClass, Pool, estimate_cache_logit, pool_draws
from negcache_fn.false_negatives import (
    NO_FALSE_NEGATIVES,
    Exclusions,
    FalseNegatives,
    needs_positives,
)
from negcache_fn.mining import hardest_of_all
from negcache_fn.sampling import Draw, check_draw
from negcache_fn.scoring import Similarity, check_search, score_matrix, softmax_dtype, widened
from negcache_fn.state import scalar, stored
from negcache_fn.streaming import ScoreTransform, cache_logsumexp, full_precision, logsumexp

__all__ = [
    "REDUCTIONS",
    "Terms",
    "cross_entropy",
    "exact_loss",
    "loss",
    "loss_terms",
    "reduce_loss",
]

REDUCTIONS = ("mean", "sum", "none")
_INFINITY = float("inf")


class Terms(NamedTuple):
    """The classes of every query's softmax."""

    batch_logits: Tensor  # [B, N], or [B, 1] without in-batch classes; -inf: no class of this query
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
    staleness_correction: str = "self_normalized",
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Cross entropy of each query's positive against batch and cache, from the draws' fresh embeddings.

    The cache is one class, with a logit `c_i` (see `negcache_fn.estimator`): its value is the log-sum-exp over all of
    the cache, its gradient that of the drawn documents. Where nothing is stale, the expected gradient is the one of
    the exact softmax ("none": exactly; "self_normalized": up to O(1/k)).

    Args:
        queries: [B, D] floating.
        documents: [N, D] floating, N >= B. Row i < B is the positive of query i; the others are further candidates,
            and count only with `in_batch`.
        negatives: [B * k, D] floating, or [M, D] with `num_draws`: the fresh embeddings of the drawn documents, in the
            order of `draw.slot.flatten()`.
        draw: what `sample_gumbel` gave for these queries, with the same scale and transform.
        scale: number or 0-d tensor, learnable.
        score_transform: elementwise function of the scaled inner products.
        in_batch: whether all documents are classes of every query; "global": those of all ranks.
        ids: [N] int64 ids of the documents, -1 where anonymous. A document with the id of a query's positive is no
            negative of it, and of several documents with one id the first alone is a class. Pass the same ids as
            `exclude_ids` when drawing (all of them with `in_batch`, else `ids[:B, None]`); `step` does.
        log_weights: [N] floating, added to the documents' scores (log-Q correction, importance).
        false_negatives: which documents of the batch are no negatives of a query either; of the cache, the draw knows.
        share_draws: whether every query uses every draw (multiple importance sampling with the balance heuristic).
            Must be, where only some of the queries have drawn (`num_draws`).
        staleness_correction: "none", "self_normalized" or "unnormalized".
        reduction: "mean", "sum" or "none".
        group: of ranks that share their draws. The loss is that of this rank's queries; the gradient that arrives in
            this rank's embeddings is that of the sum of all ranks' losses.

    Returns:
        [] or, with reduction "none", [B]; float32 or wider. Differentiable in `queries`, `documents`, `negatives` and
        `scale`. A query without cached documents gets the in-batch loss, or 0 where there is none. One that has some,
        but whose softmax has none of the draws, gets the cache's log-sum-exp as it is.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, fewer documents than queries, an unknown
            `staleness_correction` or `reduction`.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> state = update(state, torch.ones(6, 3), torch.randn(6, 4))
        >>> queries, documents = torch.randn(2, 4), torch.randn(2, 4)
        >>> draw = sample_gumbel(state, queries, num_samples=3)
        >>> loss(queries, documents, draw.embedding.flatten(0, 1), draw).shape
        torch.Size([])

    Reference: Lindgren et al., NeurIPS 2021, equations 5-8; Veach and Guibas, SIGGRAPH 1995, section 3.3.
    """
    ranks = distribute(group)
    with ranks.checking():
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("staleness_correction", staleness_correction, STALENESS_CORRECTIONS)
        check_draw("draw", draw)
        if not (share_draws or draw.of_all_queries):
            raise ValueError(
                f"share_draws is {share_draws}, and {draw.query.shape[0]} of {draw.log_normalizer.shape[0]} queries "
                f"have drawn; expected share_draws=True, as the others have no draws of their own"
            )
        check_embeddings("queries", queries, draw.embedding, rows=draw.log_normalizer.shape[0])
        check_embeddings("negatives", negatives, queries, rows=draw.slot.numel())
        check_scale(scale, queries.device)
        check_batch(queries, documents, in_batch, ids, log_weights, false_negatives, ranks)
    queries, _ = agree(
        ranks,
        queries,
        0,
        placement="replicated",
        options=(
            f"loss replacement={draw.replacement} in_batch={in_batch} share_draws={share_draws} "
            f"ids={ids is not None} log_weights={log_weights is not None}"
        ),
        queries=queries.shape[0],
        documents=documents.shape[0],
        num_samples=draw.slot.shape[1],
        num_draws=draw.slot.shape[0],
    )
    terms = loss_terms(
        queries,
        batch_classes(queries.shape[0], documents, ids, log_weights, in_batch, ranks),
        negatives,
        draw,
        pool_draws(negatives, draw, ranks) if share_draws else None,
        scale=scale,
        score_transform=score_transform,
        in_batch=bool(in_batch),
        false_negatives=false_negatives,
        staleness_correction=staleness_correction,
    )
    return reduce_loss(cross_entropy(terms.batch_logits, terms.cache.logit, terms.positive), reduction)


def exact_loss(
    state: TensorDictBase,
    queries: Tensor,
    documents: Tensor,
    *,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    in_batch: InBatch = True,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    top_k: int | None = None,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """The same cross entropy without sampling: the whole cache, as embedded in it.

    Naive equivalent: `logsumexp(cat([batch_scores, score(state, queries)], 1), 1) - positive_score`. It streams in both
    directions: the backward pass recomputes the scores, so neither makes a [B, C] tensor (with `top_k`, [B, top_k, D]).

    Args:
        state: the cache; cached documents that `ids` names are left out, as in `loss`.
        queries: [B, D] floating.
        documents: [N, D] floating, N >= B, as in `loss`.
        scale: number or 0-d tensor, learnable.
        score_transform: elementwise function of the scaled inner products.
        in_batch: as in `loss`.
        ids: [N] int64, as in `loss`.
        log_weights: [N] floating, as in `loss`.
        false_negatives: which documents, of the batch and of the cache, are no negatives of a query.
        top_k: restricts the cache to each query's `top_k` highest scores.
        reduction: "mean", "sum" or "none".
        group: of the ranks over which the cache is sharded; gradients as in `loss`.

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
    ranks = distribute(group)
    with ranks.checking():
        check_choice("reduction", reduction, REDUCTIONS)
        check_search(state, queries, scale)
        check_batch(queries, documents, in_batch, ids, log_weights, false_negatives, ranks)
        capacity = stored(state, "embedding").shape[0]
        if top_k is not None:
            check_size("top_k", top_k, most=capacity if group is None else None)
    with full_precision(queries):
        rows = queries.shape[0]
        queries, shards = agree(
            ranks,
            queries,
            capacity,
            placement="sharded",
            options=(
                f"exact_loss in_batch={in_batch} ids={ids is not None} log_weights={log_weights is not None} "
                f"max_score={false_negatives.max_score is not None}"
            ),
            seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
            top_k=0 if top_k is None else top_k,
            exclude_ids=0 if false_negatives.ids is None else false_negatives.ids.shape[1],
            queries=rows,
            documents=documents.shape[0],
        )
        queries, scale = widened(queries, scale, softmax_dtype(state, queries))
        similarity = Similarity(queries.dtype, scale, score_transform)
        classes = batch_classes(rows, documents, ids, log_weights, in_batch, ranks)
        batch_logits, positive = batch_scores(similarity, queries, classes, bool(in_batch), false_negatives)
        with torch.no_grad():  # what is no negative is not a matter of degree
            positives = positive_scores(similarity, queries, documents) if needs_positives(false_negatives) else None
            exclusions = Exclusions.of(
                queries,
                None if ids is None else known_ids(ids, rows, in_batch=in_batch),
                false_negatives,
                similarity.dtype,
                positives,
            )
            _, of_all = exclusions.gathered(queries[:0], ranks)
        # Each shard's part of the sum is made where the shard is, for the queries of all ranks.
        everyone = ranks.gather(queries)
        matrix = score_matrix(state, everyone, scale=scale, score_transform=score_transform, exclusions=of_all)
        if top_k is None:
            cache_logit = cache_logsumexp(matrix)
            if ranks.name is not None:
                cache_logit = logsumexp(ranks.by_rank(ranks.exchange(cache_logit)).t())
        else:
            with torch.no_grad():
                scores, slots = hardest_of_all(matrix, top_k, shards)
            embedding, log_weight = fetch(
                [stored(state, "embedding"), stored(state, "log_weight")], slots.flatten(), shards
            )
            own = similarity.own(queries, embedding.view(rows, top_k, -1)) + log_weight.view(rows, top_k)
            cache_logit = logsumexp(torch.where(scores > -_INFINITY, own, -_INFINITY))
        return reduce_loss(cross_entropy(batch_logits, cache_logit, positive), reduction)


def loss_terms(
    queries: Tensor,
    classes: Classes,
    negatives: Tensor,
    draw: Draw,
    pool: Pool | None,
    *,
    scale: float | Tensor,
    score_transform: ScoreTransform | None,
    in_batch: bool,
    false_negatives: FalseNegatives,
    staleness_correction: str,
) -> Terms:
    """What `loss` is made of; `pool` are the draws to share, None if each query uses its own."""
    queries, scale = widened(queries, scale, draw.log_normalizer.dtype)
    similarity = Similarity(draw.log_normalizer.dtype, scale, score_transform)
    with full_precision(queries):
        batch_logits, positive = batch_scores(similarity, queries, classes, in_batch, false_negatives)
        cache = estimate_cache_logit(
            similarity, queries, negatives, draw, pool, staleness_correction=staleness_correction
        )
    return Terms(batch_logits, positive, cache)


def cross_entropy(batch_logits: Tensor, cache_logit: Tensor, positive: Tensor) -> Tensor:
    """[B]: the loss of each query, the cache being one class."""
    return torch.cat([batch_logits, cache_logit[:, None]], dim=1).logsumexp(1) - positive


def reduce_loss(losses: Tensor, reduction: str) -> Tensor:
    """[B] -> [] by "mean" or "sum"; as it is with "none"."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
