"""Storage of the features of a cache on another device than its embeddings, or in files.

A step reads all embeddings but only the drawn rows of the features, and writes the new rows. So the features may be
stored where memory is plentiful. Nothing else changes: the leaves are still plain tensors, and draws, losses and states
are the same. Rows that are read go to the device of the embeddings, where the encoder gets them; written rows go to the
device of the features. The CPU waits for the device in each step, for the drawn slots and for the slots to write.

Features in CPU memory are not pinned: the rows of a step are gathered into new memory first, and sent from there.
"""

import os
import re
import shutil
from math import prod
from pathlib import Path
from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from negcache_fn._cache.fill import resize
from negcache_fn._cache.state import check_state, live, of_normal_tensors, stored, stored_features, with_items
from negcache_fn._cache.update import copy_state
from negcache_fn._checks import check_size, device_named
from negcache_fn._features import leaves, map_features, nested_as
from negcache_fn._ranks.operators import row_bytes

__all__ = ["memory_mapped", "offload_features"]

_COPY_BYTES = 2**26  # at a time


def offload_features(state: TensorDictBase, *, device: torch.device | str = "cpu") -> TensorDictBase:
    """The same cache with its features on another device than its embeddings.

    All functions accept such a state. Batches may come on the device of the embeddings or of the features; ids, masks,
    everything else and the inputs of the encoder stay on the device of the embeddings. For a cache whose features never
    fit on the device, make a small one, offload it and `resize` it: every tensor grows where it is.

    Args:
        state: the cache.
        device: the device for the features.

    Returns:
        The new state, which shares no storage with the given one.

    Examples:
        >>> state = init_cache(8, 4, {"input_ids": torch.zeros(1, 32, dtype=torch.int32)})
        >>> state = resize(offload_features(state), 1024)
        >>> state["items", "features", "input_ids"].shape
        torch.Size([1024, 32])
    """
    check_state(state)
    place = device_named("device", device)

    def put(leaf: Tensor) -> Tensor:
        return leaf.to(place, copy=True)

    with of_normal_tensors():
        return _with_features(copy_state(_without_features(state)), map_features(put, stored_features(state)))


def memory_mapped(state: TensorDictBase, folder: str | Path, *, capacity: int | None = None) -> TensorDictBase:
    """The same cache with its features in files; the system keeps recently used parts in memory.

    Use it with `step_`, `update_` and functions that only read; `step`, `update`, `prefill` and `resize` copy a state
    and so its features into memory. The files are sparse: they take disk space as slots are filled. They are not a
    checkpoint, because they run ahead of the last saved one: save the whole state with `torch.save`, load it with
    `torch.load(..., mmap=True)`, which reads no features yet, and map that.

    Args:
        state: the cache, C slots.
        folder: folder for the files, one per leaf, on a local disk; created if missing. Files with the same names are
            replaced; a state mapped to those keeps them until it is deleted. Each rank needs its own folder.
        capacity: slots of the new state, C or more; C by default. A cache whose features never fit into memory starts
            as a small one.

    Returns:
        The new state, which shares no storage with the given one; its features are on the CPU.

    Raises:
        ValueError, TypeError: a `capacity` that is not an integer or below C; a folder without enough free space.

    Examples:
        >>> import tempfile
        >>> state = init_cache(8, 4, {"input_ids": torch.zeros(1, 32, dtype=torch.int32)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state = memory_mapped(state, folder, capacity=1024)
        >>> state["items", "features", "input_ids"].shape
        torch.Size([1024, 32])
    """
    check_state(state)
    rows, features = stored(state, "id").shape[0], stored_features(state)
    capacity = rows if capacity is None else capacity
    check_size("capacity", capacity, least=rows)
    if not isinstance(folder, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not check types
        raise TypeError(f"folder is a {type(folder).__name__}; expected a path")
    files = [(_path(Path(folder), number, name), leaf) for number, (name, leaf) in enumerate(leaves(features))]
    Path(folder).mkdir(parents=True, exist_ok=True)
    needed = capacity * sum(row_bytes(leaf) for _, leaf in files)
    replaced = sum(512 * path.stat().st_blocks for path, _ in files if path.exists())
    free = shutil.disk_usage(folder).free + replaced
    if needed > free:  # writing to a mapped file on a full disk ends the process
        raise ValueError(f"folder is on a disk with {free} free bytes; expected {needed}, the size of the features")

    with of_normal_tensors():
        taken = live(state).nonzero().flatten()
        mapped: list[Tensor] = []
        for path, leaf in files:
            mapped.append(_map_file(path, (capacity, *leaf.shape[1:]), leaf.dtype))
            _copy_rows_(mapped[-1], leaf, taken)
        rest = _without_features(state)
        # Growing leaves every document in its slot.
        rest = copy_state(rest) if capacity == rows else resize(rest, capacity)
        return _with_features(rest, nested_as(features, mapped))


def _without_features(state: TensorDictBase) -> TensorDictBase:
    """The state with empty features, everything else shared."""
    return _with_features(state, stored(state, "id").new_empty(stored(state, "id").shape[0], 0))


def _with_features(state: TensorDictBase, features: Tensor | TensorDictBase) -> TensorDictBase:
    items = dict(cast(TensorDictBase, state["items"]).items())
    return with_items(state, TensorDict({**items, "features": features}, batch_size=[stored(state, "id").shape[0]]))


def _path(folder: Path, number: int, name: str) -> Path:
    """The name of a leaf's file: the number distinguishes names that differ by punctuation only."""
    return folder / f"{number}-{re.sub(r'[^0-9A-Za-z]+', '-', name).strip('-')}.bin"


def _map_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a new file, renamed once it is complete, so that tensors mapped to an older file keep their values."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    mapped = torch.from_file(str(partial), shared=True, size=prod(shape), dtype=dtype)
    os.replace(partial, path)
    return mapped.view(shape)


def _copy_rows_(target: Tensor, source: Tensor, rows: Tensor) -> None:
    for some in torch.split(rows, max(1, _COPY_BYTES // max(1, row_bytes(source)))):
        target.index_copy_(0, some.cpu(), source[some.to(source.device)].cpu())
