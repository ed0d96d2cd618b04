"""The cache as a value: a locked TensorDict of plain tensors, and the views derived from it.

Schema (C slots, D dimensions); the invariants hold in every state that this package returns:

| key                 | shape    | dtype    | meaning and invariant                                                 |
| ------------------- | -------- | -------- | --------------------------------------------------------------------- |
| `items.embedding`   | [C, D]   | floating | stale embedding; finite. Or int8: the integers of the row             |
| `.embedding_scale`  | [C]      | float32  | with int8 alone: the factor of the integers; finite, not negative     |
| `items.features`    | [C, ...] | as given | inputs of the document encoder: a nested TensorDict, or one tensor    |
| `items.id`          | [C]      | int64    | document id; -1: anonymous; the others of live slots are unique        |
| `items.embedded_at` | [C]      | int64    | step of the embedding; -1: empty slot                                 |
| `items.log_weight`  | [C]      | float32  | added to the document's score; below +inf, never NaN                  |
| `items.inserted_at` | [C]      | int64    | step at which it was inserted; -1 exactly where `embedded_at` is      |
| `step`              | []       | int64    | number of updates so far                                              |
| `seed`              | []       | int64    | key of the noise                                                      |

A slot is *live* when `embedded_at >= 0`. The structure is locked; only functions with a trailing underscore write to
the storage of a state.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from negcache_fn._checks import check_size, device_named
from negcache_fn._codec import check_storage, columns_of
from negcache_fn._features import Features, as_stored, check_example, leaves, map_features, nested_as

__all__ = [
    "COLUMNS",
    "Column",
    "as_features",
    "assemble_state",
    "check_state",
    "check_writable",
    "embedding_columns",
    "feature_leaves",
    "init_cache",
    "live",
    "lock",
    "occupancy",
    "of_normal_tensors",
    "rows_of_cache",
    "scalar",
    "stored",
    "stored_features",
    "with_items",
]


class Column(NamedTuple):
    """A number stored for every slot."""

    dtype: torch.dtype
    empty: float  # the value in an empty slot
    arriving: Literal["ids", "log_weights", "now"]  # the value of an inserted document; "now": the step


# The only list of them: `init_cache`, `update`, `reset`, `resize`, `validate` and the checks read it.
COLUMNS = {
    "id": Column(torch.int64, -1, "ids"),
    "embedded_at": Column(torch.int64, -1, "now"),
    "log_weight": Column(torch.float32, 0.0, "log_weights"),
    "inserted_at": Column(torch.int64, -1, "now"),
}
_SCALE = "embedding_scale"
_ORIGIN = "as made by negcache_fn.init_cache(...); is it of another version?"


def init_cache(
    capacity: int,
    embedding_dim: int,
    features: Features,
    *,
    embedding_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> TensorDictBase:
    """An empty cache of `capacity` slots.

    Args:
        capacity: number of slots, C.
        embedding_dim: D.
        features: an example batch of the document encoder's inputs: a tensor, or a (nested) mapping of tensors, each
            [rows, ...]. Only the shapes past the first dimension and the dtypes are used. Make variable-width
            features (token ids) as wide as they can get: narrower ones are padded with zeros on the right.
        embedding_dtype: storage of the embeddings: float32, bfloat16, float16, float64 or int8 (integers with a scale
            for each row, a quarter of float32's memory). Scores are accumulated in float32 or wider in any case.
        seed: key of the noise. Caches whose draws are merged need different seeds.
        device: device of the state; the device of the features by default.

    Returns:
        The state, a locked TensorDict (see the schema of a state).

    Raises:
        ValueError: non-positive sizes; a seed of more than 64 bits; a feature without a row dimension; features on
            several devices.
        TypeError: sizes and seeds that are not integers; a feature that is not a tensor; an embedding dtype that cannot
            be stored.

    Examples:
        >>> documents = {"input_ids": torch.zeros(1, 32, dtype=torch.int64)}
        >>> state = init_cache(1024, 16, documents)
        >>> state["items", "embedding"].shape, state["items", "features", "input_ids"].shape
        (torch.Size([1024, 16]), torch.Size([1024, 32]))
    """
    check_size("capacity", capacity)
    check_size("embedding_dim", embedding_dim)
    check_storage("embedding_dtype", embedding_dtype)
    check_size("seed", seed, least=-(2**63), most=2**63 - 1)
    example_device = check_example(features)
    device = example_device if device is None else device_named("device", device)

    def empty(leaf: Tensor) -> Tensor:
        return torch.zeros((capacity, *leaf.shape[1:]), dtype=leaf.dtype, device=device)

    with of_normal_tensors():
        embedding = torch.zeros(capacity, embedding_dim, dtype=embedding_dtype, device=device)
        step = torch.zeros((), dtype=torch.int64, device=device)
        return assemble_state(embedding, map_features(empty, as_stored(features)), step, torch.full_like(step, seed))


def assemble_state(
    embedding: Tensor, features: Tensor | TensorDictBase, step: Tensor, seed: Tensor, **columns: Tensor
) -> TensorDictBase:
    """A locked state of these tensors; missing columns are those of empty slots."""
    capacity, device = embedding.shape[0], embedding.device
    items: dict[str, Any] = {"embedding": embedding, "features": features}
    if _SCALE in columns_of(embedding.dtype):
        items[_SCALE] = torch.zeros(capacity, device=device, dtype=torch.float32)
    for name, column in COLUMNS.items():
        given = columns.get(name)
        empty = column.empty
        items[name] = torch.full((capacity,), empty, dtype=column.dtype, device=device) if given is None else given
    return lock(TensorDict({"items": TensorDict(items, [capacity]), "step": step, "seed": seed}, []))


def check_state(state: Any) -> None:
    """Raises unless `state` has the structure that `init_cache` gives."""
    if not isinstance(state, TensorDictBase):
        raise TypeError(f"state is a {type(state).__name__}; expected a TensorDict made by negcache_fn.init_cache(...)")
    keys = _keys(state)
    if keys != {"items", "step", "seed"}:
        raise ValueError(f"state has keys {sorted(keys)}; expected ['items', 'seed', 'step'], {_ORIGIN}")
    items = cast(TensorDictBase, state["items"])
    item_keys = _keys(items)
    of_embeddings = columns_of(cast(Tensor, items["embedding"]).dtype) if "embedding" in item_keys else ("embedding",)
    expected = {*of_embeddings, "features", *COLUMNS}
    if item_keys != expected:
        raise ValueError(f"state['items'] has keys {sorted(item_keys)}; expected {sorted(expected)}, {_ORIGIN}")
    embedding = cast(Tensor, items["embedding"])
    if embedding.ndim != 2 or not (embedding.dtype.is_floating_point or _SCALE in of_embeddings):
        raise ValueError(
            f"state['items', 'embedding'] has shape {tuple(embedding.shape)} and dtype {embedding.dtype}; "
            f"expected [C, D] floating or int8, {_ORIGIN}"
        )
    if _SCALE in of_embeddings:
        _check_number(f"state['items', {_SCALE!r}]", cast(Tensor, items[_SCALE]), embedding.shape[:1], torch.float32)
    for name, column in COLUMNS.items():
        _check_number(f"state['items', {name!r}]", cast(Tensor, items[name]), embedding.shape[:1], column.dtype)
    for name in ("step", "seed"):
        _check_number(f"state[{name!r}]", cast(Tensor, state[name]), torch.Size(()), torch.int64)


def check_writable(state: TensorDictBase) -> None:
    """Raises if a state cannot be written here, because it was made under `torch.inference_mode()`."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    if any(cast(Tensor, leaf).is_inference() for leaf in state.values(include_nested=True, leaves_only=True)):
        raise ValueError(
            "state has inference tensors, which torch.inference_mode() makes and which cannot be written outside of "
            "it; expected normal ones, as in state.clone()"
        )


def of_normal_tensors() -> AbstractContextManager[Any]:
    """A context in which to make a state: under `torch.inference_mode()` too, its tensors can be written later."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


def feature_leaves(state: TensorDictBase) -> list[Tensor]:
    """The tensors of the features, [C, ...] each."""
    return [leaf for _, leaf in leaves(stored_features(state))]


def rows_of_cache(state: TensorDictBase) -> dict[str, Tensor]:
    """The tensors of which ranks send each other rows, by names for messages."""
    return {"state['items', 'embedding']": stored(state, "embedding"), **dict(leaves(stored_features(state)))}


def as_features(state: TensorDictBase, rows: list[Tensor]) -> Tensor | TensorDictBase:
    """Rows of each of `feature_leaves`, nested as they are."""
    return nested_as(stored_features(state), rows)


def occupancy(state: TensorDictBase) -> Tensor:
    """Share of live slots: `(embedded_at >= 0).mean()`, [] float32.

    Examples:
        >>> occupancy(init_cache(8, 4, torch.zeros(1, 3)))
        tensor(0.)
    """
    check_state(state)
    return live(state).sum().to(torch.float32) / stored(state, "embedded_at").shape[0]


def stored(state: TensorDictBase, name: str) -> Tensor:
    """The tensor `name` of the items, [C, ...]."""
    return cast(TensorDictBase, state["items"])[name]  # a third of the time of `state["items", name]`


def scalar(state: TensorDictBase, name: str) -> Tensor:
    """The 0-d tensor "step" or "seed"."""
    return cast(Tensor, state[name])


def embedding_columns(state: TensorDictBase) -> dict[str, Tensor]:
    """The columns that hold the embeddings, as `_codec.encode` writes them and `_codec.decode` reads them."""
    return {name: stored(state, name) for name in columns_of(stored(state, "embedding").dtype)}


def stored_features(state: TensorDictBase) -> Tensor | TensorDictBase:
    """The features of the items, nested as they were given."""
    return cast("Tensor | TensorDictBase", state["items", "features"])


def live(state: TensorDictBase) -> Tensor:
    """[C] bool, True where a slot holds a document."""
    return stored(state, "embedded_at") >= 0


def with_items(state: TensorDictBase, items: TensorDict) -> TensorDictBase:
    """A state of other items with the `step` and `seed` of `state`, locked like it."""
    scalars = {name: scalar(state, name).clone() for name in ("step", "seed")}
    new = TensorDict({"items": items, **scalars}, batch_size=[])
    return lock(new) if state.is_locked else new


def lock(state: TensorDict) -> TensorDict:
    """Locks the structure of a state.

    Inside a compiled graph `lock_` warns, because the parent references that it registers do not exist there; and a
    state must leave a compiled step with the flag that it entered with, or the next call recompiles. So only the flag
    is set there.
    """
    if not torch.compiler.is_compiling():
        return state.lock_()
    for child in state.values():
        if isinstance(child, TensorDict):
            lock(child)
    state._is_locked = True  # pyright: ignore[reportPrivateUsage] - TensorDict has no public way inside a graph
    return state


def _keys(state: TensorDictBase) -> set[str]:
    return set(cast("Iterable[str]", state.keys()))


def _check_number(name: str, value: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if value.shape == shape and value.dtype != dtype and value.dtype.is_floating_point:
        raise TypeError(
            f"{name} has dtype {value.dtype}; expected {dtype}: cast the embeddings alone, as "
            f"negcache_fn.nn.Cache(state).to(dtype) does, or give init_cache an embedding_dtype"
        )
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; expected {tuple(shape)} and {dtype}, "
            f"{_ORIGIN}"
        )
