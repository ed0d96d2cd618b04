"""Document features: one tensor, or tensors nested in mappings, all with the documents as their first dimension.

They are whatever the user's encoder takes. This module is the only one that looks inside: it maps over the leaves,
compares a batch with what a cache stores, pads narrow batches, and moves leaves between devices.

A cache may keep its features elsewhere than its embeddings (storage.py). A batch may then come from either device; what
is encoded is on that of the embeddings.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias, TypeVar, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from negcache_fn.checks import check_state

__all__ = [
    "Features",
    "Padding",
    "all_moved",
    "as_stored",
    "check_example",
    "fit",
    "leaves",
    "map_features",
    "moved",
    "nested_as",
    "pad_features",
    "rows_where",
]

Features: TypeAlias = "Tensor | Mapping[str, Features] | TensorDictBase"
Padding: TypeAlias = "float | Mapping[str, Padding]"
FeaturesT = TypeVar("FeaturesT", bound="Features")


def map_features(function: Callable[..., Tensor], features: FeaturesT, *others: Features) -> FeaturesT:
    """`function` of every leaf of `features` and of the leaves at the same place in `others`, nested as `features`.

    The function must keep the trailing dimensions of a leaf, not the leading ones.
    """
    if isinstance(features, Tensor):
        return cast("FeaturesT", function(features, *others))
    mapped: dict[str, Features] = {}
    for key, value in _items(features):
        mapped[key] = map_features(function, value, *(_child(other, key) for other in others))
    if isinstance(features, TensorDictBase):
        _, before = next(leaves(features))
        _, after = next(leaves(mapped))
        batch_dims = features.batch_dims + after.ndim - before.ndim
        return cast("FeaturesT", TensorDict(cast("dict[str, Tensor]", mapped), batch_size=after.shape[:batch_dims]))
    return cast("FeaturesT", mapped)


def leaves(features: Features, name: str = "features") -> Iterator[tuple[str, Tensor]]:
    """The leaves, each with a name for messages such as `features['tokens']['input_ids']`."""
    if isinstance(features, Tensor):
        yield name, features
    elif isinstance(features, (Mapping, TensorDictBase)):
        for key, value in _items(features):
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
    devices = {leaf.device for leaf in found.values()}
    if len(devices) > 1:
        raise ValueError(f"features are on several devices: {sorted(map(str, devices))}; expected one")
    return devices.pop()


def as_stored(features: Features) -> Tensor | TensorDictBase:
    """`features` with its mappings as TensorDicts, as a state stores them."""
    if isinstance(features, Tensor):
        return features
    children = {key: as_stored(value) for key, value in _items(features)}
    _, leaf = next(leaves(features))
    return TensorDict(children, batch_size=leaf.shape[:1])


def pad_features(state: TensorDictBase, features: FeaturesT, *, values: Padding) -> FeaturesT:
    """A batch as wide as the slots of the cache, padded on the right with given values.

    To be called on a batch before `step` or `update`, which pad with zeros: for features whose padding is not 0, such
    as the token ids of a tokenizer with another `pad_token_id`. What a cache holds of a document does then not depend
    on the width of the batch with which it came.

    Args:
        state: the cache.
        features: a batch, nested as in the cache, each leaf [rows, ...]; no wider than the slots.
        values: nested like the features: the number to pad with, for each leaf that is not to be padded with 0.

    Returns:
        The features, each leaf [rows, *slot].

    Raises:
        ValueError: features unlike those of the cache, or wider; a key in `values` that the features do not have.
        TypeError: features of other kinds or dtypes; something in `values` that is no number.

    Examples:
        >>> documents = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "mask": torch.zeros(1, 4)}
        >>> state = init_cache(8, 2, documents)
        >>> batch = {"input_ids": torch.tensor([[5, 6]]), "mask": torch.ones(1, 2)}
        >>> pad_features(state, batch, values={"input_ids": 1})
        {'input_ids': tensor([[5, 6, 1, 1]]), 'mask': tensor([[1., 1., 0., 0.]])}
    """
    check_state(state)
    stored = cast("Tensor | TensorDictBase", state["items", "features"])
    name, leaf = next(leaves(features), ("features", None))
    if leaf is None or leaf.ndim == 0:
        raise ValueError(f"{name} holds no rows; expected a batch of documents, as in the cache")
    _check_like(stored, features, leaf.shape[0], "features", cast(Tensor, state["items", "embedding"]).device)
    padding = iter(_padding(features, values, "values"))

    def pad_leaf(given: Tensor, slot: Tensor) -> Tensor:
        return _pad(given, slot, next(padding))

    return map_features(pad_leaf, features, stored)


def fit(stored: Features, given: FeaturesT, rows: int, name: str, device: torch.device) -> FeaturesT:
    """`given`, padded with zeros on the right to the widths that the cache stores, on `device`.

    Args:
        stored: the cache's features.
        given: a batch, on `device` or where the cache keeps its features.
        rows: number of documents that the batch must have.
        name: of the argument, for messages.
        device: of the cache's embeddings.

    Raises:
        ValueError: other keys, another number of rows or dimensions, a leaf wider than its slot, another device.
        TypeError: another kind of container or another dtype.
    """
    _check_like(stored, given, rows, name, device)

    def fit_leaf(leaf: Tensor, slot: Tensor) -> Tensor:
        return _pad(moved(leaf, device), slot, 0)

    return map_features(fit_leaf, given, stored)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`: themselves, if they are there already."""
    # The CPU must wait for what it reads next; work on an accelerator is in order anyway.
    return values.to(device, non_blocking=device.type != "cpu")


def rows_where(condition: Tensor, given: Tensor, other: Tensor) -> Tensor:
    """Rows of `given` [rows, ...] where the condition [rows] holds, of `other` elsewhere."""
    return torch.where(condition.view(-1, *[1] * (given.ndim - 1)), given, other)


def all_moved(features: FeaturesT, device: torch.device) -> FeaturesT:
    """`features` with every leaf on `device`: themselves, container and all, if they are there already."""

    def move(leaf: Tensor) -> Tensor:
        return moved(leaf, device)

    return features if all(leaf.device == device for _, leaf in leaves(features)) else map_features(move, features)


def _check_like(stored: Features, given: Features, rows: int, name: str, device: torch.device) -> None:
    if isinstance(stored, Tensor):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} is a {type(given).__name__}; expected a tensor, as in the cache")
        _check_leaf(stored, given, rows, name, device)
        return
    if not isinstance(given, (Mapping, TensorDictBase)):
        raise TypeError(f"{name} is a {type(given).__name__}; expected a mapping, as in the cache")
    expected, found = dict(_items(stored)), dict(_items(given))
    if expected.keys() != found.keys():
        raise ValueError(f"{name} has keys {sorted(found)}; expected those of the cache: {sorted(expected)}")
    for key, value in found.items():
        _check_like(expected[key], value, rows, f"{name}[{key!r}]", device)


def _check_leaf(stored: Tensor, given: Tensor, rows: int, name: str, device: torch.device) -> None:
    slot, row = tuple(stored.shape[1:]), tuple(given.shape[1:])
    if given.ndim != stored.ndim or given.shape[0] != rows:
        raise ValueError(f"{name} has shape {tuple(given.shape)}; expected {(rows, *slot)}, narrower at most")
    if any(width > room for width, room in zip(row, slot, strict=True)):
        raise ValueError(
            f"{name} has rows of shape {row}, which do not fit into the cache's slots of shape {slot}; truncate them "
            f"(a tokenizer: truncation=True, max_length={slot[0]}), or give init_cache an example that is as wide"
        )
    if given.dtype != stored.dtype:
        raise TypeError(f"{name} has dtype {given.dtype}; expected {stored.dtype}, as in the cache")
    if given.device not in (device, stored.device):
        either = "the device of the cache" if device == stored.device else f"or {stored.device}, as its features"
        raise ValueError(f"{name} is on {given.device}; expected {device}, {either}")


def _pad(given: Tensor, stored: Tensor, value: float) -> Tensor:
    missing = [room - width for width, room in zip(given.shape[1:], stored.shape[1:], strict=True)]
    if not any(missing):
        return given
    # `pad` counts dimensions from the last one.
    sides = [side for width in reversed(missing) for side in (0, width)]
    return torch.nn.functional.pad(given, sides, value=value)


def _padding(features: Features, values: Padding, name: str) -> list[float]:
    """What to pad each leaf with, in the order of `leaves`."""
    if isinstance(features, Tensor):
        if not isinstance(values, (int, float)):
            raise TypeError(f"{name} is a {type(values).__name__}; expected a number to pad the tensor with")
        return [values]
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} is a {type(values).__name__}; expected a mapping from keys of the features to numbers")
    children = dict(_items(features))
    if not values.keys() <= children.keys():
        raise ValueError(f"{name} has keys {sorted(values)}; expected some of the features': {sorted(children)}")
    padding: list[float] = []
    for key, child in children.items():
        nothing: Padding = 0 if isinstance(child, Tensor) else {}
        padding.extend(_padding(child, values.get(key, nothing), f"{name}[{key!r}]"))
    return padding


def _items(features: "Mapping[str, Features] | TensorDictBase") -> "list[tuple[str, Features]]":
    return list(cast("Mapping[str, Features]", features).items())


def _child(features: Features, key: str) -> Features:
    return cast("Mapping[str, Features]", features)[key]
