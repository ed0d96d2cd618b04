"""Draws of each query: Gumbel-Max along a tree, after one streaming pass.

Slots form blocks of `BLOCK` slots, and blocks form groups of `GROUP` slots. The pass leaves the log-sum-exp of every
block; then a group is chosen by Gumbel-Max among the groups, a block inside it, and a slot inside that, each level with
noise of its own. This is exact, because the softmax factorises along the tree, and it needs noise for B * k * C / 1024
groups, not for B * k * C slots. The largest perturbed log-sum-exp of the top level has the law of the largest perturbed
score over all slots and is independent of the slot that attains it, which makes a draw a monoid (`merge_draws`).

Source: Gumbel-Max after Maddison, Tarlow, Minka, "A* sampling", NeurIPS 2014.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from negcache_fn._cache.select import segments
from negcache_fn._draws.choose import choose_children, choose_groups
from negcache_fn._draws.noise import AMONG_BLOCKS, AMONG_SLOTS, Noise
from negcache_fn._kernels.blocks import BLOCK, GROUP
from negcache_fn._ranks.group import Ranks
from negcache_fn._ranks.order import sequenced_after
from negcache_fn._scores.definition import ScoreMatrix
from negcache_fn._scores.stream import reduce_blocks, score_blocks

__all__ = ["DrawnSlots", "draw_among", "draw_slots", "merge_shards", "restricted"]

_INFINITY = float("inf")


class DrawnSlots(NamedTuple):
    """k slots for each query."""

    slot: Tensor  # [B, k]
    score: Tensor  # [B, k]
    perturbed: Tensor  # [B, k]
    log_normalizer: Tensor  # [B]
    cutoff: Tensor  # [B, 1]


def draw_slots(matrix: ScoreMatrix, noise: Noise, first_slot: int | Tensor) -> DrawnSlots:
    """Among all slots of the matrix, whose first one has the number `first_slot` in the whole cache."""
    capacity = matrix.embeddings.shape[0]
    best = None
    for start, stop in segments(capacity):
        if best is not None:
            # Otherwise the compiler may keep the blocks of all segments at once.
            matrix = matrix._replace(queries=sequenced_after(matrix.queries, best.blocks))
        found = _choose_groups(matrix, noise, start, stop, first_slot)
        best = found if best is None else _better(best, found)
    assert best is not None  # a cache has a slot
    # Groups, blocks and slots are numbered over the whole cache, because their numbers determine the noise.
    block, _ = choose_children(best.blocks, noise, AMONG_BLOCKS, best.group)
    of_slots = score_blocks(matrix, block - first_slot // BLOCK)
    slot, score = choose_children(of_slots, noise, AMONG_SLOTS, block)
    # A query without a document may have chosen a place past the end.
    slot = slot.clamp(max=first_slot + capacity - 1)
    cutoff = score.new_full((score.shape[0], 1), -_INFINITY)
    return DrawnSlots(slot, score, best.perturbed, best.log_normalizer, cutoff)


def draw_among(scores: Tensor, slots: Tensor, noise: Noise) -> DrawnSlots:
    """Draws among the hardest documents [B, n + 1] except the last, see `restricted`."""
    scores, slots, cutoff = restricted(scores, slots)
    noisy = scores[:, None, :] + noise.of_slots(slots)
    perturbed, place = noisy.max(-1)
    return DrawnSlots(slots.gather(1, place), scores.gather(1, place), perturbed, scores.logsumexp(-1), cutoff)


def restricted(scores: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The n hardest documents of n + 1, whose last score only bounds the cutoff [B, 1]."""
    # Midway between the last document inside and the first outside: a score recomputed with other rounding stays on
    # its side.
    return scores[:, :-1], slots[:, :-1], (scores[:, -2] + scores[:, -1])[:, None] / 2


def merge_shards(drawn: DrawnSlots, ranks: Ranks) -> DrawnSlots:
    """The best draws for this rank's queries, from the draws of each rank for the queries of all."""
    if ranks.name is None:
        return drawn
    # Slot numbers are exact in float64.
    sent = torch.stack([drawn.perturbed.double(), drawn.score.double(), drawn.slot.double()], dim=-1)
    received, log_normalizers = ranks.exchange_all(sent, drawn.log_normalizer.double())
    perturbed, score, slot = ranks.by_rank(received).unbind(-1)  # [ranks, B, k]
    perturbed, winner = perturbed.max(0, keepdim=True)
    slot, score = slot.gather(0, winner)[0], score.gather(0, winner)[0]
    dtype = drawn.score.dtype
    log_normalizer = ranks.by_rank(log_normalizers).logsumexp(0).to(dtype)
    cutoff = torch.full_like(log_normalizer, -_INFINITY)[:, None]
    return DrawnSlots(slot.to(torch.int64), score.to(dtype), perturbed[0].to(dtype), log_normalizer, cutoff)


class _Groups(NamedTuple):
    group: Tensor  # [B, k]
    perturbed: Tensor  # [B, k]
    log_normalizer: Tensor  # [B]
    blocks: Tensor  # [B, k, GROUP // BLOCK] log-sum-exp of its blocks


def _choose_groups(matrix: ScoreMatrix, noise: Noise, start: int, stop: int, first_slot: int | Tensor) -> _Groups:
    """The groups of largest perturbed log-sum-exp among those of the slots `start ... stop - 1`."""
    blocks = reduce_blocks(matrix.of_slots(start, stop), "logsumexp")
    return _Groups(*choose_groups(blocks, noise, (first_slot + start) // GROUP))


def _better(a: _Groups, b: _Groups) -> _Groups:
    b_wins = b.perturbed > a.perturbed
    return _Groups(
        torch.where(b_wins, b.group, a.group),
        torch.where(b_wins, b.perturbed, a.perturbed),
        torch.logaddexp(a.log_normalizer, b.log_normalizer),
        torch.where(b_wins[..., None], b.blocks, a.blocks),
    )
