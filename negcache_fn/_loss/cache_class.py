"""The cache as one class: its logit `c_i`, estimated from the drawn documents.

With `L_i` the log-sum-exp of query i's scores over the cache, and `f_im` the fresh and `g_im` the stale score of its
draw m, for draws of the batch

    staleness_correction="self_normalized"  c_i = L_i + log(sum_m r_m exp(f_im) / sum_m r_m exp(g_im))
    staleness_correction="none"             c_i = L_i + sum_m p_i(j_m) r_m (f_im - g_im)

where `r_m` is the inverse of the chance that document j_m is drawn, given the noise of all other documents,

    1 / r_m = 1 - exp(-exp(log a_m - threshold)),

`a_m` its mass and the threshold the (M+1)-th largest perturbed mass. `r_m` and, with "none", `p_i(j_m)` are constants;
`L_i`, `f_im` and `g_im` are differentiable in the query and the scale. Where nothing is stale `c_i` is `L_i`, whose
gradient is exact, for every draw; only the gradient in the documents is estimated.

For draws of each query, with weights `w_im` of the draws and only `f_im` differentiable,

    staleness_correction="self_normalized"  c_i = L_i + log(sum_m w_im exp(f_im - g_im) / sum_m w_im)
    staleness_correction="none"             c_i = L_i + sum_m w_im (f_im - stop_gradient f_im)

    share_draws=True                        w_im = p_i(j_m) / sum_i' k p_i'(j_m)
    share_draws=False                       w_im = 1/k for the draws of query i, 0 for others

A draw that is a false negative of query i, or outside its `top_k`, is in neither sum of `c_i`.

Sources: Duffield, Lund, Thorup, J. ACM 2007, and Kool, van Hoof, Welling, ICLR 2020 (`r_m`); Lindgren, Reddi, Guo,
Kumar, NeurIPS 2021 (own draws, "none"); Veach, Guibas, SIGGRAPH 1995 (the balance heuristic that shares draws). Proofs:
docs/method.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from negcache_fn._cache.ids import among
from negcache_fn._draws.draw import Draw
from negcache_fn._options import StepOptions
from negcache_fn._ranks.group import Ranks
from negcache_fn._scores.definition import Similarity
from negcache_fn._scores.stream import logsumexp

__all__ = ["CacheClass", "SharedDraws", "estimate_cache_logit", "gather_draws", "inverse_inclusion"]

_INFINITY = float("inf")
_MORE_THAN_SLOTS = 2**48


class SharedDraws(NamedTuple):
    """The M draws that a query can use: those of its rank or of all ranks, in the order of ranks."""

    ranks: Ranks
    negatives: Tensor  # [M, D] fresh, with gradient
    embedding: Tensor  # [M, D] stale
    slot: Tensor  # [M]
    id: Tensor  # [M]
    log_weight: Tensor  # [M]
    source: Tensor  # [M]
    score: Tensor  # [M]
    label: Tensor  # [M]; [0] if the queries have none


class CacheClass(NamedTuple):
    """The cache as a class of each query, and the weights behind its logit."""

    logit: Tensor  # [B]; -inf: the query has no document
    log_importance: Tensor  # [B, m] logarithm of the (unnormalised) weight that f_im gets in it, -inf for none
    log_probability: Tensor  # [B, m] log p_i(j_m), -inf where the query cannot use the draw
    masked: Tensor  # [B, m] bool: the draw exists, and is a false negative of the query


def gather_draws(negatives: Tensor, draw: Draw, ranks: Ranks) -> SharedDraws:
    """The draws of all ranks; those of this one if it is alone."""
    known = [draw.embedding, draw.slot, draw.id, draw.log_weight, draw.source, draw.score, draw.label]
    labelled = draw.exclude_labels.shape[1] > 0
    negatives, sent = ranks.gather(negatives), [values.flatten(0, 1) for values in (known if labelled else known[:-1])]
    found = ranks.gather_all(*sent)
    return SharedDraws(ranks, negatives, *(found if labelled else [*found, draw.label.new_empty(0)]))


def estimate_cache_logit(
    similarity: Similarity,
    queries: Tensor,
    negatives: Tensor,
    draw: Draw,
    shared: SharedDraws | None,
    options: StepOptions,
) -> CacheClass:
    """The logits `c_i` and the importance weights behind them.

    Args:
        similarity: the score of a query and a document, up to the document's log-weight.
        queries: [B, D].
        negatives: [R * m, D] fresh embeddings of the drawn documents.
        draw: the draws.
        shared: the draws to share; None: each query uses its own.
        options: the options of the step.

    Returns:
        The logits, with gradient to `queries`, `negatives` and the scale, and the weights behind them.
    """
    if draw.for_batch:
        assert shared is not None  # checked at the boundary
        return _of_batch(similarity, queries, draw, shared, options)
    return _of_queries(similarity, queries, negatives, draw, shared, options)


def inverse_inclusion(log_mass: Tensor, threshold: Tensor) -> Tensor:
    """`r_m` [M], at least 1, from the masses of the documents drawn for the batch."""
    return (-_log_inclusion(log_mass, threshold)).exp()


def _of_batch(
    similarity: Similarity, queries: Tensor, draw: Draw, shared: SharedDraws, options: StepOptions
) -> CacheClass:
    """The draws of the batch."""
    fresh, products = _fresh_of_shared(similarity, queries, shared), similarity.pairwise(queries, shared.embedding)
    stale = products + shared.log_weight
    normalizer = draw.log_normalizer[:, None]
    with torch.no_grad():  # weights are constants of the estimator
        usable = _usable(draw, shared)
        masked = _false_negatives(products, draw, shared) & usable
        possible = _possible(stale, draw, shared) & ~masked & usable
        impossible = ~possible
        log_probability = (stale - normalizer).masked_fill(impossible, -_INFINITY)
        log_inverse = torch.where(possible, -_log_inclusion(shared.score, draw.threshold[0]), -_INFINITY)
    if options.staleness_correction == "none":
        weights = (log_probability + log_inverse).exp()
        change = (fresh - stale).masked_fill(impossible, 0.0)  # impossible draws may be infinite
        logit = draw.log_normalizer + (weights * change).sum(-1)
        log_importance = log_probability + log_inverse
    else:
        # Impossible draws leave both sums, and their gradients.
        terms = (log_inverse + torch.stack([fresh, stale])).masked_fill(impossible, -_INFINITY)
        of_fresh, of_stale = logsumexp(terms).unbind()
        logit = draw.log_normalizer + torch.where(possible.any(-1), of_fresh - of_stale, 0.0)
        log_importance = terms[0].detach()
    return CacheClass(logit, log_importance, log_probability, masked)


def _of_queries(
    similarity: Similarity,
    queries: Tensor,
    negatives: Tensor,
    draw: Draw,
    shared: SharedDraws | None,
    options: StepOptions,
) -> CacheClass:
    """The draws of each query."""
    if shared is None:
        # The stand-in for a draw that does not exist does not enter the loss, not even as a NaN.
        negatives = negatives.masked_fill(draw.slot.flatten()[:, None] < 0, 0.0)
        fresh = similarity.rowwise(queries, negatives.view(draw.embedding.shape)) + draw.log_weight
    else:
        fresh = _fresh_of_shared(similarity, queries, shared)
    with torch.no_grad():  # weights and stale scores are constants of the estimator
        if shared is not None:
            products = similarity.pairwise(queries, shared.embedding)
            stale = products + shared.log_weight
            drawn = _drawn(draw, shared)
            # A document that the query drew is not a false negative, even if rounding differs here.
            usable = _usable(draw, shared)
            masked = _false_negatives(products, draw, shared) & ~drawn & usable
            impossible = ~((drawn | _possible(stale, draw, shared) & ~masked) & usable)
            log_probability = (stale - draw.log_normalizer[:, None]).masked_fill(impossible, -_INFINITY)
            log_weights_of_draws = log_probability - _log_expected(log_probability, draw, shared)
            log_weights_of_draws = log_weights_of_draws.masked_fill(impossible, -_INFINITY)
        else:
            stale = similarity.rowwise(queries, draw.embedding) + draw.log_weight
            masked = torch.zeros_like(draw.slot, dtype=torch.bool)
            impossible = draw.slot < 0
            log_probability = (stale - draw.log_normalizer[:, None]).masked_fill(impossible, -_INFINITY)
            own = torch.full_like(stale, 1.0 / draw.slot.shape[1]).log_()
            log_weights_of_draws = own.masked_fill(impossible, -_INFINITY)
        has_draws = (log_weights_of_draws > -_INFINITY).any(-1, keepdim=True)
        without_draws = ~has_draws
        log_weights_of_draws = log_weights_of_draws.masked_fill(without_draws, 0.0)
    if options.staleness_correction == "none":
        change = (log_weights_of_draws.exp() * (fresh - fresh.detach())).sum(-1)
        log_importance = log_weights_of_draws
    else:
        log_weights_of_draws = log_weights_of_draws.log_softmax(-1)
        change = (log_weights_of_draws + fresh - stale).logsumexp(-1)
        log_importance = log_weights_of_draws + fresh.detach() - stale
    # A query that drew nothing, and can use no draw of others, keeps the log-normaliser: -inf without documents. If the
    # queries have diverged it is NaN, which must stay visible.
    logit = torch.where(has_draws[:, 0], draw.log_normalizer + change, draw.log_normalizer)
    log_importance = log_importance.masked_fill(without_draws, -_INFINITY)
    return CacheClass(logit, log_importance, log_probability, masked)


def _fresh_of_shared(similarity: Similarity, queries: Tensor, shared: SharedDraws) -> Tensor:
    """[B, M] fresh scores."""
    # The stand-in for a draw that does not exist does not enter the loss, not even as a NaN.
    negatives = shared.negatives.masked_fill(shared.slot[:, None] < 0, 0.0)
    return similarity.pairwise(queries, negatives) + shared.log_weight


def _drawn(draw: Draw, shared: SharedDraws) -> Tensor:
    """[B, M] bool: whether the query has drawn the document itself, in this or another draw."""
    of_query, of_shared = (draws.source * _MORE_THAN_SLOTS + draws.slot for draws in (draw, shared))
    ordered = of_shared.sort().values
    number = torch.searchsorted(ordered, of_shared)  # equal for equal documents, below M
    query = torch.arange(of_query.shape[0], device=of_query.device)[:, None]
    by_number = torch.zeros(of_query.shape[0], of_shared.shape[0], dtype=torch.bool, device=of_shared.device)
    true = torch.ones_like(by_number[:1, :1])
    by_number = by_number.index_put((query, torch.searchsorted(ordered, of_query)), true)
    return by_number.index_select(1, number)


def _usable(draw: Draw, shared: SharedDraws) -> Tensor:
    """[B, M] bool: whether the draw exists, and the query has documents."""
    return (shared.slot >= 0) & draw.has_documents[:, None]


def _false_negatives(products: Tensor, draw: Draw, shared: SharedDraws) -> Tensor:
    """[B, M] bool: whether a usable draw is a false negative of the query; `products`: no log-weights."""
    masked = products > _of_sources(draw.max_score, shared)
    if draw.exclude_ids.shape[0] == products.shape[0]:  # documents excluded for all are not among the draws
        masked = masked | among(shared.id, draw.exclude_ids)
    if draw.exclude_labels.shape[1]:
        masked = masked | among(shared.label, draw.exclude_labels)
    return masked


def _possible(stale: Tensor, draw: Draw, shared: SharedDraws) -> Tensor:
    """[B, M] bool: whether the score lets the drawn document into the query's softmax."""
    return stale >= _of_sources(draw.cutoff, shared)


def _of_sources(values: Tensor, shared: SharedDraws) -> Tensor:
    """[B, M], or [B, 1] where all draws are of one cache: the value [B, S] of each draw's source."""
    return values if values.shape[1] == 1 else values[:, shared.source]


def _log_expected(log_probability: Tensor, draw: Draw, shared: SharedDraws) -> Tensor:
    """[M]: logarithm of how many draws of the document are expected of all queries, `sum_i k p_i(j_m)`."""
    log_expected = log_probability.logsumexp(0)
    if shared.ranks.name is not None:
        # Probabilities cannot overflow. The sum cannot underflow in float64: the query that drew is one of its terms.
        log_expected = shared.ranks.all_sum(log_expected.double().exp()).log().to(log_probability.dtype)
    return log_expected + torch.full_like(log_probability[0], draw.slot.shape[1]).log_()


def _log_inclusion(score: Tensor, threshold: Tensor) -> Tensor:
    """`log(1 - exp(-exp(score - threshold)))`, the probability that score + Gumbel noise is above the threshold."""
    above = score - threshold
    # Far below, the difference itself: the next term of the series is exp(above) / 2.
    return torch.where(above > -40, torch.log(-torch.expm1(-torch.exp(above))), above)
