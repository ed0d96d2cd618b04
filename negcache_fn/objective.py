"""The loss: softmax cross entropy over batch and cache, the cache entering as a single class.

With `L_i` the log-sum-exp of query i's scores over the cache, `f_im` the fresh and `g_im` the stale score of draw m,
and weights `w_im` of the draws, that class has the logit

    staleness_correction="none"             c_i = L_i + sum_m w_im (f_im - stop_gradient f_im)
    staleness_correction="self_normalized"  c_i = L_i + log(sum_m w_im exp(f_im - g_im) / sum_m w_im)
    staleness_correction="unnormalized"     c_i = L_i + log(sum_m w_im exp(f_im - g_im))

    loss_i = logsumexp(s_positive, [in-batch scores], c_i) - s_positive

Sources: Lindgren, Reddi, Guo, Kumar, NeurIPS 2021 (the estimator: own draws, "none"); Veach, Guibas, SIGGRAPH 1995
(the balance heuristic that shares draws). Proofs: docs/method.md.
"""

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn.checks import check_choice, check_embeddings, check_rows, check_scale, check_size
from negcache_fn.mining import hardest
from negcache_fn.sampling import Draw, check_draw
from negcache_fn.scoring import full_precision, score_matrix
from negcache_fn.streaming import ScoreTransform, cache_logsumexp, logsumexp

__all__ = [
    "REDUCTIONS",
    "STALENESS_CORRECTIONS",
    "Terms",
    "cross_entropy",
    "exact_loss",
    "false_negative_ids",
    "loss",
    "loss_terms",
    "reduce_loss",
]

REDUCTIONS = ("mean", "sum", "none")
STALENESS_CORRECTIONS = ("none", "self_normalized", "unnormalized")
_INFINITY = float("inf")


class Terms(NamedTuple):
    """The classes of every query's softmax, and the importance weights behind the cache's."""

    batch_logits: Tensor  # [B, N], or [B, 1] without in-batch classes; -inf: no class of this query
    positive: Tensor  # [B]
    cache_logit: Tensor  # [B]; -inf: nothing in the cache
    log_importance: Tensor  # [B, m] log of the weights that f_im gets in c_i, corrected, unnormalised; -inf: none


def loss(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor,
    draw: Draw,
    *,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    in_batch: bool = True,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    share_draws: bool = True,
    staleness_correction: str = "self_normalized",
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of each query's positive against batch and cache, from the draws' fresh embeddings.

    The cache is one class, with the logit `c_i` of the module's docstring: its value is the log-sum-exp over all of the
    cache, its gradient that of the drawn documents, weighted by `w_im`: `p_i(j_m) / sum_i' k p_i'(j_m)` with shared
    draws, 1/k for a query's own draws without. Where nothing is stale, the expected gradient is the one of the exact
    softmax ("none": exactly; "self_normalized": up to O(1/k)).

    Args:
        queries: [B, D] floating.
        documents: [N, D] floating, N >= B. Row i < B is the positive of query i; the others are further candidates,
            and count only with `in_batch`.
        negatives: [B * k, D] floating: the fresh embeddings of the drawn documents, in the order of
            `draw.slot.flatten()`.
        draw: what `sample_gumbel` gave for these queries, with the same scale and transform.
        scale: number or 0-d tensor, learnable.
        score_transform: elementwise function of the scaled inner products.
        in_batch: whether all documents are classes of every query.
        ids: [N] int64 ids of the documents, -1 where anonymous. A document with the id of a query's positive is no
            negative of it, and of several documents with one id the first alone is a class. Pass the same ids as
            `exclude_ids` when drawing (all of them with `in_batch`, else `ids[:B, None]`); `step` does.
        log_weights: [N] floating, added to the documents' scores (log-Q correction, importance).
        share_draws: whether every query uses every draw (multiple importance sampling with the balance heuristic).
        staleness_correction: "none", "self_normalized" or "unnormalized".
        reduction: "mean", "sum" or "none".

    Returns:
        [] or, with reduction "none", [B]; float32 or wider. Differentiable in `queries`, `documents`, `negatives` and
        `scale`. A query without cached documents gets the in-batch loss, or 0 where there is none.

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
    check_choice("reduction", reduction, REDUCTIONS)
    terms = loss_terms(
        queries,
        documents,
        negatives,
        draw,
        scale=scale,
        score_transform=score_transform,
        in_batch=in_batch,
        ids=ids,
        log_weights=log_weights,
        share_draws=share_draws,
        staleness_correction=staleness_correction,
    )
    return reduce_loss(cross_entropy(terms.batch_logits, terms.cache_logit, terms.positive), reduction)


def exact_loss(
    state: TensorDictBase,
    queries: Tensor,
    documents: Tensor,
    *,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    in_batch: bool = True,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    top_k: int | None = None,
    reduction: str = "mean",
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
        in_batch: whether all documents are classes of every query.
        ids: [N] int64, as in `loss`.
        log_weights: [N] floating, as in `loss`.
        top_k: restricts the cache to each query's `top_k` highest scores.
        reduction: "mean", "sum" or "none".

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
    check_choice("reduction", reduction, REDUCTIONS)
    with full_precision(state):
        exclude_ids = None
        if ids is not None:
            check_rows("ids", ids, torch.int64, documents.shape[0], queries.device)
            exclude_ids = false_negative_ids(ids, queries.shape[0], in_batch=in_batch)
        matrix = score_matrix(state, queries, scale=scale, score_transform=score_transform, exclude_ids=exclude_ids)
        similarity = _Similarity(matrix.queries.dtype, scale, score_transform)
        batch_logits, positive = _batch_scores(similarity, queries, documents, in_batch, ids, log_weights)
        if top_k is None:
            cache_logit = cache_logsumexp(matrix)
        else:
            check_size("top_k", top_k, most=matrix.embeddings.shape[0])
            with torch.no_grad():
                scores, slots = hardest(matrix, top_k)
            rows = slots.clamp(min=0)
            own = similarity.own(queries, matrix.embeddings[rows]) + matrix.bias[rows]
            cache_logit = logsumexp(torch.where(scores > -_INFINITY, own, -_INFINITY))
        return reduce_loss(cross_entropy(batch_logits, cache_logit, positive), reduction)


def loss_terms(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor,
    draw: Draw,
    *,
    scale: float | Tensor,
    score_transform: ScoreTransform | None,
    in_batch: bool,
    ids: Tensor | None,
    log_weights: Tensor | None,
    share_draws: bool,
    staleness_correction: str,
) -> Terms:
    """What `loss` is made of; arguments as there."""
    check_choice("staleness_correction", staleness_correction, STALENESS_CORRECTIONS)
    check_draw("draw", draw)
    check_embeddings("queries", queries, draw.embedding, rows=draw.slot.shape[0])
    check_embeddings("negatives", negatives, queries, rows=draw.slot.numel())
    check_scale(scale, queries.device)
    similarity = _Similarity(draw.log_normalizer.dtype, scale, score_transform)
    with torch.autocast(queries.device.type, enabled=False):  # the softmax is computed in float32 or wider
        batch_logits, positive = _batch_scores(similarity, queries, documents, in_batch, ids, log_weights)
        # What was encoded in place of a draw that does not exist has no part in the loss, not even a NaN.
        negatives = torch.where(draw.slot.flatten()[:, None] >= 0, negatives, 0.0)
        if share_draws:
            log_weight = draw.log_weight.flatten()
            fresh = similarity.all(queries, negatives) + log_weight
        else:
            log_weight = draw.log_weight
            fresh = similarity.own(queries, negatives.view(draw.embedding.shape)) + log_weight
        with torch.no_grad():  # weights and stale scores are constants of the estimator
            if share_draws:
                stale = similarity.all(queries, draw.embedding.flatten(0, 1)) + log_weight
                log_weights_of_draws = _balance_heuristic(stale, draw)
            else:
                stale = similarity.own(queries, draw.embedding) + log_weight
                log_weights_of_draws = torch.full_like(stale, 1.0 / draw.slot.shape[1]).log_()
            has_draws = draw.slot[:, :1] >= 0
            log_weights_of_draws = torch.where(has_draws, log_weights_of_draws, 0.0)
        cache_logit = _cache_logit(draw.log_normalizer, log_weights_of_draws, fresh, stale, staleness_correction)
        # Without draws the log-normaliser is -inf; if the queries have diverged it is NaN, and should be seen.
        cache_logit = torch.where(has_draws[:, 0], cache_logit, draw.log_normalizer)
        log_importance = log_weights_of_draws
        if staleness_correction != "none":
            log_importance = log_importance + fresh.detach() - stale
        log_importance = log_importance.masked_fill(~has_draws, -_INFINITY)
    return Terms(batch_logits, positive, cache_logit, log_importance)


def cross_entropy(batch_logits: Tensor, cache_logit: Tensor, positive: Tensor) -> Tensor:
    """[B]: the loss of each query, the cache being one class."""
    return torch.cat([batch_logits, cache_logit[:, None]], dim=1).logsumexp(1) - positive


def reduce_loss(losses: Tensor, reduction: str) -> Tensor:
    """[B] -> [] by "mean" or "sum"; as it is with "none"."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def false_negative_ids(ids: Tensor, queries: int, *, in_batch: bool) -> Tensor:
    """What must not be drawn: with in-batch classes every document of the batch, else each query's positive."""
    return ids if in_batch else ids[:queries, None]


class _Similarity(NamedTuple):
    """`transform(scale * q . d)` in the dtype of the softmax."""

    dtype: torch.dtype
    scale: float | Tensor
    transform: ScoreTransform | None

    def all(self, queries: Tensor, documents: Tensor) -> Tensor:
        """[B, D], [M, D] -> [B, M]: every query with every document."""
        return self._transformed((queries.to(self.dtype) * self.scale) @ documents.to(self.dtype).T)

    def own(self, queries: Tensor, documents: Tensor) -> Tensor:
        """[B, D], [B, k, D] -> [B, k]: each query with its own documents."""
        scaled = queries.to(self.dtype) * self.scale
        return self._transformed((scaled[:, None, :] * documents.to(self.dtype)).sum(-1))

    def _transformed(self, products: Tensor) -> Tensor:
        return products if self.transform is None else self.transform(products)


def _batch_scores(
    similarity: _Similarity,
    queries: Tensor,
    documents: Tensor,
    in_batch: bool,
    ids: Tensor | None,
    log_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Logits of the batch's classes [B, N] or [B, 1], and of the positives [B]."""
    rows = queries.shape[0]
    check_embeddings("documents", documents, queries, at_least=rows)
    if ids is not None:
        check_rows("ids", ids, torch.int64, documents.shape[0], queries.device)
    if log_weights is not None:
        check_rows("log_weights", log_weights, None, documents.shape[0], queries.device)
    if not in_batch:
        positive = similarity.own(queries, documents[:rows, None, :])
        if log_weights is not None:
            positive = positive + log_weights[:rows, None]
        return positive, positive[:, 0]
    scores = similarity.all(queries, documents)
    if log_weights is not None:
        scores = scores + log_weights
    positive = scores.gather(1, torch.arange(rows, device=scores.device)[:, None]).squeeze(1)
    if ids is not None:
        same = (ids[:, None] == ids) & (ids >= 0)
        repeated = same.tril(-1).any(1)
        is_positive = torch.eye(rows, documents.shape[0], dtype=torch.bool, device=ids.device)
        scores = scores.masked_fill((same[:rows] | repeated) & ~is_positive, -_INFINITY)
    return scores, positive


def _balance_heuristic(stale: Tensor, draw: Draw) -> Tensor:
    """[B, M]: `log w_im = log p_i(j_m) - log sum_i' k p_i'(j_m)`, -inf where `p_i(j_m) = 0`."""
    rows, samples = draw.slot.shape
    slot, source, document = draw.slot.flatten(), draw.source.flatten(), draw.id.flatten()
    own = torch.arange(rows * samples, device=slot.device) // samples == torch.arange(rows, device=slot.device)[:, None]
    excluded = ((document[:, None] == draw.exclude_ids[:, None, :]) & (document[:, None] >= 0)).any(-1)
    possible = ~excluded & (stale >= draw.cutoff[:, source])
    possible = (possible | own) & (slot >= 0) & (draw.slot[:, :1] >= 0)
    log_probability = torch.where(possible, stale - draw.log_normalizer[:, None], -_INFINITY)
    log_expected_draws = log_probability.logsumexp(0) + torch.full_like(stale[0], samples).log_()
    return torch.where(possible, log_probability - log_expected_draws, -_INFINITY)


def _cache_logit(log_normalizer: Tensor, log_weights: Tensor, fresh: Tensor, stale: Tensor, correction: str) -> Tensor:
    if correction == "none":
        return log_normalizer + (log_weights.exp() * (fresh - fresh.detach())).sum(-1)
    ratio = (log_weights + fresh - stale).logsumexp(-1)
    if correction == "unnormalized":
        return log_normalizer + ratio
    return log_normalizer + ratio - log_weights.logsumexp(-1)
