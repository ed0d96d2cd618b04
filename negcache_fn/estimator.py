"""The cache as one class: its logit `c_i`, estimated from the documents that were drawn.

With `L_i` the log-sum-exp of query i's scores over the cache, `f_im` the fresh and `g_im` the stale score of draw m,
and weights `w_im` of the draws,

    staleness_correction="none"             c_i = L_i + sum_m w_im (f_im - stop_gradient f_im)
    staleness_correction="self_normalized"  c_i = L_i + log(sum_m w_im exp(f_im - g_im) / sum_m w_im)
    staleness_correction="unnormalized"     c_i = L_i + log(sum_m w_im exp(f_im - g_im))

    share_draws=True                        w_im = p_i(j_m) / sum_i' k p_i'(j_m), with p_i(j) = exp(s_ij - L_i)
    share_draws=False                       w_im = 1/k for the k draws of query i

Sources: Lindgren, Reddi, Guo, Kumar, NeurIPS 2021 (own draws, "none"); Veach, Guibas, SIGGRAPH 1995 (the balance
heuristic that shares draws). Proofs: docs/method.md.
"""

import torch
from torch import Tensor

from negcache_fn.sampling import Draw
from negcache_fn.scoring import Similarity

__all__ = ["STALENESS_CORRECTIONS", "estimate_cache_logit"]

STALENESS_CORRECTIONS = ("none", "self_normalized", "unnormalized")
_INFINITY = float("inf")


def estimate_cache_logit(
    similarity: Similarity,
    queries: Tensor,
    negatives: Tensor,
    draw: Draw,
    *,
    share_draws: bool,
    staleness_correction: str,
) -> tuple[Tensor, Tensor]:
    """The logits `c_i` and the importance weights behind them.

    Args:
        similarity: the score of a query and a document, up to the document's log-weight.
        queries: [B, D].
        negatives: [B * k, D] fresh embeddings of the drawn documents.
        draw: the draws.
        share_draws: whether every query uses every draw.
        staleness_correction: "none", "self_normalized" or "unnormalized".

    Returns:
        [B] logits, -inf where the query has no document, with gradient to `queries`, `negatives` and the scale; and
        [B, m] logarithms of the (unnormalised) weights that the scores `f_im` get in them, -inf for none.
    """
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
    return cache_logit, log_importance


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
