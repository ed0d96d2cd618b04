"""Calls of the kernels that scan ids and keys of slots."""

import torch
from torch import Tensor

from negcache_fn._kernels.cpu.build import library
from negcache_fn._kernels.cpu.functions import run

__all__ = ["assign_slots", "bias_without", "find_slots", "last_of_each", "lowest_slots", "supports"]


def supports(key: Tensor) -> bool:
    """Whether they take tensors like this one."""
    return key.device.type == "cpu" and library() is not None


def lowest_slots(key: Tensor, skip: Tensor, n: int) -> Tensor:
    """[n] slots of the smallest `key` [C], ascending, ties by slot, without those to skip [C]; -1 if too few."""
    slots = key.new_empty(n)
    key, skip = key.contiguous(), skip.contiguous()
    run("negcache_lowest", key.data_ptr(), skip.data_ptr(), key.shape[0], n, slots.data_ptr())
    return slots


def find_slots(ids: Tensor, cached: Tensor, embedded_at: Tensor) -> Tensor:
    """[P] the live slot of each id [P] among those cached [C], -1 where it is not there."""
    slots = torch.empty_like(ids)
    ids, cached, embedded_at = ids.contiguous(), cached.contiguous(), embedded_at.contiguous()
    known = (cached.data_ptr(), embedded_at.data_ptr(), cached.shape[0])
    run("negcache_find_slots", ids.data_ptr(), ids.shape[0], *known, slots.data_ptr())
    return slots


def bias_without(ids: Tensor, cached: Tensor, embedded_at: Tensor, log_weight: Tensor) -> Tensor:
    """[C]: the `log_weight` of the live slots that have none of the `ids` [P], -inf elsewhere."""
    bias = torch.empty_like(log_weight)
    ids, *columns = (values.contiguous() for values in (ids, cached, embedded_at, log_weight))
    known = (*(column.data_ptr() for column in columns), cached.shape[0])
    run("negcache_bias_without", ids.data_ptr(), ids.shape[0], *known, bias.data_ptr())
    return bias


def assign_slots(ids: Tensor, wanted: Tensor, cached: Tensor, embedded_at: Tensor, key: Tensor) -> Tensor:
    """[M] the slot that each row takes, -1 if it takes none."""
    slots = torch.empty_like(ids)
    ids, wanted, *columns = (values.contiguous() for values in (ids, wanted, cached, embedded_at, key))
    known = (*(column.data_ptr() for column in columns), cached.shape[0])
    run("negcache_assign_slots", ids.data_ptr(), wanted.data_ptr(), ids.shape[0], *known, slots.data_ptr())
    return slots


def last_of_each(ids: Tensor) -> Tensor:
    """[M] bool: whether no later row has the same id."""
    last = torch.empty_like(ids, dtype=torch.bool)
    ids = ids.contiguous()
    run("negcache_last_of_each", ids.data_ptr(), ids.shape[0], last.data_ptr())
    return last
