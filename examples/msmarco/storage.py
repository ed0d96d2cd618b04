"""Where the passages of the cache are: beside the embeddings, in CPU memory, or in files."""

from __future__ import annotations

from pathlib import Path

import torch
from tensordict import TensorDictBase
from torch import Tensor

import negcache_fn

__all__ = ["new_cache", "restored_cache"]


def new_cache(
    storage: str,
    capacity: int,
    dim: int,
    example: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
    seed: int,
) -> TensorDictBase:
    """An empty cache. It is never larger on the device than what is to stay there."""
    slots = capacity if storage == "device" else 1
    cache = negcache_fn.init_cache(slots, dim, example, embedding_dtype=dtype, seed=seed, device=device)
    if storage == "cpu":
        return negcache_fn.resize(negcache_fn.offload_features(cache), capacity)
    if storage == "files":
        return negcache_fn.memory_mapped(cache, _features(folder), capacity=capacity)
    return cache


def restored_cache(saved: TensorDictBase, storage: str, folder: Path) -> TensorDictBase:
    """The cache of a checkpoint, which was loaded with ``mmap=True`` if the storage is "files"."""
    return negcache_fn.memory_mapped(saved, _features(folder)) if storage == "files" else saved


def _features(folder: Path) -> Path:
    return folder / "cached_passages"
