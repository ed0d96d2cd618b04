"""Strict writing and reading in the format of `torch.distributed.checkpoint`.

Torch's own readers unpickle anything, write to the given tensors while they read, and do not compare dtypes. Here

- only the classes of a checkpoint's index are unpickled, and values with `weights_only=True`;
- loaded values are copied into the tensors only after all ranks have read all of them and they fit;
- only values that can be loaded are saved.
"""

import io
import pickle
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load  # pyright: ignore[reportUnknownVariableType] - untyped in torch
from torch.distributed.checkpoint.state_dict_saver import save  # pyright: ignore[reportUnknownVariableType] - untyped in torch
from torch.distributed.checkpoint.stateful import Stateful

from negcache_fn._ranks.outcomes import everywhere, raise_failures

__all__ = ["read_tensors", "write_tensors"]

_INDEX = ".metadata"
_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


def write_tensors(folder: Path, state_dict: dict[str, Any], group: dist.ProcessGroup | None, task: str) -> list[str]:
    """Writes the tensors of all ranks; returns the names of this rank's files. `task` is for error messages."""
    plain = everywhere(group, task, lambda: _plain(state_dict, group))
    rank = 0 if group is None else group.rank()
    with _torch_checkpoint(group, task):
        save(plain, checkpoint_id=folder, planner=_SavePlanner(), process_group=group, no_dist=group is None)
    return sorted(path.name for path in folder.glob(f"__{rank}_*")) + [_INDEX] * (rank == 0)


def read_tensors(
    folder: Path, files: Iterable[str], state_dict: dict[str, Any], group: dist.ProcessGroup | None, task: str
) -> None:
    """Fills `state_dict` from a folder whose files have been verified, or raises and leaves it unchanged."""
    plain = everywhere(group, task, lambda: _plain(state_dict, group))
    index = everywhere(group, task, lambda: _read_index(folder, set(files)))
    planner = _LoadPlanner(folder)
    with _torch_checkpoint(group, task):
        reader = _Reader(folder, index)
        load(plain, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    everywhere(group, task, planner.check)
    planner.commit(plain)
    for name, value in state_dict.items():
        if isinstance(value, Stateful):
            value.load_state_dict(plain[name])
        else:
            state_dict[name] = plain[name]


class _SavePlanner(DefaultSavePlanner):
    """Rejects values that could not be loaded."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002 - torch's name
        if write_item.type != WriteItemType.BYTE_IO:
            return super().transform_object(write_item, object)
        try:
            written = super().transform_object(write_item, object)
            torch.load(io.BytesIO(written.getvalue()), weights_only=True)
        except (pickle.PickleError, AttributeError, TypeError) as error:
            raise TypeError(
                f"state_dict has a {type(object).__name__} as {write_item.index.fqn}; expected tensors and plain "
                f"values, which torch.load(..., weights_only=True) takes"
            ) from error
        return written


class _LoadPlanner(DefaultLoadPlanner):
    """Keeps loaded values apart from the tensors they are for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.tensors: dict[MetadataIndex, Tensor] = {}
        self.values: dict[str, Any] = {}

    def create_local_plan(self) -> LoadPlan:
        index = cast(Metadata, self.metadata)
        given, saved = cast("dict[str, Any]", self.state_dict), index.state_dict_metadata
        names = {str(name) for name in self.original_state_dict}
        paths = cast("dict[str, tuple[Any, ...]]", index.planner_data)
        told = [f"it has no {name}" for name in given if name not in saved]
        told += [f"it has {name} too" for name in saved if name not in given and str(paths[name][0]) in names]
        told += [text for name, value in given.items() if (text := _misfit(name, value, saved.get(name)))]
        if told:
            more = f"; and {len(told) - 5} more" if len(told) > 5 else ""
            raise ValueError(
                f"state_dict does not match {self.folder}: {'; '.join(told[:5])}{more}; expected the same entries, "
                f"shapes and dtypes"
            )
        return create_default_local_load_plan(given, index)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Room for it, in the dtype of the checkpoint."""
        place = read_item.dest_index
        if place not in self.tensors:
            like = self.lookup_tensor(place)
            saved = cast(Metadata, self.metadata).state_dict_metadata[place.fqn]
            dtype = cast(TensorStorageMetadata, saved).properties.dtype
            self.tensors[place] = torch.empty(like.shape, dtype=dtype)
        return self.transform_tensor(read_item, self.tensors[place])

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            self.values[name] = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{name} in {self.folder} is not a plain value; it was not unpickled") from error

    def check(self) -> None:
        """Raises if a number would become infinite in the dtype of its place."""
        for place, read in self.tensors.items():
            dtype = self.lookup_tensor(place).dtype
            if dtype != read.dtype and bool((read.isfinite() & ~read.to(dtype).isfinite()).any()):
                raise ValueError(
                    f"{place.fqn} has numbers in {self.folder} that are infinite as {dtype}; expected a tensor of "
                    f"{read.dtype}, as it was saved"
                )

    def commit(self, state_dict: dict[str, Any]) -> None:
        """Copies it all, values into `state_dict`."""
        with torch.no_grad():
            for place, read in self.tensors.items():
                self.lookup_tensor(place).detach().copy_(read)
        for name, value in self.values.items():
            _set(state_dict, self.mappings[name], value)


class _Reader(FileSystemReader):
    """With an index that has been read already."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.index.storage_meta = self.index.storage_meta or StorageMeta()
        self.index.storage_meta.load_id = self.load_id
        return self.index


class _IndexUnpickler(pickle.Unpickler):
    """The classes of an index, none of which runs code when it is made."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if global_name in _INDEX_CLASSES.get(module_name, ()):
            return super().find_class(module_name, global_name)
        if module_name == "torch" and isinstance(dtype := getattr(torch, global_name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module_name}.{global_name}")


def _read_index(folder: Path, files: set[str]) -> Metadata:
    path = folder / _INDEX
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} names {error}, which does not belong to a checkpoint; it was not unpickled"
        ) from error
    if not isinstance(index, Metadata):
        raise ValueError(f"{path} is a {type(index).__name__}; expected the index of a checkpoint")
    for place in cast("dict[MetadataIndex, Any]", index.storage_data).values():
        if place.relative_path not in files:
            raise ValueError(f"{path} names the file {place.relative_path}; expected one of {sorted(files)}")
    return index


def _plain(state_dict: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """A dict for torch, which replaces its entries."""
    if not isinstance(state_dict, dict):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not check types
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; expected a dict")
    _check_entries("state_dict", state_dict, group is not None)
    return {name: value.state_dict() if isinstance(value, Stateful) else value for name, value in state_dict.items()}


def _check_entries(name: str, value: Any, several: bool) -> None:
    """Raises where torch would do something unintended."""
    if several and isinstance(value, TensorDictBase):  # it would take rank 0's part for the whole
        raise TypeError(
            f"{name} is a TensorDict; expected checkpointable(state, group), or checkpointable(state) of a cache that "
            f"is the same on every rank"
        )
    if isinstance(value, Tensor) and value.is_meta:
        raise ValueError(f"{name} is on the meta device; expected a tensor with values")
    if isinstance(value, dict):
        for key, child in cast("dict[Any, Any]", value).items():
            _check_entries(f"{name}[{key!r}]", child, several)


def _misfit(name: str, value: Any, saved: Any) -> str | None:
    """How a value differs from the saved one."""
    if isinstance(saved, BytesStorageMetadata) and isinstance(value, Tensor):
        return f"{name} is not a tensor there"
    if not isinstance(saved, TensorStorageMetadata):
        return None
    if not isinstance(value, Tensor):
        return f"{name} is a tensor there, and here a {type(value).__name__}"
    if value.shape != saved.size:
        return f"{name} has shape {tuple(saved.size)} there, and {tuple(value.shape)} here"
    dtype = saved.properties.dtype
    if value.dtype != dtype and not (value.dtype.is_floating_point and dtype.is_floating_point):
        return f"{name} has dtype {dtype} there, and {value.dtype} here"
    return None


def _set(root: Any, path: tuple[Any, ...], value: Any) -> None:
    """Torch's paths have every key as a string, even for dicts with other keys."""
    for part in path[:-1]:
        root = root[_key(root, part)]
    root[_key(root, path[-1])] = value


def _key(container: Any, part: Any) -> Any:
    if not isinstance(container, dict):
        return part
    return next((key for key in cast("dict[Any, Any]", container) if str(key) == part), part)


@contextmanager
def _torch_checkpoint(group: dist.ProcessGroup | None, task: str) -> Generator[None]:
    """Turns torch's errors, which every rank raises, into ours; silences the warning about a single process."""
    with warnings.catch_warnings():
        if group is None:
            warnings.filterwarnings(
                "ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning
            )
        try:
            yield
        except CheckpointException as error:
            raise_failures(task, {rank: failure[0] for rank, failure in error.failures.items()}, group is None)
