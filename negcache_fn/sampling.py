"""Draws from the softmax over the cache by Gumbel-Max, in one streaming pass.

Slots form blocks of `BLOCK`, blocks form groups of `_GROUP`. The pass leaves the log-sum-exp of every block; then a
group is chosen by Gumbel-Max among the groups, a block inside it, and a slot inside that, each level with noise of its
own. This is exact, because the softmax factorises along the tree, and it needs noise for B * k * C / 1024 groups, not
for B * k * C slots. The largest perturbed log-sum-exp of the top level has the law of the largest perturbed score over
all slots and is independent of which slot attains it, and that is what makes a draw a monoid (`merge_draws`).

Sources: Gumbel-Max after Maddison, Tarlow, Minka, "A* sampling", NeurIPS 2014; the cache softmax after Lindgren,
Reddi, Guo, Kumar, NeurIPS 2021, section 3.
"""

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import pad

from negcache_fn.checks import check_size
from negcache_fn.mining import hardest
from negcache_fn.random import gumbel
from negcache_fn.scoring import full_precision, score_matrix
from negcache_fn.state import scalar, segments, stored
from negcache_fn.streaming import BLOCK, ScoreMatrix, ScoreTransform, reduce_blocks, score_blocks

__all__ = ["Draw", "check_draw", "merge_draws", "sample_gumbel"]

_GROUP = 16  # blocks
_QUAD = 4  # variates that one Philox call gives
_INFINITY = float("inf")
# Noise levels.
_AMONG_GROUPS, _AMONG_BLOCKS, _AMONG_SLOTS = 0, 1, 2


class Draw(NamedTuple):
    """k draws with replacement for each of B queries, and what their shared weights need. No gradient."""

    slot: Tensor  # [B, k] int64; -1: the query has no document to draw
    score: Tensor  # [B, k] stale score of the drawn document, log-weight included
    perturbed: Tensor  # [B, k] largest perturbed score: Gumbel distributed around the log-normaliser
    log_normalizer: Tensor  # [B] log-sum-exp of the scores, -inf where there is no document
    embedding: Tensor  # [B, k, D] stale embedding, storage dtype
    id: Tensor  # [B, k] int64
    log_weight: Tensor  # [B, k] float32
    source: Tensor  # [B, k] int64: of which of S merged caches the slot is
    cutoff: Tensor  # [B, S]: documents of that source with a lower score have probability 0; -inf without top_k
    exclude_ids: Tensor  # [1 or B, P] int64: documents that have probability 0; P may be 0


def sample_gumbel(
    state: TensorDictBase,
    queries: Tensor,
    *,
    num_samples: int = 1,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    exclude_ids: Tensor | None = None,
    top_k: int | None = None,
) -> Draw:
    """Draws documents from `softmax(score(state, queries))`, independently for every query and sample.

    Equivalent to `(score(state, queries)[:, None, :] + gumbel_noise).argmax(-1)`, without the [B, C] matrices. The
    draws are a function of the arguments alone; `state["step"]`, which every update advances, makes them new.

    Args:
        state: the cache.
        queries: [B, D] floating.
        num_samples: k, draws per query, with replacement.
        scale: number or 0-d tensor.
        score_transform: elementwise function of the scaled inner products.
        exclude_ids: int64 ids of documents that must not be drawn (false negatives), [P] for all queries or [B, P] for
            each; -1 means none.
        top_k: restricts each query's softmax to its `top_k` highest scores, exactly, ties by slot.

    Returns:
        The draws. A query that has no document gets slot -1 and log-normaliser -inf.

    Raises:
        ValueError, TypeError: queries that are not [B, D] floating on the device of the state; non-positive
            `num_samples`; `top_k` not in 1 ... C; `exclude_ids` of another shape or dtype.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> state = update(state, torch.ones(2, 3), torch.randn(2, 4))
        >>> draw = sample_gumbel(state, torch.randn(5, 4), num_samples=3)
        >>> draw.slot.shape, bool((draw.slot < 2).all())
        (torch.Size([5, 3]), True)

    Reference: Lindgren et al., NeurIPS 2021, section 3 and algorithm 1.
    """
    with torch.no_grad(), full_precision(state):  # sampling has no gradient
        matrix = score_matrix(state, queries, scale=scale, score_transform=score_transform, exclude_ids=exclude_ids)
        check_size("num_samples", num_samples)
        rows = queries.shape[0]
        sample = torch.arange(rows * num_samples, device=queries.device).view(rows, num_samples)
        noise = _Noise(scalar(state, "seed"), scalar(state, "step"), sample)
        if top_k is None:
            chosen = _choose(matrix, noise)
        else:
            check_size("top_k", top_k, most=matrix.embeddings.shape[0])
            chosen = _choose_among_hardest(matrix, noise, top_k)
        return _describe(state, matrix, chosen, exclude_ids)


def merge_draws(a: Draw, b: Draw) -> Draw:
    """The draws from the union of two disjoint sets of documents, from the draws of each.

    The larger perturbed value wins and the normalisers add. Associative, and commutative but for the numbers in
    `source`: those of `b` are counted on from those of `a`.

    Args:
        a: draws for B queries.
        b: draws for the same queries, exclusions and number of samples, from a cache with another seed (or other slots
            of the same): equal noise would favour the same places in both.

    Returns:
        Draws whose `slot` refers to the cache `source`.

    Raises:
        ValueError: another number of queries, samples or dimensions.

    Examples:
        >>> left, right = (init_cache(8, 4, torch.zeros(1, 3), seed=seed) for seed in (0, 1))
        >>> right = update(right, torch.ones(2, 3), torch.randn(2, 4))
        >>> queries = torch.randn(5, 4)
        >>> merge_draws(sample_gumbel(left, queries), sample_gumbel(right, queries)).source.unique()
        tensor([1])
    """
    check_draw("a", a)
    check_draw("b", b)
    if a.embedding.shape != b.embedding.shape:
        raise ValueError(
            f"b has embeddings of shape {tuple(b.embedding.shape)}; "
            f"expected those of a, [queries, samples, D] = {tuple(a.embedding.shape)}"
        )
    b_wins = b.perturbed > a.perturbed

    def winner(of_a: Tensor, of_b: Tensor) -> Tensor:
        return torch.where(b_wins.view(*b_wins.shape, *[1] * (of_a.ndim - 2)), of_b, of_a)

    return Draw(
        slot=winner(a.slot, b.slot),
        score=winner(a.score, b.score),
        perturbed=winner(a.perturbed, b.perturbed),
        log_normalizer=torch.logaddexp(a.log_normalizer, b.log_normalizer),
        embedding=winner(a.embedding, b.embedding),
        id=winner(a.id, b.id),
        log_weight=winner(a.log_weight, b.log_weight),
        source=winner(a.source, b.source + a.cutoff.shape[1]),
        cutoff=torch.cat([a.cutoff, b.cutoff], dim=1),
        exclude_ids=a.exclude_ids,
    )


def check_draw(name: str, value: object) -> None:
    """Raises unless `value` is a `Draw`."""
    if not isinstance(value, Draw):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected a Draw, as made by negcache_fn.sample_gumbel(...)"
        )


class _Noise(NamedTuple):
    seed: Tensor
    step: Tensor
    row: Tensor  # [B, k] row of the noise matrix: query x sample

    def columns(self, quad: Tensor, level: int) -> Tensor:
        """[B, k, 4 n] variates of the columns in the quads [..., n] (broadcast against [B, k, n])."""
        return gumbel(self.seed, self.step, self.row[..., None], quad, level=level).flatten(-2)


class _Chosen(NamedTuple):
    slot: Tensor  # [B, k]
    score: Tensor  # [B, k]
    perturbed: Tensor  # [B, k]
    log_normalizer: Tensor  # [B]
    cutoff: Tensor  # [B, 1]


def _choose(matrix: ScoreMatrix, noise: _Noise) -> _Chosen:
    best = None
    for start, stop in segments(matrix.embeddings.shape[0]):
        found = _choose_group(matrix, noise, start, stop)
        best = found if best is None else _better(best, found)
    assert best is not None  # a cache has a slot
    block = best.group * _GROUP + _perturbed_argmax(best.blocks, noise, best.group, _AMONG_BLOCKS)
    within_block = score_blocks(matrix, block)
    place = _perturbed_argmax(within_block, noise, block, _AMONG_SLOTS)
    score = within_block.gather(-1, place[..., None]).squeeze(-1)
    cutoff = torch.full_like(best.log_normalizer, -_INFINITY)[:, None]
    return _Chosen(block * BLOCK + place, score, best.perturbed, best.log_normalizer, cutoff)


class _Group(NamedTuple):
    group: Tensor  # [B, k]
    perturbed: Tensor  # [B, k]
    log_normalizer: Tensor  # [B]
    blocks: Tensor  # [B, k, _GROUP] log-sum-exp of its blocks


def _choose_group(matrix: ScoreMatrix, noise: _Noise, start: int, stop: int) -> _Group:
    """The group of largest perturbed log-sum-exp among those of the slots `start ... stop - 1`."""
    part = matrix._replace(
        embeddings=matrix.embeddings[start:stop], bias=matrix.bias[start:stop], excluded=matrix.excluded - start
    )
    blocks = reduce_blocks(part, "logsumexp")
    blocks = pad(blocks, (0, -blocks.shape[1] % _GROUP), value=-_INFINITY)
    blocks = blocks.view(blocks.shape[0], -1, _GROUP)
    groups = blocks.logsumexp(-1)
    first_quad = start // (BLOCK * _GROUP * _QUAD)
    quads = torch.arange(-(-groups.shape[1] // _QUAD), device=groups.device) + first_quad
    among_groups = noise.columns(quads, _AMONG_GROUPS)[..., : groups.shape[1]]
    perturbed, group = (groups[:, None, :] + among_groups).max(-1)
    within_group = blocks.gather(1, group[..., None].expand(*group.shape, _GROUP))
    return _Group(group + first_quad * _QUAD, perturbed, groups.logsumexp(-1), within_group)


def _better(a: _Group, b: _Group) -> _Group:
    b_wins = b.perturbed > a.perturbed
    return _Group(
        torch.where(b_wins, b.group, a.group),
        torch.where(b_wins, b.perturbed, a.perturbed),
        torch.logaddexp(a.log_normalizer, b.log_normalizer),
        torch.where(b_wins[..., None], b.blocks, a.blocks),
    )


def _perturbed_argmax(scores: Tensor, noise: _Noise, parent: Tensor, level: int) -> Tensor:
    """[B, k]: which of the `n` children [B, k, n] of `parent` [B, k] has the largest perturbed score."""
    quads_per_parent = scores.shape[-1] // _QUAD
    quad = parent[..., None] * quads_per_parent + torch.arange(quads_per_parent, device=parent.device)
    return (scores + noise.columns(quad, level)).argmax(-1)


def _choose_among_hardest(matrix: ScoreMatrix, noise: _Noise, top_k: int) -> _Chosen:
    candidates = min(top_k + 1, matrix.embeddings.shape[0])
    scores, slots = hardest(matrix, candidates)
    last, following = scores[:, top_k - 1], scores[:, candidates - 1]
    # Midway between the last document inside and the first outside: a score recomputed with other rounding stays on
    # its side.
    cutoff = (last + following)[:, None] / 2 if candidates > top_k else torch.full_like(last, -_INFINITY)[:, None]
    scores, slots = scores[:, :top_k], slots[:, :top_k]
    column = slots.clamp(min=0)[:, None, :]
    variates = noise.columns(column // _QUAD, _AMONG_SLOTS)
    lane = (torch.arange(top_k, device=slots.device) * _QUAD + column % _QUAD).expand(-1, variates.shape[1], -1)
    perturbed, place = (scores[:, None, :] + variates.gather(-1, lane)).max(-1)
    return _Chosen(slots.gather(1, place), scores.gather(1, place), perturbed, scores.logsumexp(-1), cutoff)


def _describe(state: TensorDictBase, matrix: ScoreMatrix, chosen: _Chosen, exclude_ids: Tensor | None) -> Draw:
    # A comparison that NaN fails: queries that have diverged draw nothing, and their loss says so.
    drawn = (chosen.log_normalizer > -_INFINITY)[:, None]
    capacity = matrix.embeddings.shape[0]
    row = chosen.slot.clamp(0, capacity - 1)
    excluded = row.new_empty(1, 0) if exclude_ids is None else exclude_ids
    return Draw(
        slot=torch.where(drawn, row, -1),
        score=torch.where(drawn, chosen.score, -_INFINITY),
        perturbed=chosen.perturbed,
        log_normalizer=chosen.log_normalizer,
        embedding=matrix.embeddings[row],
        id=torch.where(drawn, stored(state, "id")[row], -1),
        log_weight=torch.where(drawn, stored(state, "log_weight")[row], 0.0),
        source=torch.zeros_like(row),
        cutoff=chosen.cutoff,
        exclude_ids=excluded if excluded.ndim == 2 else excluded[None],
    )
