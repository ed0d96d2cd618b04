"""Which slots are drawn: Gumbel-Max along a tree, after one streaming pass.

Slots form blocks of `BLOCK`, blocks form groups of `_GROUP`. The pass leaves the log-sum-exp of every block; then a
group is chosen by Gumbel-Max among the groups, a block inside it, and a slot inside that, each level with noise of its
own. This is exact, because the softmax factorises along the tree, and it needs noise for B * k * C / 1024 groups, not
for B * k * C slots. The largest perturbed log-sum-exp of the top level has the law of the largest perturbed score over
all slots and is independent of which slot attains it, and that is what makes a draw a monoid (`merge_draws`).

Several different slots are those of the largest perturbed scores. They lie in as many groups of largest perturbed
log-sum-exp, and in as many blocks of those; a level takes the perturbed value of a parent as the largest one among its
children, and changes their noise accordingly (`_given_maximum`).

Not every query must choose: `Noise.query` are those that do, and only the pass is made for all.

Sources: Gumbel-Max after Maddison, Tarlow, Minka, "A* sampling", NeurIPS 2014; the largest of several after Kool, van
Hoof, Welling, "Stochastic beams and where to find them", ICML 2019, appendix B.3.
"""

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import pad

from negcache_fn._kernels.blocks import BLOCK, GROUP
from negcache_fn.collectives import Ranks
from negcache_fn.ordering import after
from negcache_fn.random import gumbel
from negcache_fn.state import scalar, segments
from negcache_fn.streaming import ScoreMatrix, reduce_blocks, score_blocks

__all__ = ["Chosen", "Noise", "choose", "choose_among", "merge_shards"]

_GROUP = GROUP // BLOCK  # blocks
_QUAD = 4  # variates that one Philox call gives
_INFINITY = float("inf")
# Noise levels.
_AMONG_GROUPS, _AMONG_BLOCKS, _AMONG_SLOTS, _AMONG_QUERIES = 0, 1, 2, 3


class Noise(NamedTuple):
    """The rows of noise by which the queries choose, and how many places each row chooses."""

    seed: Tensor
    step: Tensor
    query: Tensor  # [B] the queries that choose, in ascending order: all, B of B, or one of each so many
    row: Tensor  # [B, k] row of the noise matrix, query x sample; [B, 1] if it chooses several places
    distinct: int  # the number of different places that a row chooses, those of its largest perturbed scores

    @classmethod
    def of(
        cls, state: TensorDictBase, first: int, queries: int, samples: int, *, replacement: bool, choosing: int
    ) -> "Noise":
        """Of the queries `first ...` of all ranks' queries, of which `choosing` choose: one of each as many in a row.

        Without replacement one place more is chosen than drawn.
        """
        seed, step = scalar(state, "seed"), scalar(state, "step")
        query = torch.arange(queries, device=seed.device)
        if choosing < queries:
            variates = gumbel(seed, step, query + first, torch.zeros_like(seed), level=_AMONG_QUERIES)[:, 0]
            place = variates.view(choosing, queries // choosing).argmax(1, keepdim=True)
            query = query.view(choosing, queries // choosing).gather(1, place)[:, 0]
        each = samples if replacement else 1
        row = (query + first)[:, None] * each + torch.arange(each, device=seed.device)
        return cls(seed, step, query, row, 1 if replacement else samples + 1)

    def columns(self, quad: Tensor, level: int) -> Tensor:
        """[B, m, 4 n] variates of the columns in the quads [..., n] (broadcast against [B, k, n])."""
        return gumbel(self.seed, self.step, self.row[..., None], quad, level=level).flatten(-2)


class Chosen(NamedTuple):
    """m slots for each query that chooses: k, or k + 1 different ones in descending order of their perturbed scores."""

    query: Tensor  # [M] which queries those are
    slot: Tensor  # [M, m]
    score: Tensor  # [M, m]
    perturbed: Tensor  # [M, m]; -inf: there are fewer different ones
    log_normalizer: Tensor  # [B]
    cutoff: Tensor  # [B, 1]


def choose(matrix: ScoreMatrix, noise: Noise, first_slot: int | Tensor) -> Chosen:
    """Among all slots of the matrix, whose first one has the number `first_slot` in the whole cache."""
    capacity = matrix.embeddings.shape[0]
    best = None
    for start, stop in segments(capacity):
        if best is not None:
            # Else the compiler may keep the blocks of all segments at once.
            matrix = matrix._replace(queries=after(matrix.queries, best.blocks))
        found = _choose_groups(matrix, noise, start, stop, first_slot)
        best = found if best is None else _better(best, found, noise.distinct)
    assert best is not None  # a cache has a slot
    # Groups, blocks and slots have the numbers that they have in the whole cache: noise goes by them.
    block, perturbed, _ = _choose_children(best.group, best.perturbed, best.blocks, noise, _AMONG_BLOCKS)
    within_block = score_blocks(matrix.of(noise.query), block - first_slot // BLOCK)
    slot, perturbed, score = _choose_children(block, perturbed, within_block, noise, _AMONG_SLOTS)
    # A query without a document may have chosen a place past the end.
    slot = (slot - first_slot).clamp(0, capacity - 1) + first_slot
    if noise.distinct > 1:
        slot, score, perturbed = _in_order(slot, score, perturbed, noise.distinct)
    cutoff = torch.full_like(best.log_normalizer, -_INFINITY)[:, None]
    return Chosen(noise.query, slot, score, perturbed, best.log_normalizer, cutoff)


def choose_among(scores: Tensor, slots: Tensor, noise: Noise) -> Chosen:
    """Among the hardest documents but the last, which is there to say where they end."""
    # Midway between the last document inside and the first outside: a score recomputed with other rounding stays on
    # its side.
    cutoff = (scores[:, -2] + scores[:, -1])[:, None] / 2
    log_normalizer = scores[:, :-1].logsumexp(-1)
    scores, slots = scores[noise.query, :-1], slots[noise.query, :-1]
    column = slots.clamp(min=0)[:, None, :]
    variates = noise.columns(column // _QUAD, _AMONG_SLOTS)
    lane = (torch.arange(slots.shape[1], device=slots.device) * _QUAD + column % _QUAD).expand(
        -1, variates.shape[1], -1
    )
    noisy = scores[:, None, :] + variates.gather(-1, lane)
    if noise.distinct == 1:
        perturbed, place = noisy.max(-1)
        slot, score = slots.gather(1, place), scores.gather(1, place)
        return Chosen(noise.query, slot, score, perturbed, log_normalizer, cutoff)
    missing = (0, noise.distinct)  # there may be fewer candidates
    slots, scores, perturbed = pad(slots, missing), pad(scores, missing), pad(noisy[:, 0], missing, value=-_INFINITY)
    slot, score, perturbed = _in_order(slots, scores, perturbed, noise.distinct)
    return Chosen(noise.query, slot, score, perturbed, log_normalizer, cutoff)


def merge_shards(chosen: Chosen, distinct: int, ranks: Ranks) -> Chosen:
    """Of what each rank has chosen for the queries of all: the best for this rank's own."""
    if ranks.name is None:
        return chosen
    # Slot numbers are exact in float64.
    sent = torch.stack([chosen.perturbed.double(), chosen.score.double(), chosen.slot.double()], dim=-1)
    received, log_normalizers = ranks.exchange_all(sent, chosen.log_normalizer.double())
    perturbed, score, slot = ranks.by_rank(received).unbind(-1)  # [ranks, M, m]
    if distinct == 1:
        perturbed, winner = perturbed.max(0, keepdim=True)
        slot, score, perturbed = slot.gather(0, winner)[0], score.gather(0, winner)[0], perturbed[0]
    else:
        slot, score, perturbed = (values.transpose(0, 1).flatten(1) for values in (slot, score, perturbed))
        slot, score, perturbed = _in_order(slot, score, perturbed, distinct)
    dtype = chosen.score.dtype
    log_normalizer = ranks.by_rank(log_normalizers).logsumexp(0).to(dtype)
    cutoff = torch.full_like(log_normalizer, -_INFINITY)[:, None]
    query = ranks.own(chosen.query) - ranks.rank * log_normalizer.shape[0]
    return Chosen(query, slot.to(torch.int64), score.to(dtype), perturbed.to(dtype), log_normalizer, cutoff)


class _Groups(NamedTuple):
    group: Tensor  # [M, m], ascending if they are different ones
    perturbed: Tensor  # [M, m]
    log_normalizer: Tensor  # [B], also of queries that do not choose
    blocks: Tensor  # [M, m, _GROUP] log-sum-exp of its blocks


def _choose_groups(matrix: ScoreMatrix, noise: Noise, start: int, stop: int, first_slot: int | Tensor) -> _Groups:
    """The groups of largest perturbed log-sum-exp among those of the slots `start ... stop - 1`."""
    part = matrix._replace(
        embeddings=matrix.embeddings[start:stop], bias=matrix.bias[start:stop], excluded=matrix.excluded - start
    )
    blocks = reduce_blocks(part, "logsumexp")
    blocks = pad(blocks, (0, -blocks.shape[1] % _GROUP), value=-_INFINITY)
    blocks = blocks.view(blocks.shape[0], -1, _GROUP)
    groups = blocks.logsumexp(-1)
    first_group = (first_slot + start) // (BLOCK * _GROUP)
    noisy = groups[noise.query, None] + _noise_of_groups(noise, first_group, groups.shape[1])
    if noise.distinct == 1:
        perturbed, group = noisy.max(-1)
    else:
        noisy = pad(noisy[:, 0], (0, noise.distinct), value=-_INFINITY)  # there may be fewer groups
        group = _largest(noisy, noise.distinct)
        perturbed, group = noisy.gather(1, group), group.clamp(max=groups.shape[1] - 1)
    within_group = blocks[noise.query[:, None], group]
    return _Groups(group + first_group, perturbed, groups.logsumexp(-1), within_group)


def _noise_of_groups(noise: Noise, first: int | Tensor, count: int) -> Tensor:
    """[B, k, count] variates of the groups `first ...`, which need not be the first of a quad."""
    if isinstance(first, int) and first % _QUAD == 0:
        quads = torch.arange(-(-count // _QUAD), device=noise.row.device) + first // _QUAD
        return noise.columns(quads, _AMONG_GROUPS)[..., :count]
    quads = torch.arange(-(-count // _QUAD) + 1, device=noise.row.device) + first // _QUAD
    columns = torch.arange(count, device=noise.row.device) + first % _QUAD
    return noise.columns(quads, _AMONG_GROUPS).index_select(-1, columns)


def _better(a: _Groups, b: _Groups, distinct: int) -> _Groups:
    log_normalizer = torch.logaddexp(a.log_normalizer, b.log_normalizer)
    if distinct > 1:
        group, perturbed, blocks = (
            torch.cat(both, dim=1) for both in ((a.group, b.group), (a.perturbed, b.perturbed), (a.blocks, b.blocks))
        )
        place = _largest(perturbed, distinct)
        of_place = place[..., None].expand(*place.shape, _GROUP)
        return _Groups(group.gather(1, place), perturbed.gather(1, place), log_normalizer, blocks.gather(1, of_place))
    b_wins = b.perturbed > a.perturbed
    return _Groups(
        torch.where(b_wins, b.group, a.group),
        torch.where(b_wins, b.perturbed, a.perturbed),
        log_normalizer,
        torch.where(b_wins[..., None], b.blocks, a.blocks),
    )


def _choose_children(
    parent: Tensor, perturbed: Tensor, scores: Tensor, noise: Noise, level: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Among the n children of each chosen place: number, perturbed score and score of m of them, [B, m].

    Args:
        parent: [B, m] numbers.
        perturbed: [B, m] their perturbed scores.
        scores: [B, m, n] of their children.
        noise: of the queries.
        level: of the children.
    """
    children = scores.shape[-1]
    quads = children // _QUAD
    quad = parent[..., None] * quads + torch.arange(quads, device=parent.device)
    noisy = scores + noise.columns(quad, level)
    if noise.distinct == 1:  # a child of each parent, whose perturbed score is the parent's
        place = noisy.argmax(-1)
        return parent * children + place, perturbed, scores.gather(-1, place[..., None]).squeeze(-1)
    noisy = _given_maximum(noisy, perturbed).flatten(1)
    place = _largest(noisy, noise.distinct)
    number = parent.gather(1, place // children) * children + place % children
    return number, noisy.gather(1, place), scores.flatten(1).gather(1, place)


def _given_maximum(perturbed: Tensor, maximum: Tensor) -> Tensor:
    """[B, m, n] perturbed scores, changed into such whose largest one is `maximum` [B, m].

    With `Z` the largest, `G` becomes `-log(exp(-maximum) - exp(-Z) + exp(-G))`: of Gumbel variables it makes variables
    with the law that those have given their maximum. Which one is the largest stays.
    """
    below = perturbed - perturbed.amax(-1, keepdim=True)
    difference = maximum[..., None] - perturbed + torch.log(-torch.expm1(below))
    given = maximum[..., None] - torch.logaddexp(difference, torch.zeros_like(difference))
    nothing = (perturbed == -_INFINITY) | (maximum == -_INFINITY)[..., None]
    return torch.where(nothing, -_INFINITY, given)


def _largest(values: Tensor, n: int) -> Tensor:
    """[B, n] places of the n largest values of each row, ties by place; the places ascend."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :n].sort(dim=1).values


def _in_order(slot: Tensor, score: Tensor, perturbed: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n of largest perturbed score of each row, in descending order, ties by place."""
    perturbed, place = perturbed.sort(dim=1, descending=True, stable=True)
    place = place[:, :n]
    return slot.gather(1, place), score.gather(1, place), perturbed[:, :n]
