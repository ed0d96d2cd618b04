"""Selecting slots by a key, such as the step of their embedding, without a sort of the whole cache."""

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import pad

from negcache_fn._cache.state import check_state, live, stored
from negcache_fn._checks import check_size
from negcache_fn._kernels import dispatch
from negcache_fn._operators import operator
from negcache_fn._ranks.group import Shards, unsharded

__all__ = ["lowest_slots", "marked", "ordered", "segments", "stalest"]

_SEGMENT = 2**19  # slots; a multiple of the 4096 whose groups share a Philox call in sampling


def stalest(state: TensorDictBase, n: int) -> Tensor:
    """Slots of the `n` oldest embeddings, oldest first, ties by slot.

    Args:
        state: the cache.
        n: how many, at most the capacity.

    Returns:
        [n] int64; -1 where fewer than `n` slots are live.

    Raises:
        ValueError: `n` not in 1 ... C.

    Examples:
        >>> stalest(init_cache(8, 4, torch.zeros(1, 3)), 2)
        tensor([-1, -1])
    """
    check_state(state)
    embedded_at = stored(state, "embedded_at")
    check_size("n", n, most=embedded_at.shape[0])
    return lowest_slots(embedded_at, n, skip=~live(state), shards=unsharded(embedded_at.shape[0]))


def segments(capacity: int) -> list[tuple[int, int]]:
    """First and last slot (exclusive) of the stretches in which to do work that needs memory for every slot."""
    return [(start, min(start + _SEGMENT, capacity)) for start in range(0, capacity, _SEGMENT)]


def lowest_slots(key: Tensor, n: int, *, skip: Tensor, shards: Shards) -> Tensor:
    """[n] slots of the smallest `key` [C], ascending, ties by slot, without those to skip [C]; -1 if too few."""
    slots = _lowest_slots_op(key, skip, n)
    if shards.ranks.name is None:
        return slots
    # Distinct integers in the order of (key, slot).
    last = torch.iinfo(torch.int64).max
    ranked = key[slots.clamp(min=0)] * shards.capacity + slots + shards.first
    best = shards.ranks.gather(torch.where(slots >= 0, ranked, last)).topk(n, largest=False, sorted=True).values
    return torch.where(best == last, -1, best % shards.capacity)


def marked(slots: Tensor, capacity: int) -> Tensor:
    """[C] bool: whether a slot is among the `slots` [n], in which -1 is none."""
    places = torch.where(slots >= 0, slots, capacity)
    return torch.zeros(capacity + 1, dtype=torch.bool, device=slots.device).scatter(0, places, True)[:capacity]


def _fake_slots(key: Tensor, skip: Tensor, n: int) -> Tensor:
    return key.new_empty(n)


@operator("lowest_slots", fake=_fake_slots)
def _lowest_slots_op(key: Tensor, skip: Tensor, n: int) -> Tensor:
    if (found := dispatch.lowest_slots(key, skip, n)) is not None:
        return found
    capacity, last = key.shape[0], torch.iinfo(torch.int64).max
    best = key.new_empty(0)
    for start, stop in segments(capacity):
        # Distinct integers in the order of (key, slot): their top-k is deterministic.
        ranked = key[start:stop] * capacity + torch.arange(start, stop, device=key.device)
        best = torch.cat([best, ranked.masked_fill(skip[start:stop], last)])
        best = best.topk(min(n, best.shape[0]), largest=False, sorted=True).values
    return pad(torch.where(best == last, -1, best % capacity), (0, n - best.shape[0]), value=-1)


def ordered(values: Tensor) -> Tensor:
    """Int64 numbers of 32 bits in the order of the float32 values, equal where these are, also for -0 and 0."""
    bits = values.view(torch.int32)
    # Sign and magnitude, whose order is that of its bits.
    return torch.where(bits < 0, -(bits & torch.iinfo(torch.int32).max), bits).to(torch.int64)
