"""Eviction: which slots the documents of a batch take, once those that are empty are taken."""

from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn.state import live, stored

__all__ = ["Evict", "check_evict", "eviction_key"]

Evict: TypeAlias = str | Tensor

_EVICTIONS = {"lru": "embedded_at", "fifo": "inserted_at"}


def check_evict(evict: Any, cached: Tensor) -> str:
    """Raises unless `evict` fits embeddings [C, D]; returns its kind, on which all ranks must agree."""
    if not isinstance(evict, Tensor):
        if not isinstance(evict, str) or evict not in _EVICTIONS:
            known = ", ".join(map(repr, _EVICTIONS))
            raise ValueError(f"evict is {evict!r}; expected {known} or a tensor of priorities")
        return evict
    if evict.shape != cached.shape[:1]:
        raise ValueError(f"evict has shape {tuple(evict.shape)}; expected [{cached.shape[0]}], one priority per slot")
    if not evict.dtype.is_floating_point and evict.dtype != torch.int64:
        raise TypeError(f"evict has dtype {evict.dtype}; expected a floating dtype or torch.int64")
    if evict.device != cached.device:
        raise ValueError(f"evict is on {evict.device}; expected {cached.device}, the device of the cache")
    return f"priorities of {evict.dtype}"


def eviction_key(state: TensorDictBase, evict: Evict) -> Tensor:
    """[C] int64: the slots of the lowest keys are taken first, empty ones before all others.

    Priorities have keys of 32 bits in their order, since `lowest` multiplies keys by the capacity.
    """
    if isinstance(evict, str):
        return stored(state, _EVICTIONS[evict])
    low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    if evict.dtype == torch.int64:
        key = evict.clamp(low, high)
    else:
        priority = evict.to(torch.float32)
        bits = priority.masked_fill(priority.isnan(), -float("inf")).view(torch.int32)
        # Sign and magnitude, whose order is that of its bits; -0 is 0.
        key = torch.where(bits < 0, -(bits & high), bits).to(torch.int64)
    return torch.where(live(state), key, low - 1)
