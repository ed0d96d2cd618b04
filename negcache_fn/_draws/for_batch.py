"""Draws for the whole batch: the slots of the largest perturbed masses, along the tree, after one streaming pass.

The contribution of document j to the gradient of the batch is at most proportional to its *mass*

    a_j = sum_i u_i p_i(j),     p_i(j) = exp(s_ij - L_i),

with u_i the importance of query i, ideally the share of the cache in its softmax. The M drawn documents have the M
largest `log a_j + Gumbel_j`, with one row of noise for the whole batch: they are all different, and each next one is
drawn from the masses of the remaining documents.

They lie in the M groups of largest perturbed mass, and in the M blocks of those. A level takes the perturbed value of a
parent as the largest one among its children, and changes their noise accordingly (`choose.py`). The masses of the
blocks follow from the log-sum-exp of every block for each query, which the pass returns; the slots of the M + 1 chosen
blocks are scored again for all queries. A cache of several segments keeps the log-sum-exp of groups only, and scores
the chosen groups again as well, so that memory does not grow with C / BLOCK.

Sources: Kool, van Hoof, Welling, "Stochastic beams and where to find them", ICML 2019, appendix B.3; the inclusion
weights that go with it after Duffield, Lund, Thorup, "Priority sampling for estimation of arbitrary subset sums",
J. ACM 2007.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from negcache_fn._cache.select import segments
from negcache_fn._draws.choose import largest_children, largest_groups
from negcache_fn._draws.noise import AMONG_BLOCKS, AMONG_SLOTS, Noise
from negcache_fn._kernels.blocks import BLOCK, GROUP
from negcache_fn._ranks.group import Ranks
from negcache_fn._ranks.order import sequenced_after
from negcache_fn._scores.definition import ScoreMatrix
from negcache_fn._scores.masses import block_masses, slot_masses, sum_of_rows
from negcache_fn._scores.stream import Summary, logsumexp, summarize
from negcache_fn._scores.transformed import summarize_transformed

__all__ = [
    "Importance",
    "Largest",
    "Pass",
    "as_on_first_rank",
    "draw_largest",
    "draw_largest_among",
    "largest_of_ranks",
    "pass_over",
]

_BLOCKS = GROUP // BLOCK  # of a group
_INFINITY = float("inf")
_NOTHING = (-1, -_INFINITY, -_INFINITY)  # slot, log-mass and perturbed mass where there are fewer


class Pass(NamedTuple):
    """The result of a pass."""

    log_normalizer: Tensor  # [B]; differentiable in the queries
    stretches: Tensor  # [B, ceil(C / GROUP) * _BLOCKS] log-sum-exp of every block; of several segments, of every group
    of_blocks: bool


class Importance(NamedTuple):
    """The terms of the documents' masses: `exp(log_weight_i + s_ij)` of each query."""

    log_weight: Tensor  # [B] logarithm of the query's importance, less its log-normaliser; -inf: not in the sum
    ranks: Ranks  # ranks whose queries are also in the sum

    def log_mass(self, values: Tensor) -> Tensor:
        """[B, n] -> [n]: logarithm of the masses, from scores or their log-sum-exp."""
        return self._of_all_ranks(sum_of_rows(values, self.log_weight))

    def log_mass_of_blocks(self, matrix: ScoreMatrix, groups: Tensor) -> Tensor:
        """[n, _BLOCKS]: the same for the blocks of the groups [n], scored again, whose numbers ascend."""
        return self._of_all_ranks(block_masses(matrix, groups, self.log_weight)).view(-1, _BLOCKS)

    def log_mass_of_slots(self, matrix: ScoreMatrix, blocks: Tensor, log_mass: Tensor) -> Tensor:
        """[n, BLOCK]: the same for the slots of the blocks [n], whose numbers ascend; with the masses of these."""
        return self._of_all_ranks(slot_masses(matrix, blocks, self.log_weight, log_mass)).view(-1, BLOCK)

    def _of_all_ranks(self, mass: Tensor) -> Tensor:
        return self.ranks.by_rank(self.ranks.gather(mass)).logsumexp(0)


class Largest(NamedTuple):
    """The slots of largest perturbed mass, in descending order: as many as asked for."""

    slot: Tensor  # [m]
    log_mass: Tensor  # [m]
    perturbed: Tensor  # [m]; -inf: there are fewer


def pass_over(matrix: ScoreMatrix) -> Pass:
    """All slots of the matrix, with a gradient of the normalisers if the queries have one."""
    stretches = segments(matrix.embeddings.shape[0])
    if len(stretches) == 1:
        summary = _summarize(matrix, BLOCK)
        missing = -summary.stretches.shape[1] % _BLOCKS
        blocks = pad(summary.stretches, (0, missing), value=-_INFINITY) if missing else summary.stretches
        return Pass(summary.log_normalizer, blocks, of_blocks=True)
    parts: list[Summary] = []
    for start, stop in stretches:
        if parts:
            # Otherwise the compiler may keep the buffers of all segments at once.
            matrix = matrix._replace(queries=sequenced_after(matrix.queries, parts[-1].stretches))
        parts.append(_summarize(matrix.of_slots(start, stop), GROUP))
    log_normalizer = logsumexp(torch.stack([part.log_normalizer for part in parts], dim=-1))
    return Pass(log_normalizer, torch.cat([part.stretches for part in parts], dim=1), of_blocks=False)


def draw_largest(
    matrix: ScoreMatrix, found: Pass, importance: Importance, noise: Noise, first_slot: int | Tensor, n: int
) -> Largest:
    """The `n` slots of largest perturbed mass, of a matrix whose first slot is `first_slot` in the whole cache."""
    # Groups, blocks and slots are numbered over the whole cache, because their numbers determine the noise.
    first_group, first_block = first_slot // GROUP, first_slot // BLOCK
    log_mass = importance.log_mass(found.stretches).view(-1, _BLOCKS if found.of_blocks else 1)
    group, perturbed, of_blocks = largest_groups(log_mass, noise, first_group, n)
    if not found.of_blocks:
        of_blocks = importance.log_mass_of_blocks(matrix, group - first_group)
    block, perturbed, log_mass = largest_children(of_blocks, noise, AMONG_BLOCKS, group, perturbed, n)
    of_slots = importance.log_mass_of_slots(matrix, block - first_block, log_mass)
    slot, perturbed, log_mass = largest_children(of_slots, noise, AMONG_SLOTS, block, perturbed, n)
    return _in_order(Largest(slot, log_mass, perturbed), n)


def draw_largest_among(scores: Tensor, slots: Tensor, log_weight: Tensor, noise: Noise, n: int) -> Largest:
    """The same among the documents of each query [B, k], of the slots [B, k]."""
    log_mass = torch.where((slots >= 0) & (log_weight > -_INFINITY)[:, None], scores + log_weight[:, None], -_INFINITY)
    slot, order = slots.flatten().sort(stable=True)
    log_mass = log_mass.flatten()[order]
    first = torch.cat([torch.ones_like(slot[:1], dtype=torch.bool), slot[1:] != slot[:-1]])
    number = first.cumsum(0) - 1  # of the document
    # Each document's masses are added relative to the largest.
    top = torch.full_like(log_mass, -_INFINITY).scatter_reduce(0, number, log_mass, "amax")
    relative = torch.where(log_mass > -_INFINITY, log_mass - top[number], -_INFINITY)
    log_mass = top + torch.zeros_like(log_mass).index_add(0, number, relative.exp()).log()
    slot = torch.full_like(slot, -1).scatter(0, number, slot)
    perturbed = log_mass + noise.of_slots(slot[None])[0, 0]
    return _in_order(Largest(slot, log_mass, torch.where(log_mass > -_INFINITY, perturbed, -_INFINITY)), n)


def largest_of_ranks(found: Largest, ranks: Ranks) -> Largest:
    """The largest of all, from the largest of each rank's shard."""
    return found if ranks.name is None else _in_order(_gathered(found, ranks), found.slot.shape[0])


def as_on_first_rank(found: Largest, ranks: Ranks) -> Largest:
    """Makes the values equal on every rank, as a device may add up masses in any order."""
    if ranks.name is None:
        return found
    n = found.slot.shape[0]
    slot, log_mass, perturbed = _gathered(found, ranks)
    return Largest(slot[:n], log_mass[:n], perturbed[:n])


def _summarize(matrix: ScoreMatrix, length: int) -> Summary:
    return summarize(matrix, length) if matrix.transform is None else summarize_transformed(matrix, length)


def _gathered(found: Largest, ranks: Ranks) -> Largest:
    # Slot numbers are exact in float64.
    sent = torch.stack([values.double() for values in found], dim=1)
    slot, log_mass, perturbed = ranks.gather(sent).unbind(1)
    dtype = found.log_mass.dtype
    return Largest(slot.to(torch.int64), log_mass.to(dtype), perturbed.to(dtype))


def _in_order(found: Largest, n: int) -> Largest:
    """The n of largest perturbed mass in descending order, ties by place, filled up with (-1, -inf, -inf)."""
    perturbed, place = found.perturbed.sort(descending=True, stable=True)
    place = place[:n]
    found = Largest(found.slot[place], found.log_mass[place], perturbed[:n])
    missing = n - found.slot.shape[0]
    if missing == 0:
        return found
    return Largest(*(pad(values, (0, missing), value=empty) for values, empty in zip(found, _NOTHING, strict=True)))
