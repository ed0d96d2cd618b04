"""The metrics of a step: numbers to log, each a 0-d tensor without gradient."""

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.ids import last_of_each
from negcache_fn._cache.state import live, scalar, stored
from negcache_fn._codec import storable
from negcache_fn._draws.draw import Draw
from negcache_fn._loss.cache_class import SharedDraws, inverse_inclusion
from negcache_fn._loss.cross_entropy import Terms, losses_of_positives, mean_of_positives
from negcache_fn._ranks.group import Ranks

__all__ = ["count_not_storable", "draw_noise", "step_metrics"]

_INFINITY = float("inf")


def step_metrics(
    state: TensorDictBase,
    draw: Draw,
    terms: Terms,
    log_total: Tensor,
    log_share: Tensor,
    fresh: Tensor,
    drawn_at: Tensor,
    drawn_by_all: Tensor,
    not_written: Tensor,
    failures: Tensor,
    ranks: Ranks,
) -> tuple[dict[str, Tensor], Tensor]:
    """The metrics of `step`, of the cache before it is written, for all ranks.

    Args:
        state: the cache.
        draw: the draws for this rank's queries.
        terms: the classes of the queries.
        log_total: [B] log-sum-exp of all scores, of batch and cache.
        log_share: [B] see `log_share_of_cache`.
        fresh: [M, D] the drawn documents, encoded again.
        drawn_at: [M] the step of their stale embeddings.
        drawn_by_all: [ranks * M] the slots that all ranks have drawn.
        not_written: [] number of rows of this rank that are not finite.
        failures: [] failures of this rank, see `Attempts`: they are sent with the metrics.
        ranks: the ranks of the group.

    Returns:
        0-d tensors by their names; [] the failures of all ranks.
    """
    each = losses_of_positives(terms.batch, log_total)
    exact = mean_of_positives(each, terms.batch)
    probability = (-each).exp()
    trains = terms.batch.trains
    if terms.batch.is_target is not None:
        probability = torch.where(terms.batch.is_target, probability, 0.0)
    step, embedded_at = scalar(state, "step"), stored(state, "embedded_at")
    missing = draw.slot.flatten() < 0
    draws = (~missing).sum()
    capacity = embedded_at.new_full((), embedded_at.shape[0])
    documents = live(state).sum()
    # Empty slots, whose entry is -1, are added back: no tensor of C ages.
    embedded_at_sum = embedded_at.sum() + capacity - documents
    fresh = fresh.to(draw.log_normalizer.dtype)
    difference = fresh - draw.embedding.flatten(0, 1)
    drift = difference.square().sum(-1) / fresh.square().sum(-1).clamp(min=torch.finfo(fresh.dtype).tiny)
    log_importance = terms.cache.log_importance
    sample_size = log_importance.softmax(-1).square().sum(-1).reciprocal()
    sample_size = sample_size.masked_fill((log_importance == -_INFINITY).all(-1), 0.0)
    drawn_by_any = drawn_by_all >= 0
    queries = capacity.new_full((), exact.shape[0]) if trains is None else trains.sum()
    can_draw = draw.has_documents if trains is None else draw.has_documents & trains
    ratios = {
        "exact_loss": (exact.sum(), queries),
        "positive_probability": (mean_of_positives(probability, terms.batch).sum(), queries),
        "cache_share": (log_share.exp().sum(), queries),
        "occupancy": (documents, capacity),
        "cache_age_steps": (step * documents - embedded_at_sum, documents),
        "draw_age_steps": ((step - drawn_at).masked_fill(missing, 0).sum(), draws),
        "drift": (drift.masked_fill(missing, 0.0).sum(), draws),
        "effective_sample_size": (sample_size.masked_fill(~can_draw, 0.0).sum(), can_draw.sum()),
        # Not a product of two sums, which Triton 3.6 cannot compile in the kernel that Inductor makes of these lines.
        "masked_pairs": ((terms.cache.masked & can_draw[:, None]).sum(), (can_draw[:, None] & drawn_by_any).sum()),
    }
    if not draw.for_batch:
        distinct = last_of_each(drawn_by_all) & drawn_by_any
        ratios["unique_draws"] = (distinct.sum(), drawn_by_any.sum())
    totals, counts = map(list, zip(*ratios.values(), strict=True))
    if ranks.name is not None:
        parts = [value.double() for value in (*totals, *counts, not_written, failures)]
        summed = list(ranks.all_sum(torch.stack(parts)).unbind())
        totals, counts = summed[: len(ratios)], summed[len(ratios) : -2]
        not_written, failures = (value.to(torch.int64) for value in summed[-2:])
    values = (torch.stack(totals) / torch.stack(counts).clamp(min=1)).to(exact.dtype)
    return {**dict(zip(ratios, values.unbind(), strict=True)), "non_finite": not_written}, failures


def draw_noise(queries: Tensor, draw: Draw, terms: Terms, log_share: Tensor, shared: SharedDraws) -> Tensor:
    """[]: the relative error of the documents' gradient from drawing for the batch, estimated from the draws.

    With `v_m = sum_i u_i p_i(j_m) q_i`, which is, up to the scale, the gradient of the loss in document m if nothing is
    stale (u_i is the share of the cache in the softmax), and the inclusion probability `1 / r_m`,

        sqrt(sum_m (r_m - 1) r_m |v_m|^2) / |sum_m r_m v_m|.

    The root's argument is the Horvitz-Thompson estimate of the variance of `sum_m r_m v_m`.

    Args:
        queries: [B, D].
        draw: the draws for the batch.
        terms: the classes of the queries.
        log_share: [B] see `log_share_of_cache`.
        shared: the M draws of all ranks.
    """
    weights = (terms.cache.log_probability + log_share[:, None]).exp()
    weights = torch.where(draw.has_documents[:, None], weights, 0.0)
    gradients = shared.ranks.all_sum(weights.T @ queries)
    inverse = torch.where(shared.slot >= 0, inverse_inclusion(shared.score, draw.threshold[0]), 0.0)
    variance = ((inverse - 1) * inverse * gradients.square().sum(-1)).sum()
    size = (inverse[:, None] * gradients).sum(0).square().sum().sqrt()
    return variance.sqrt() / size.clamp(min=torch.finfo(size.dtype).tiny)


def count_not_storable(
    state: TensorDictBase, embeddings: Tensor, cacheable: Tensor | None, fits: Tensor | None, slots: Tensor
) -> Tensor:
    """[] rows that were to be inserted, or to refresh `slots`, and are not finite as stored, embedding or features."""
    rows = embeddings.shape[0] - slots.shape[0]
    to_insert = torch.ones(rows, dtype=torch.bool, device=slots.device) if cacheable is None else cacheable
    to_write = torch.cat([to_insert, slots >= 0])
    finite = storable(embeddings, stored(state, "embedding").dtype)
    if fits is not None:
        finite = finite & torch.cat([fits, torch.ones_like(slots, dtype=torch.bool)])
    return (to_write & ~finite).sum()
