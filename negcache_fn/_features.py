"""Document features: one tensor, or tensors nested in mappings, all with the documents as their first dimension.

They are the input of the user's encoder. This module is the only one that looks inside: it maps over the leaves,
compares a batch with the stored features, pads narrow batches, and moves leaves between devices.

A batch may bring floats of another dtype than the cache stores, as mixed precision makes them: they are cast when they
are stored, and the encoder gets all its features in the dtype of the batch. Integers are never cast.

A cache may keep its features on another device than its embeddings (`_cache/offload.py`). A batch may then come from
either device; the encoder gets its features on the device of the embeddings.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias, TypeVar, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

__all__ = [
    "Features",
    "all_moved",
    "as_stored",
    "check_example",
    "check_like",
    "copied",
    "feature_items",
    "fit_to_slots",
    "in_slots",
    "leaves",
    "map_features",
    "moved",
    "nested_as",
    "pad_rows",
    "rows_where",
]

# The dtypes that torch can index, pad, select and write by rows.
_STORED = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
)
Features: TypeAlias = "Tensor | Mapping[str, Features] | TensorDictBase"
"""Features of documents: a tensor, or tensors nested in mappings, each with the documents as its first dimension."""

FeaturesT = TypeVar("FeaturesT", bound="Features")


def map_features(function: Callable[..., Tensor], features: FeaturesT, *others: Features) -> FeaturesT:
    """`function` of every leaf of `features` and of the leaves at the same place in `others`, nested as `features`.

    The function must keep the trailing dimensions of a leaf, not the leading ones. It is called in the order of
    `leaves`.
    """
    if isinstance(features, Tensor):
        return cast("FeaturesT", function(features, *others))
    found: dict[str, Features] = {}
    for key, value in feature_items(features):
        found[key] = map_features(function, value, *(_child(other, key) for other in others))
    keys = cast("Iterable[str]", features.keys())
    mapped = {key: found[key] for key in keys}
    if isinstance(features, TensorDictBase):
        _, before = next(leaves(features))
        _, after = next(leaves(mapped))
        batch_dims = features.batch_dims + after.ndim - before.ndim
        return cast("FeaturesT", TensorDict(cast("dict[str, Tensor]", mapped), batch_size=after.shape[:batch_dims]))
    return cast("FeaturesT", mapped)


def leaves(features: Features, name: str = "features") -> Iterator[tuple[str, Tensor]]:
    """The leaves, each with a name for messages such as `features['tokens']['input_ids']`.

    They come in the order of their keys, not in that of the mapping: each rank sends its own mapping.
    """
    if isinstance(features, Tensor):
        yield name, features
    elif isinstance(features, (Mapping, TensorDictBase)):
        for key, value in feature_items(features):
            yield from leaves(value, f"{name}[{key!r}]")
    else:
        raise TypeError(f"{name} is a {type(features).__name__}; expected a tensor or a mapping of tensors")


def nested_as(features: FeaturesT, rows: Iterable[Tensor]) -> FeaturesT:
    """Tensors in the order of `leaves`, nested as `features`."""
    unread = iter(rows)

    def following(_: Tensor) -> Tensor:
        return next(unread)

    return map_features(following, features)


def check_example(features: Features) -> torch.device:
    """Raises unless every leaf is a tensor with a first dimension for documents; returns the device they share."""
    found = dict(leaves(features))
    if not found:
        raise ValueError("features holds no tensor; expected at least one, with the documents as its first dimension")
    for name, leaf in found.items():
        if leaf.ndim == 0:
            raise ValueError(f"{name} has shape (); expected [rows, ...], with the documents as its first dimension")
        if leaf.layout != torch.strided:
            raise TypeError(f"{name} has layout {leaf.layout}; expected a dense tensor: {name}.to_dense()")
        if leaf.dtype not in _STORED:
            raise TypeError(
                f"{name} has dtype {leaf.dtype}; expected a number of 8 to 64 bits that torch can compute with"
            )
    devices = {leaf.device for leaf in found.values()}
    if len(devices) > 1:
        raise ValueError(f"features are on several devices: {sorted(map(str, devices))}; expected one")
    return devices.pop()


def as_stored(features: Features) -> Tensor | TensorDictBase:
    """`features` with its mappings as TensorDicts, as a state stores them."""
    if isinstance(features, Tensor):
        return features
    keys = cast("Iterable[str]", features.keys())
    children = {key: as_stored(_child(features, key)) for key in keys}
    _, leaf = next(leaves(features))
    return TensorDict(children, batch_size=leaf.shape[:1])


def fit_to_slots(stored: Features, given: FeaturesT, rows: int, name: str, device: torch.device) -> FeaturesT:
    """`given`, padded with zeros on the right to the widths that the cache stores, on `device`; in its own dtype.

    Args:
        stored: the cache's features.
        given: a batch, on `device` or where the cache keeps its features.
        rows: number of documents that the batch must have.
        name: of the argument, for messages.
        device: of the cache's embeddings.

    Raises:
        ValueError: other keys, another number of rows or dimensions, a leaf wider than its slot, another device.
        TypeError: another kind of container; another dtype, unless both are floating.
    """
    check_like(stored, given, rows, name, device)

    def fit_leaf(leaf: Tensor, slot: Tensor) -> Tensor:
        return pad_rows(moved(leaf, device), slot, 0)

    return map_features(fit_leaf, given, stored)


def in_slots(stored: Features, given: FeaturesT) -> tuple[FeaturesT, Tensor | None]:
    """The result of `fit_to_slots` in the dtypes that the cache stores, and whether each row [rows] fits into them.

    A row does not if one of its numbers is finite and would be stored as infinite. None: all fit.
    """
    fits: list[Tensor] = []

    def cast_leaf(leaf: Tensor, slot: Tensor) -> Tensor:
        rows = leaf.to(slot.dtype)
        if leaf.dtype != slot.dtype and torch.finfo(leaf.dtype).max > torch.finfo(slot.dtype).max:
            fits.append((rows.isfinite() | ~leaf.isfinite())[..., None].flatten(1).all(1))
        return rows

    found = map_features(cast_leaf, given, stored)
    return found, torch.stack(fits).all(0) if fits else None


def copied(features: FeaturesT) -> FeaturesT:
    """A copy with containers and tensors of its own, as an encoder may write into its arguments."""
    return map_features(torch.clone, features)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`: themselves, if they are there already."""
    # The CPU must wait before it reads; work on an accelerator is in order anyway.
    return values.to(device, non_blocking=device.type != "cpu")


def rows_where(condition: Tensor, given: Tensor, other: Tensor) -> Tensor:
    """Rows of `given` [rows, ...] where the condition [rows] holds, of `other` elsewhere."""
    return torch.where(condition.view(-1, *[1] * (given.ndim - 1)), given, other)


def all_moved(features: FeaturesT, device: torch.device) -> FeaturesT:
    """`features` with every leaf on `device`: the same object if they are there already."""

    def move(leaf: Tensor) -> Tensor:
        return moved(leaf, device)

    return features if all(leaf.device == device for _, leaf in leaves(features)) else map_features(move, features)


def check_like(stored: Features, given: Features, rows: int, name: str, device: torch.device) -> None:
    """Raises unless a batch has the keys and dimensions of the cache's features, is not wider, and can be cast."""
    if isinstance(stored, Tensor):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} is a {type(given).__name__}; expected a tensor, as in the cache")
        _check_leaf(stored, given, rows, name, device)
        return
    if not isinstance(given, (Mapping, TensorDictBase)):
        raise TypeError(
            f"{name} is a {type(given).__name__}; expected a mapping of the encoder's inputs, as in the cache"
        )
    expected, found = dict(feature_items(stored)), dict(feature_items(given))
    if expected.keys() != found.keys():
        raise ValueError(f"{name} has keys {sorted(found)}; expected those of the cache: {sorted(expected)}")
    for key, value in found.items():
        check_like(expected[key], value, rows, f"{name}[{key!r}]", device)


def _check_leaf(stored: Tensor, given: Tensor, rows: int, name: str, device: torch.device) -> None:
    slot, row = tuple(stored.shape[1:]), tuple(given.shape[1:])
    if given.ndim != stored.ndim or given.shape[0] != rows:
        raise ValueError(f"{name} has shape {tuple(given.shape)}; expected {(rows, *slot)}, narrower at most")
    if any(width > room for width, room in zip(row, slot, strict=True)):
        token_ids = len(slot) == 1 and not stored.dtype.is_floating_point
        how = f"truncate them (a tokenizer: truncation=True, max_length={slot[0]})" if token_ids else "cut them to size"
        raise ValueError(
            f"{name} has rows of shape {row}, which do not fit into the cache's slots of shape {slot}; {how}, or give "
            f"init_cache an example that is as wide"
        )
    both_floating = given.dtype.is_floating_point and stored.dtype.is_floating_point
    if given.dtype != stored.dtype and not both_floating:
        raise TypeError(f"{name} has dtype {given.dtype}; expected {stored.dtype}, as in the cache")
    if given.device not in (device, stored.device):
        either = "the device of the cache" if device == stored.device else f"or {stored.device}, as its features"
        raise ValueError(f"{name} is on {given.device}; expected {device}, {either}")


def pad_rows(given: Tensor, stored: Tensor, value: float) -> Tensor:
    """`given` [rows, ...], padded on the right with `value` to the widths of `stored` [C, ...]."""
    missing = [room - width for width, room in zip(given.shape[1:], stored.shape[1:], strict=True)]
    if not any(missing):
        return given
    # `pad` counts dimensions from the last one.
    sides = [side for width in reversed(missing) for side in (0, width)]
    return torch.nn.functional.pad(given, sides, value=value)


def feature_items(features: "Mapping[str, Features] | TensorDictBase") -> "list[tuple[str, Features]]":
    """The entries of a mapping or TensorDict, in the order of their keys."""
    return sorted(cast("Mapping[str, Features]", features).items(), key=_key)


def _key(item: "tuple[str, Features]") -> str:
    return str(item[0])


def _child(features: Features, key: str) -> Features:
    return cast("Mapping[str, Features]", features)[key]
