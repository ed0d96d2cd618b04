"""Document ids: where the cache has them, and which rows of a batch share one. -1 is anonymous and equals nothing."""

from collections.abc import Iterator

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn.state import live, segments, stored

__all__ = ["cached_under", "find_slots", "first_of_each", "last_of_each"]


def find_slots(state: TensorDictBase, ids: Tensor) -> Tensor:
    """The live slot of each id in this part of the cache, -1 where it is not there; the shape of `ids`."""
    ordered = ids.flatten().sort().values
    found = torch.full_like(ordered, -1)
    for place, hit, slots in _look_up(state, ordered):
        found = found.scatter_reduce(0, place, slots.masked_fill(~hit, -1), "amax")
    return found[torch.searchsorted(ordered, ids.contiguous())].masked_fill(ids < 0, -1)


def cached_under(state: TensorDictBase, ids: Tensor) -> Tensor:
    """[C] bool: which live slots have one of the `ids` [P]."""
    return torch.cat([hit for _, hit, _ in _look_up(state, ids.sort().values)])


def last_of_each(ids: Tensor) -> Tensor:
    """[M] bool: whether no later row has the same id."""
    rows = torch.arange(ids.shape[0], device=ids.device)
    keys = torch.where(ids < 0, -1 - rows, ids)
    ordered, order = keys.sort(stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return torch.empty_like(last).scatter_(0, order, last)


def first_of_each(ids: Tensor) -> Tensor:
    """[M] bool: whether no earlier row has the same id."""
    return last_of_each(ids.flip(0)).flip(0)


def _look_up(state: TensorDictBase, ordered: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A segment of slots at a time: the places of their ids among the `ordered` ones [P], if they are there; slots.

    The few ids are sorted, not the cache.
    """
    known = stored(state, "id").masked_fill(~live(state), -1)
    for start, stop in segments(known.shape[0]):
        place = torch.searchsorted(ordered, known[start:stop]).clamp(max=ordered.shape[0] - 1)
        hit = (ordered[place] == known[start:stop]) & (known[start:stop] >= 0)
        yield place, hit, torch.arange(start, stop, device=known.device)
