"""Which slot each document of a batch takes: that of its id, or else an empty or evicted one."""

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.ids import find_among, last_of_each
from negcache_fn._cache.select import lowest_slots, marked
from negcache_fn._cache.state import stored
from negcache_fn._kernels import dispatch
from negcache_fn._operators import operator
from negcache_fn._ranks.group import Shards, unsharded

__all__ = ["assign_slots"]


def assign_slots(state: TensorDictBase, ids: Tensor, wanted: Tensor, key: Tensor, shards: Shards) -> Tensor:
    """[M] the slot of this part of the cache that each row takes, -1 if it takes none here.

    Args:
        state: the cache, or this rank's part of it.
        ids: [M], of all ranks.
        wanted: [M] bool, False for rows that take no slot; of the others with one id, the last takes one.
        key: [C] int64: the slots of the lowest keys are taken first.
        shards: the parts of the cache.
    """
    known = stored(state, "id"), stored(state, "embedded_at")
    if shards.ranks.name is None and ids.device.type == "cpu":
        return _assign_slots_op(ids, wanted, *known, key)
    return _assign_slots(ids, wanted, *known, key, shards)


def _assign_slots(
    ids: Tensor, wanted: Tensor, cached: Tensor, embedded_at: Tensor, key: Tensor, shards: Shards
) -> Tensor:
    capacity = cached.shape[0]
    ids = torch.where(wanted, ids, -1)
    wanted = wanted & last_of_each(ids)
    replaced_here = find_among(torch.where(wanted, ids, -1), cached, embedded_at)
    # Other documents must not take slots that are replaced by id.
    evicted = lowest_slots(key, ids.shape[0], skip=marked(replaced_here, capacity), shards=shards)
    replaced = shards.ranks.all_max(shards.numbered(replaced_here))
    takes = wanted & (replaced < 0)
    place = takes.cumsum(0) - 1
    return shards.local(torch.where(takes, evicted[place.clamp(min=0)], replaced), capacity)


def _fake_slots(ids: Tensor, wanted: Tensor, cached: Tensor, embedded_at: Tensor, key: Tensor) -> Tensor:
    return torch.empty_like(ids)


@operator("assign_slots", fake=_fake_slots)
def _assign_slots_op(ids: Tensor, wanted: Tensor, cached: Tensor, embedded_at: Tensor, key: Tensor) -> Tensor:
    slots = dispatch.assign_slots(ids, wanted, cached, embedded_at, key)
    return _assign_slots(ids, wanted, cached, embedded_at, key, unsharded(len(cached))) if slots is None else slots
