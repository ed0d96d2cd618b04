"""The cache as one class: its logit `c_i`, estimated from the documents that were drawn.

With `L_i` the log-sum-exp of query i's scores over the cache, `f_im` the fresh and `g_im` the stale score of draw m,
and weights `w_im` of the draws,

    staleness_correction="none"             c_i = L_i + sum_m w_im (f_im - stop_gradient f_im)
    staleness_correction="self_normalized"  c_i = L_i + log(sum_m w_im exp(f_im - g_im) / sum_m w_im)
    staleness_correction="unnormalized"     c_i = L_i + log(sum_m w_im exp(f_im - g_im))

    share_draws=True                        w_im = p_i(j_m) / sum_i' n_i'(j_m), with p_i(j) = exp(s_ij - L_i)
    share_draws=False                       w_im = p_i(j_m) / n_i(j_m) for the draws of query i

`n_i(j)` is how many draws of document j are expected of query i: `k p_i(j)` with replacement, so that own draws weigh
1/k; with `num_draws` M of the B queries, chosen at random, draw once each, so that it is `M/B p_i(j)`, whoever drew;
without replacement, the probability that j is among the k, given the perturbed scores of all other documents,

    n_i(j) = 1 - exp(-exp(s_ij - threshold)), threshold: the k-th largest perturbed score of the other documents,

which is the (k+1)-th largest of all where i drew j, and the k-th where it did not.

Sources: Lindgren, Reddi, Guo, Kumar, NeurIPS 2021 (own draws, "none"); Veach, Guibas, SIGGRAPH 1995 (the balance
heuristic that shares draws); Kool, van Hoof, Welling, ICML 2019, ICLR 2020 (without replacement). Proofs:
docs/method.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from negcache_fn._cache.ids import named
from negcache_fn._draws.sample import Draw
from negcache_fn._options import StalenessCorrection, StepOptions
from negcache_fn._ranks.group import Ranks
from negcache_fn._scores.definition import Similarity

__all__ = ["CacheClass", "SharedDraws", "estimate_cache_logit", "gather_draws"]

_INFINITY = float("inf")
_MORE_THAN_SLOTS = 2**48
_FAR_BELOW = -40.0


class SharedDraws(NamedTuple):
    """The M draws that a query can use: those of its rank or of all, in the order of ranks."""

    ranks: Ranks
    negatives: Tensor  # [M, D] fresh, with gradient
    embedding: Tensor  # [M, D] stale
    slot: Tensor  # [M]
    id: Tensor  # [M]
    log_weight: Tensor  # [M]
    source: Tensor  # [M]


class CacheClass(NamedTuple):
    """The cache as a class of each query, and what is behind its logit."""

    logit: Tensor  # [B]; -inf: the query has no document
    log_importance: Tensor  # [B, m] logarithm of the (unnormalised) weight that f_im gets in it, -inf for none
    masked: Tensor  # [B, m] bool: the draw exists, and is a false negative of the query


def gather_draws(negatives: Tensor, draw: Draw, ranks: Ranks) -> SharedDraws:
    """The draws of all ranks; those of this one if it is alone."""
    known = (draw.embedding, draw.slot, draw.id, draw.log_weight, draw.source)
    return SharedDraws(ranks, ranks.gather(negatives), *ranks.gather_all(*(values.flatten(0, 1) for values in known)))


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
        negatives: [B * k, D] fresh embeddings of the drawn documents.
        draw: the draws.
        shared: the draws to share; None: each query uses its own.
        options: of the step.

    Returns:
        The logits, with gradient to `queries`, `negatives` and the scale, and what is behind them.
    """
    # What was encoded in place of a draw that does not exist has no part in the loss, not even a NaN.
    if shared is None:
        negatives = torch.where(draw.slot.flatten()[:, None] >= 0, negatives, 0.0)
        fresh = similarity.rowwise(queries, negatives.view(draw.embedding.shape)) + draw.log_weight
    else:
        negatives = torch.where(shared.slot[:, None] >= 0, shared.negatives, 0.0)
        fresh = similarity.pairwise(queries, negatives) + shared.log_weight
    with torch.no_grad():  # weights and stale scores are constants of the estimator
        if shared is not None:
            products = similarity.pairwise(queries, shared.embedding)
            stale = products + shared.log_weight
            drawn = _drawn(draw, shared)
            masked = _false_negatives(products, drawn, draw, shared)
            log_weights_of_draws = _balance_heuristic(stale, drawn, masked, draw, shared)
        else:
            stale = similarity.rowwise(queries, draw.embedding) + draw.log_weight
            masked = torch.zeros_like(draw.slot, dtype=torch.bool)
            log_weights_of_draws = _own_weights(stale, draw)
        has_draws = (log_weights_of_draws > -_INFINITY).any(-1, keepdim=True)
        log_weights_of_draws = torch.where(has_draws, log_weights_of_draws, 0.0)
    cache_logit = _cache_logit(draw.log_normalizer, log_weights_of_draws, fresh, stale, options.staleness_correction)
    # A query that drew nothing, and can use no draw of others, knows of the cache what the log-normaliser says: -inf if
    # it has no document; if the queries have diverged it is NaN, and should be seen.
    cache_logit = torch.where(has_draws[:, 0], cache_logit, draw.log_normalizer)
    log_importance = log_weights_of_draws
    if options.staleness_correction != "none":
        log_importance = log_importance + fresh.detach() - stale
    log_importance = log_importance.masked_fill(~has_draws, -_INFINITY)
    return CacheClass(cache_logit, log_importance, masked)


def _drawn(draw: Draw, shared: SharedDraws) -> Tensor:
    """[B, M] bool: whether the query has drawn the document itself, be it as another one of the draws."""
    of_query, of_shared = (draws.source * _MORE_THAN_SLOTS + draws.slot for draws in (draw, shared))
    ordered = of_shared.sort().values
    number = torch.searchsorted(ordered, of_shared)  # equal for equal documents, below M
    queries = draw.log_normalizer.shape[0]
    by_number = torch.zeros(queries, of_shared.shape[0], dtype=torch.bool, device=of_shared.device)
    true = torch.ones_like(by_number[:1, :1])
    by_number = by_number.index_put((draw.query[:, None], torch.searchsorted(ordered, of_query)), true)
    return by_number.index_select(1, number)


def _false_negatives(products: Tensor, drawn: Tensor, draw: Draw, shared: SharedDraws) -> Tensor:
    """[B, M] bool: whether a draw of another query is a false negative of this one; `products`: no log-weights."""
    masked = products > draw.max_score[:, shared.source]
    if draw.exclude_ids.shape[0] == products.shape[0]:  # what is excluded for all is not among the draws
        excluded = (shared.id[:, None] == draw.exclude_ids[:, None, :]) & named(shared.id)[:, None]
        masked = masked | excluded.any(-1)
    # What the query drew is one, whatever rounding says here.
    return masked & ~drawn & (shared.slot >= 0) & draw.has_documents[:, None]


def _balance_heuristic(stale: Tensor, drawn: Tensor, masked: Tensor, draw: Draw, shared: SharedDraws) -> Tensor:
    """[B, M]: `log w_im = log p_i(j_m) - log sum_i' n_i'(j_m)`, -inf where `p_i(j_m) = 0`."""
    possible = (stale >= draw.cutoff[:, shared.source]) & ~masked
    possible = (possible | drawn) & (shared.slot >= 0) & draw.has_documents[:, None]
    log_probability = torch.where(possible, stale - draw.log_normalizer[:, None], -_INFINITY)
    if not draw.distinct:
        log_expected = log_probability.logsumexp(0)
    else:
        threshold = torch.where(drawn, draw.threshold, draw.perturbed[:, -1:])
        log_expected = torch.where(possible, _log_inclusion(stale, threshold), -_INFINITY).logsumexp(0)
    if shared.ranks.name is not None:
        # No overflow: probabilities. No underflow in float64: one of them is that of who drew.
        log_expected = shared.ranks.all_sum(log_expected.double().exp()).log().to(stale.dtype)
    if not draw.distinct:
        log_expected = log_expected + torch.full_like(stale[0], draw.slot.numel() / stale.shape[0]).log_()
    return torch.where(possible, log_probability - log_expected, -_INFINITY)


def _own_weights(stale: Tensor, draw: Draw) -> Tensor:
    """[B, k]: `log w_im = log p_i(j_m) - log n_i(j_m)`, -inf where nothing was drawn."""
    if not draw.distinct:
        log_weights = torch.full_like(stale, 1.0 / draw.slot.shape[1]).log_()
    else:
        log_weights = stale - draw.log_normalizer[:, None] - _log_inclusion(stale, draw.threshold)
    return torch.where(draw.slot >= 0, log_weights, -_INFINITY)


def _log_inclusion(score: Tensor, threshold: Tensor) -> Tensor:
    """`log(1 - exp(-exp(score - threshold)))`, the probability that score + Gumbel noise is above the threshold."""
    above = score - threshold
    # Far below, the difference itself: the next term of the series is exp(above) / 2.
    return torch.where(above > _FAR_BELOW, torch.log(-torch.expm1(-torch.exp(above))), above)


def _cache_logit(
    log_normalizer: Tensor, log_weights: Tensor, fresh: Tensor, stale: Tensor, correction: StalenessCorrection
) -> Tensor:
    if correction == "none":
        return log_normalizer + (log_weights.exp() * (fresh - fresh.detach())).sum(-1)
    ratio = (log_weights + fresh - stale).logsumexp(-1)
    if correction == "unnormalized":
        return log_normalizer + ratio
    return log_normalizer + ratio - log_weights.logsumexp(-1)
