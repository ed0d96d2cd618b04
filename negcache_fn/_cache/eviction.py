"""Eviction: which slots the documents of a batch take once no empty slot is left."""

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.select import ordered
from negcache_fn._cache.state import live, stored
from negcache_fn._options import Eviction, StepOptions

__all__ = ["check_priorities", "eviction_key"]

_KEYS: dict[Eviction, str] = {"lru": "embedded_at", "fifo": "inserted_at"}  # the column whose lowest values leave first


def check_priorities(priorities: Any, cached: Tensor) -> None:
    """Raises unless `priorities` fit embeddings [C, D]."""
    if not isinstance(priorities, Tensor):
        raise TypeError(f"priorities is a {type(priorities).__name__}; expected a tensor, one priority per slot")
    if priorities.shape != cached.shape[:1]:
        raise ValueError(
            f"priorities has shape {tuple(priorities.shape)}; expected [{cached.shape[0]}], one priority per slot"
        )
    if not priorities.dtype.is_floating_point and priorities.dtype != torch.int64:
        raise TypeError(f"priorities has dtype {priorities.dtype}; expected a floating dtype or torch.int64")
    if priorities.device != cached.device:
        raise ValueError(f"priorities is on {priorities.device}; expected {cached.device}, the device of the cache")


def eviction_key(state: TensorDictBase, options: StepOptions, priorities: Tensor | None) -> Tensor:
    """[C] int64: the slots of the lowest keys are taken first, empty ones before all others.

    Priorities have keys of 32 bits in their order, since `lowest_slots` multiplies keys by the capacity.
    """
    if priorities is None:
        return stored(state, _KEYS[options.evict])
    low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    if priorities.dtype == torch.int64:
        key = priorities.clamp(low, high)
    else:
        priority = priorities.to(torch.float32)
        key = ordered(priority.masked_fill(priority.isnan(), -float("inf")))
    return torch.where(live(state), key, low - 1)
