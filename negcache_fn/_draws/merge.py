"""Several caches as one softmax: draws from their union, the drawn documents, and the fresh embeddings of each cache.

A merged draw names the cache (`draw.source`) of each of its slots. A slot means nothing in another cache, which may
even be smaller; the functions here keep them apart.
"""

from collections.abc import Sequence
from typing import cast

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.take import take
from negcache_fn._checks import check_embeddings
from negcache_fn._draws.draw import Draw, check_draw
from negcache_fn._features import Features, leaves, map_features, rows_where
from negcache_fn._operators import operator
from negcache_fn._ranks.agree import check_ranks_agree, checking_arguments
from negcache_fn._ranks.group import Ranks, ranks_of
from negcache_fn._scores.stream import logsumexp

__all__ = ["merge_draws", "split_refresh", "take_drawn"]

_OF_DOCUMENTS = ("embedding", "slot", "score", "perturbed", "id", "log_weight", "source", "label")


def merge_draws(a: Draw, b: Draw, *, group: torch.distributed.ProcessGroup | None = None) -> Draw:
    """The draws from the union of two disjoint sets of documents, from the draws of each.

    The larger perturbed values win (of each sample, or for the batch the M largest of both) and the normalisers add.
    Merging is associative, and commutative apart from the numbers in `source`: those of `b` follow those of `a`.

    For the batch, masses stay as they are. So the result is the draw of the union with `importance` p + q, if the
    `importance` p and q of `a` and `b` are each cache's share in the query's softmax over everything. With other values
    the M documents are not the best choice, but `loss` is still right.

    Args:
        a: draws for B queries.
        b: draws for the same queries, exclusions and number of draws, from a cache with another seed: equal noise would
            favour the same places in both. On CUDA the check of seeds and exclusions waits for the device.
        group: ranks that drew for the batch together. Each has a part of both draws, and gets a part of the result.
            Draws of each query need no group.

    Returns:
        Draws whose `slot` refers to the cache `source`.

    Raises:
        ValueError: another number of queries, draws or dimensions; other exclusions; the same noise, as in caches with
            the same seed; one draw for the batch and one for each query.

    Examples:
        >>> left, right = (init_cache(8, 4, torch.zeros(1, 3), seed=seed) for seed in (0, 1))
        >>> right = update(right, torch.ones(2, 3), torch.randn(2, 4))
        >>> queries = torch.randn(5, 4)
        >>> merge_draws(*(sample_gumbel(state, queries, num_draws=2) for state in (left, right))).source
        tensor([[1, 1]])
    """
    ranks = ranks_of(group)
    with checking_arguments(ranks):
        _check_pair(a, b)
        a = a._replace(perturbed=_checked(a, b))
    if ranks.name is None:
        return _merged(a, b)
    queries, _ = check_ranks_agree(
        ranks,
        a.embedding[0],
        0,
        function="merge_draws",
        name="a.embedding",
        rows={"b.embedding": b.embedding[0], "a.score": a.score[0], "b.score": b.score[0]},
        numbers={"draws": a.slot.shape[1], "caches of a": a.cutoff.shape[1], "caches of b": b.cutoff.shape[1]},
        choices={"drawn for": _whom(a)},
    )
    return _merged_by_ranks(a._replace(embedding=queries[None]), b, ranks) if a.for_batch else _merged(a, b)


def take_drawn(
    states: Sequence[TensorDictBase], draw: Draw, *, group: torch.distributed.ProcessGroup | None = None
) -> Tensor | TensorDictBase:
    """The features of the drawn documents, each from the cache that it was drawn from.

    Naive equivalent: `take(states[source], slot)` for every drawn document.

    Args:
        states: the caches, in the order in which their draws were merged. Their features have the same nesting, shapes
            and dtypes.
        draw: the merged draw, [B, k].
        group: ranks over which the caches are sharded.

    Returns:
        Features of B * k documents, in the order of `draw.slot.flatten()`. Encode them for `loss`.

    Raises:
        ValueError, TypeError: another number of caches than were merged; features that differ between the caches.

    Examples:
        >>> left, right = (init_cache(8, 4, torch.zeros(1, 3), seed=seed) for seed in (0, 1))
        >>> right = update(right, torch.ones(2, 3), torch.randn(2, 4))
        >>> queries = torch.randn(5, 4)
        >>> draw = merge_draws(sample_gumbel(left, queries), sample_gumbel(right, queries))
        >>> take_drawn([left, right], draw).shape
        torch.Size([5, 3])
    """
    check_draw("draw", draw)
    sources = draw.cutoff.shape[1]
    if not isinstance(states, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not check types
        raise TypeError(f"states is a {type(states).__name__}; expected a list of caches")
    if len(states) != sources:
        raise ValueError(f"states has {len(states)} caches; expected {sources}, as many as the draw was merged from")
    found = cast(Features, take(states[0], _slots_of(draw, 0), group=group))
    for source, state in enumerate(states[1:], start=1):
        slots = _slots_of(draw, source)
        found = _replaced(found, cast(Features, take(state, slots, group=group)), slots >= 0, source)
    return cast("Tensor | TensorDictBase", found)


def split_refresh(draw: Draw, embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The argument `refresh` for the `update` of each cache.

    Args:
        draw: the merged draw, [B, k].
        embeddings: [B * k, D] the fresh embeddings of the drawn documents.

    Returns:
        For each merged cache its slots [B * k], -1 for documents of other caches, and the embeddings.

    Raises:
        ValueError, TypeError: embeddings of another shape.

    Examples:
        >>> left, right = (init_cache(8, 4, torch.zeros(1, 3), seed=seed) for seed in (0, 1))
        >>> right = update(right, torch.ones(2, 3), torch.randn(2, 4))
        >>> queries = torch.randn(3, 4)
        >>> draw = merge_draws(*(sample_gumbel(state, queries, draws_per_query=1) for state in (left, right)))
        >>> [slots.max() >= 0 for slots, _ in split_refresh(draw, torch.ones(3, 4))]
        [tensor(False), tensor(True)]
    """
    check_draw("draw", draw)
    check_embeddings("embeddings", embeddings, draw.embedding, rows=draw.slot.numel())
    return [(_slots_of(draw, source), embeddings.detach()) for source in range(draw.cutoff.shape[1])]


def _check_pair(a: Draw, b: Draw) -> None:
    """Raises unless the draws can be merged."""
    check_draw("a", a)
    check_draw("b", b)
    if a.for_batch != b.for_batch:
        raise ValueError(f"b was drawn for {_whom(b)} and a for {_whom(a)}; expected both alike")
    if a.log_normalizer.shape != b.log_normalizer.shape:
        queries = a.log_normalizer.shape[0]
        raise ValueError(f"b is a draw for {b.log_normalizer.shape[0]} queries; expected {queries}, as a is")
    if a.embedding.shape != b.embedding.shape:
        raise ValueError(
            f"b has embeddings of shape {tuple(b.embedding.shape)}; expected those of a, {tuple(a.embedding.shape)}"
        )
    if a.exclude_ids.shape != b.exclude_ids.shape:
        raise ValueError(
            f"b has excluded ids of shape {tuple(b.exclude_ids.shape)}; "
            f"expected those of a, {tuple(a.exclude_ids.shape)}: the same exclusions for every cache"
        )
    if a.exclude_labels.shape != b.exclude_labels.shape:
        which = "without" if a.exclude_labels.shape[1] else "with"
        raise ValueError(f"b was drawn {which} labels; expected them as for a: the same exclusions for every cache")


def _checked(a: Draw, b: Draw) -> Tensor:
    """The perturbed values of `a`, if the draws have different noise and the same exclusions."""
    # Documents excluded for all queries are not among the draws, so the draws need not list them.
    of_each = a.exclude_ids.shape[0] == a.log_normalizer.shape[0]
    excluded = (a.exclude_ids, b.exclude_ids) if of_each else (a.exclude_ids[:0], b.exclude_ids[:0])
    return _checked_op(a.perturbed, a.noise, b.noise, *excluded, a.exclude_labels, b.exclude_labels)


def _fake_checked(values: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(values)


@operator("check_merged", fake=_fake_checked)
def _checked_op(
    values: Tensor,
    noise: Tensor,
    other_noise: Tensor,
    excluded: Tensor,
    other_excluded: Tensor,
    labels: Tensor,
    other_labels: Tensor,
) -> Tensor:
    """An operator, because it reads numbers."""
    keys, others = cast("list[list[int]]", noise.tolist()), cast("list[list[int]]", other_noise.tolist())
    for seed, step in keys:
        if [seed, step] in others:
            raise ValueError(
                f"b has the noise of seed {seed} at step {step}, as a has, and would draw the same places; expected "
                f"caches of different seeds: init_cache(..., seed=...)"
            )
    for name, of_a, of_b in (("ids", excluded, other_excluded), ("labels", labels, other_labels)):
        if not torch.equal(of_a, of_b):
            raise ValueError(f"b has other excluded {name} than a; expected the same exclusions for every cache")
    return values.clone()


def _merged(a: Draw, b: Draw) -> Draw:
    """Merges two whole draws."""
    samples = a.slot.shape[1]
    perturbed = torch.cat([a.perturbed, b.perturbed], dim=1)
    if not a.for_batch:
        # The first half of the places are a's: the winner of sample m is at m or samples + m.
        winner = torch.arange(samples, device=perturbed.device) + samples * (b.perturbed > a.perturbed)
        threshold = a.threshold
    else:
        ordered, places = perturbed.sort(dim=1, descending=True, stable=True)
        winner = places[:, :samples]
        threshold = torch.cat([ordered[:, samples : samples + 1], a.threshold, b.threshold], 1).amax(1, keepdim=True)

    def winners(of_a: Tensor, of_b: Tensor) -> Tensor:
        both = torch.cat([of_a, of_b], dim=1)
        return both.gather(1, winner.view(*winner.shape, *[1] * (both.ndim - 2)).expand(-1, -1, *both.shape[2:]))

    return Draw(
        slot=winners(a.slot, b.slot),
        score=winners(a.score, b.score),
        perturbed=winners(a.perturbed, b.perturbed),
        threshold=threshold,
        log_normalizer=logsumexp(torch.stack([a.log_normalizer, b.log_normalizer], dim=-1)),
        embedding=winners(a.embedding, b.embedding),
        id=winners(a.id, b.id),
        log_weight=winners(a.log_weight, b.log_weight),
        source=winners(a.source, b.source + a.cutoff.shape[1]),
        label=winners(a.label, b.label),
        cutoff=torch.cat([a.cutoff, b.cutoff], dim=1),
        max_score=torch.cat([a.max_score, b.max_score], dim=1),
        exclude_ids=a.exclude_ids,
        exclude_labels=a.exclude_labels,
        noise=torch.cat([a.noise, b.noise]),
    )


def _merged_by_ranks(a: Draw, b: Draw, ranks: Ranks) -> Draw:
    """Merges this rank's parts into this rank's part."""
    samples = a.slot.shape[1]
    parts = [[getattr(draw, name)[0] for name in _OF_DOCUMENTS] for draw in (a, b)]
    whole = [
        draw._replace(**dict(zip(_OF_DOCUMENTS, (rows[None] for rows in ranks.gather_all(*part)), strict=True)))
        for draw, part in zip((a, b), parts, strict=True)
    ]
    merged = _merged(*whole)
    own = slice(ranks.rank * samples, (ranks.rank + 1) * samples)
    return merged._replace(**{name: getattr(merged, name)[:, own] for name in _OF_DOCUMENTS})


def _whom(draw: Draw) -> str:
    return "the batch" if draw.for_batch else "each query"


def _slots_of(draw: Draw, source: int) -> Tensor:
    """[B * k] slots in that cache, -1 for documents of others."""
    return torch.where(draw.source == source, draw.slot, -1).flatten()


def _replaced(found: Features, rows: Features, here: Tensor, source: int) -> Features:
    """`found`, with the rows of this cache where they are `here` [B * k]."""
    before, now = dict(leaves(found)), dict(leaves(rows))
    described = [{name: (leaf.shape[1:], leaf.dtype) for name, leaf in of.items()} for of in (before, now)]
    if described[0] != described[1]:
        raise ValueError(f"states[{source}] has features {described[1]}; expected those of states[0]: {described[0]}")

    def replace(old: Tensor, new: Tensor) -> Tensor:
        return rows_where(here, new, old)

    return map_features(replace, found, rows)
