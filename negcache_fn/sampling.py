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
from negcache_fn.collectives import Ranks, Shards, agree, check_placement, distribute, fetch
from negcache_fn.false_negatives import (
    NO_FALSE_NEGATIVES,
    Exclusions,
    FalseNegatives,
    check_false_negatives,
)
from negcache_fn.mining import hardest_of_all
from negcache_fn.random import gumbel
from negcache_fn.scoring import check_search, score_matrix, softmax_dtype
from negcache_fn.state import scalar, segments, stored
from negcache_fn.streaming import BLOCK, ScoreMatrix, ScoreTransform, after, full_precision, reduce_blocks, score_blocks

__all__ = ["Draw", "check_draw", "check_draws", "draw_negatives", "merge_draws", "sample_gumbel"]

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
    max_score: Tensor  # [B, S]: those with a higher one, log-weight not included, too; +inf without such a limit
    exclude_ids: Tensor  # [1 or B, P] int64: documents that have probability 0; P may be 0


def sample_gumbel(
    state: TensorDictBase,
    queries: Tensor,
    *,
    num_samples: int = 1,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
    exclude_ids: Tensor | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    top_k: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    placement: str = "sharded",
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
        exclude_ids: int64 ids of documents that must not be drawn (positives, and what is a class already), [P] for
            all queries or [B, P] for each; -1 means none.
        false_negatives: what else is no negative of a query, by id or by score.
        top_k: restricts each query's softmax to its `top_k` highest scores, exactly, ties by slot.
        group: of ranks that draw together, each for its own queries: what they draw is what one rank draws that has
            the queries of all, in the order of ranks. Ids [P] are excluded for the queries of every rank.
        placement: "sharded": each rank has a part of the cache, and slots are numbers of all its slots; "replicated":
            each has the whole.

    Returns:
        The draws. A query that has no document gets slot -1 and log-normaliser -inf.

    Raises:
        ValueError, TypeError: queries that are not [B, D] floating on the device of the state; non-positive
            `num_samples`; `top_k` not in 1 ... C; `exclude_ids` or `false_negatives` of another shape or dtype.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> state = update(state, torch.ones(2, 3), torch.randn(2, 4))
        >>> draw = sample_gumbel(state, torch.randn(5, 4), num_samples=3)
        >>> draw.slot.shape, bool((draw.slot < 2).all())
        (torch.Size([5, 3]), True)

    Reference: Lindgren et al., NeurIPS 2021, section 3 and algorithm 1.
    """
    ranks = distribute(group)
    with ranks.checking():
        check_placement(placement, ranks)
        check_search(state, queries, scale, exclude_ids)
        check_false_negatives(false_negatives, queries, knows_positives=False)
        check_draws(state, num_samples, top_k, ranks)
        exclusions = Exclusions.of(queries, exclude_ids, false_negatives, softmax_dtype(state, queries))
    queries, shards = agree(
        ranks,
        queries,
        stored(state, "embedding").shape[0],
        placement=placement,
        options=f"sample_gumbel {exclusions.described}",
        seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
        top_k=0 if top_k is None else top_k,
        exclude_ids=exclusions.ids,
        queries=queries.shape[0],
        num_samples=num_samples,
    )
    return draw_negatives(
        state,
        queries,
        ranks,
        shards,
        num_samples=num_samples,
        scale=scale,
        score_transform=score_transform,
        exclusions=exclusions,
        top_k=top_k,
        also=[],
    )[0]


def draw_negatives(
    state: TensorDictBase,
    queries: Tensor,
    ranks: Ranks,
    shards: Shards,
    *,
    num_samples: int,
    scale: float | Tensor,
    score_transform: ScoreTransform | None,
    exclusions: Exclusions,
    top_k: int | None,
    also: list[Tensor],
) -> tuple[Draw, list[Tensor]]:
    """`sample_gumbel` on checked arguments: of this rank's queries, from slots wherever they are.

    Returns the rows of the tensors `also` [C, ...] that were drawn, [B * k, ...], besides.
    """
    rows = queries.shape[0]
    with torch.no_grad(), full_precision(queries):  # sampling has no gradient
        if shards.ranks.name is not None:
            # A shard is searched for the queries of all ranks.
            everyone, of_all = exclusions.gathered(queries, ranks)
        else:
            everyone, of_all = queries, exclusions
            if of_all.for_all.shape[0] > 0:
                of_all = of_all._replace(for_all=ranks.gather(of_all.for_all))
        matrix = score_matrix(state, everyone, scale=scale, score_transform=score_transform, exclusions=of_all)
        first_row = ranks.rank * rows
        if top_k is not None:
            own_noise = _Noise.of(state, first_row, rows, num_samples)
            chosen = _choose_among(*hardest_of_all(matrix, top_k + 1, shards), own_noise)
        else:
            first_row = first_row if shards.ranks.name is None else 0
            noise = _Noise.of(state, first_row, everyone.shape[0], num_samples)
            chosen = _merge_shards(_choose(matrix, noise, shards.first), shards.ranks)
        # What is excluded for all is not among the draws, and needs no mention beside what is for each.
        excluded = exclusions.for_each if exclusions.for_each.shape[1] > 0 else of_all.for_all[None]
        return _describe(state, chosen, shards, exclusions.max_score, excluded, also)


def check_draws(state: TensorDictBase, num_samples: int, top_k: int | None, ranks: Ranks) -> None:
    """Raises unless so many draws can be made."""
    check_size("num_samples", num_samples)
    if top_k is not None:
        check_size("top_k", top_k, most=stored(state, "embedding").shape[0] if ranks.name is None else None)


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
        max_score=torch.cat([a.max_score, b.max_score], dim=1),
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

    @classmethod
    def of(cls, state: TensorDictBase, first: int, queries: int, samples: int) -> "_Noise":
        """Of the queries `first ...` of all ranks' queries."""
        seed, step = scalar(state, "seed"), scalar(state, "step")
        rows = torch.arange(queries * samples, device=seed.device) + first * samples
        return cls(seed, step, rows.view(queries, samples))

    def columns(self, quad: Tensor, level: int) -> Tensor:
        """[B, k, 4 n] variates of the columns in the quads [..., n] (broadcast against [B, k, n])."""
        return gumbel(self.seed, self.step, self.row[..., None], quad, level=level).flatten(-2)


class _Chosen(NamedTuple):
    slot: Tensor  # [B, k]
    score: Tensor  # [B, k]
    perturbed: Tensor  # [B, k]
    log_normalizer: Tensor  # [B]
    cutoff: Tensor  # [B, 1]


def _choose(matrix: ScoreMatrix, noise: _Noise, first_slot: int | Tensor) -> _Chosen:
    capacity = matrix.embeddings.shape[0]
    best = None
    for start, stop in segments(capacity):
        if best is not None:
            # Else the compiler may keep the blocks of all segments at once.
            matrix = matrix._replace(queries=after(matrix.queries, best.blocks))
        found = _choose_group(matrix, noise, start, stop, first_slot)
        best = found if best is None else _better(best, found)
    assert best is not None  # a cache has a slot
    # Groups, blocks and slots have the numbers that they have in the whole cache: noise goes by them.
    block = best.group * _GROUP + _perturbed_argmax(best.blocks, noise, best.group, _AMONG_BLOCKS)
    within_block = score_blocks(matrix, block - first_slot // BLOCK)
    place = _perturbed_argmax(within_block, noise, block, _AMONG_SLOTS)
    score = within_block.gather(-1, place[..., None]).squeeze(-1)
    # A query without a document may have chosen a place past the end.
    slot = (block * BLOCK + place - first_slot).clamp(0, capacity - 1) + first_slot
    cutoff = torch.full_like(best.log_normalizer, -_INFINITY)[:, None]
    return _Chosen(slot, score, best.perturbed, best.log_normalizer, cutoff)


def _merge_shards(chosen: _Chosen, ranks: Ranks) -> _Chosen:
    """Of what each rank has chosen for the queries of all: the best for this rank's own."""
    if ranks.name is None:
        return chosen
    # Slot numbers are exact in float64, so that one exchange does.
    sent = torch.stack([chosen.perturbed.double(), chosen.score.double(), chosen.slot.double()], dim=-1).flatten(1)
    sent = torch.cat([sent, chosen.log_normalizer.double()[:, None]], dim=1)
    received = ranks.by_rank(ranks.exchange(sent))  # [ranks, B, 3 k + 1]
    perturbed, score, slot = received[..., :-1].view(*received.shape[:2], -1, 3).unbind(-1)
    largest, winner = perturbed.max(0, keepdim=True)
    dtype = chosen.score.dtype
    log_normalizer = received[..., -1].logsumexp(0).to(dtype)
    return _Chosen(
        slot.gather(0, winner)[0].to(torch.int64),
        score.gather(0, winner)[0].to(dtype),
        largest[0].to(dtype),
        log_normalizer,
        torch.full_like(log_normalizer, -_INFINITY)[:, None],
    )


class _Group(NamedTuple):
    group: Tensor  # [B, k]
    perturbed: Tensor  # [B, k]
    log_normalizer: Tensor  # [B]
    blocks: Tensor  # [B, k, _GROUP] log-sum-exp of its blocks


def _choose_group(matrix: ScoreMatrix, noise: _Noise, start: int, stop: int, first_slot: int | Tensor) -> _Group:
    """The group of largest perturbed log-sum-exp among those of the slots `start ... stop - 1`."""
    part = matrix._replace(
        embeddings=matrix.embeddings[start:stop], bias=matrix.bias[start:stop], excluded=matrix.excluded - start
    )
    blocks = reduce_blocks(part, "logsumexp")
    blocks = pad(blocks, (0, -blocks.shape[1] % _GROUP), value=-_INFINITY)
    blocks = blocks.view(blocks.shape[0], -1, _GROUP)
    groups = blocks.logsumexp(-1)
    first_group = (first_slot + start) // (BLOCK * _GROUP)
    perturbed, group = (groups[:, None, :] + _noise_of_groups(noise, first_group, groups.shape[1])).max(-1)
    within_group = blocks.gather(1, group[..., None].expand(*group.shape, _GROUP))
    return _Group(group + first_group, perturbed, groups.logsumexp(-1), within_group)


def _noise_of_groups(noise: _Noise, first: int | Tensor, count: int) -> Tensor:
    """[B, k, count] variates of the groups `first ...`, which need not be the first of a quad."""
    if isinstance(first, int) and first % _QUAD == 0:
        quads = torch.arange(-(-count // _QUAD), device=noise.row.device) + first // _QUAD
        return noise.columns(quads, _AMONG_GROUPS)[..., :count]
    quads = torch.arange(-(-count // _QUAD) + 1, device=noise.row.device) + first // _QUAD
    columns = torch.arange(count, device=noise.row.device) + first % _QUAD
    return noise.columns(quads, _AMONG_GROUPS).index_select(-1, columns)


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


def _choose_among(scores: Tensor, slots: Tensor, noise: _Noise) -> _Chosen:
    """Among the hardest documents but the last, which is there to say where they end."""
    # Midway between the last document inside and the first outside: a score recomputed with other rounding stays on
    # its side.
    cutoff = (scores[:, -2] + scores[:, -1])[:, None] / 2
    scores, slots = scores[:, :-1], slots[:, :-1]
    column = slots.clamp(min=0)[:, None, :]
    variates = noise.columns(column // _QUAD, _AMONG_SLOTS)
    lane = (torch.arange(slots.shape[1], device=slots.device) * _QUAD + column % _QUAD).expand(
        -1, variates.shape[1], -1
    )
    perturbed, place = (scores[:, None, :] + variates.gather(-1, lane)).max(-1)
    return _Chosen(slots.gather(1, place), scores.gather(1, place), perturbed, scores.logsumexp(-1), cutoff)


def _describe(
    state: TensorDictBase,
    chosen: _Chosen,
    shards: Shards,
    max_score: Tensor | None,
    excluded: Tensor,
    also: list[Tensor],
) -> tuple[Draw, list[Tensor]]:
    # A comparison that NaN fails: queries that have diverged draw nothing, and their loss says so.
    drawn = (chosen.log_normalizer > -_INFINITY)[:, None]
    slot = torch.where(drawn, chosen.slot, -1)
    leaves = [stored(state, name) for name in ("embedding", "id", "log_weight")]
    embedding, document, log_weight, *others = fetch([*leaves, *also], slot.flatten(), shards)
    draw = Draw(
        slot=slot,
        score=torch.where(drawn, chosen.score, -_INFINITY),
        perturbed=chosen.perturbed,
        log_normalizer=chosen.log_normalizer,
        embedding=embedding.view(*slot.shape, -1),
        id=torch.where(drawn, document.view(slot.shape), -1),
        log_weight=torch.where(drawn, log_weight.view(slot.shape), 0.0),
        source=torch.zeros_like(slot),
        cutoff=chosen.cutoff,
        max_score=torch.full_like(chosen.cutoff, _INFINITY) if max_score is None else max_score[:, None].clone(),
        exclude_ids=excluded,
    )
    return draw, others
