"""Document ids: their slots in the cache, and the rows of a batch that share one. -1 is anonymous and equals nothing.

Every other number is an id, negative ones too: half of all 64-bit hashes are negative.
"""

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.select import marked, segments
from negcache_fn._cache.state import stored
from negcache_fn._kernels import dispatch
from negcache_fn._operators import operator

__all__ = ["among", "bias_without", "find_among", "find_slots", "first_of_each", "last_of_each", "named"]

_ANONYMOUS = -1
_FEW = 16  # ids of a query, up to which they are compared one by one
_FEW_ON = {"cuda": 1024}  # ids of a batch, up to which all are compared with all


def named(ids: Tensor) -> Tensor:
    """Whether each is an id, and not anonymous."""
    return ids != _ANONYMOUS


def among(ids: Tensor, known: Tensor) -> Tensor:
    """[n], [B, P] -> [B, n] bool: whether the id is one of those known of the query. Anonymous ones are not."""
    if known.shape[1] <= _FEW:
        return (ids[None, :, None] == known[:, None, :]).any(-1) & named(ids)
    ordered, wanted = known.sort(dim=1).values, ids.expand(known.shape[0], -1).contiguous()
    place = torch.searchsorted(ordered, wanted).clamp(max=known.shape[1] - 1)
    return (ordered.gather(1, place) == wanted) & named(ids)


def find_slots(state: TensorDictBase, ids: Tensor) -> Tensor:
    """The live slot of each id in this part of the cache, -1 where it is not there; the shape of `ids`."""
    found = find_among(ids.flatten(), stored(state, "id"), stored(state, "embedded_at"))
    return found.view(ids.shape)


def bias_without(state: TensorDictBase, ids: Tensor) -> Tensor:
    """[C] float32: the log-weight of the live slots that have none of the `ids` [P], -inf elsewhere."""
    columns = stored(state, "id"), stored(state, "embedded_at"), stored(state, "log_weight")
    # On other devices a compiler makes one kernel of it.
    return _bias_without_op(ids, *columns) if ids.device.type == "cpu" else _bias_without(ids, *columns)


def last_of_each(ids: Tensor) -> Tensor:
    """[M] bool: whether no later row has the same id."""
    if ids.device.type in _FEW_ON and ids.shape[0] <= _FEW_ON[ids.device.type]:
        return ~((ids == ids[:, None]).triu_(1).any(1) & named(ids))
    return _last_of_each_op(ids)


def first_of_each(ids: Tensor) -> Tensor:
    """[M] bool: whether no earlier row has the same id."""
    return last_of_each(ids.flip(0)).flip(0)


def _bias_without(ids: Tensor, cached: Tensor, embedded_at: Tensor, log_weight: Tensor) -> Tensor:
    excluded = marked(find_among(ids, cached, embedded_at), cached.shape[0])
    return log_weight.masked_fill(excluded | (embedded_at < 0), -float("inf"))


def _fake_bias(ids: Tensor, cached: Tensor, embedded_at: Tensor, log_weight: Tensor) -> Tensor:
    return torch.empty_like(log_weight)


@operator("bias_without", fake=_fake_bias)
def _bias_without_op(ids: Tensor, cached: Tensor, embedded_at: Tensor, log_weight: Tensor) -> Tensor:
    bias = dispatch.bias_without(ids, cached, embedded_at, log_weight)
    return _bias_without(ids, cached, embedded_at, log_weight) if bias is None else bias


def _fake_last(ids: Tensor) -> Tensor:
    return torch.empty_like(ids, dtype=torch.bool)


@operator("last_of_each", fake=_fake_last)
def _last_of_each_op(ids: Tensor) -> Tensor:
    if (last := dispatch.last_of_each(ids)) is not None:
        return last
    ordered, order = ids.sort(stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = (ordered[1:] != ordered[:-1]) | ~named(ordered[:-1])
    return torch.empty_like(last).scatter_(0, order, last)


def _fake_slots(ids: Tensor, cached: Tensor, embedded_at: Tensor) -> Tensor:
    return torch.empty_like(ids)


@operator("find_slots", fake=_fake_slots)
def find_among(ids: Tensor, cached: Tensor, embedded_at: Tensor) -> Tensor:
    """[P] the live slot of each id [P] among those `cached` [C], -1 where it is not there."""
    if (slots := dispatch.find_slots(ids, cached, embedded_at)) is not None:
        return slots
    # The few ids are sorted, not the cache.
    ordered = ids.sort().values
    count = ordered.shape[0]
    stretches = segments(cached.shape[0])
    found = ordered.new_full((count + stretches[0][1],), -1)
    for start, stop in stretches:
        known = cached[start:stop].masked_fill(embedded_at[start:stop] < 0, _ANONYMOUS)
        place = torch.searchsorted(ordered, known).clamp(max=count - 1)
        slots = torch.arange(start, stop, device=ids.device)
        # The others have a place each: atomic writes of many to one would wait for each other.
        place = torch.where((ordered[place] == known) & named(known), place, slots + (count - start))
        found.scatter_reduce_(0, place, slots, "amax")
    return found[torch.searchsorted(ordered, ids)].masked_fill(~named(ids), -1)
