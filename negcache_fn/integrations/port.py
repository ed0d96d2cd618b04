"""From the PyTorch port of the paper's code (marceljahnke/negative-cache): its caches as states of this package.

The port is not imported. Its `NegativeCache` is a pair of `data`, a tensor [C, ...] for each key of its specs, and
`age` [C] int32: the number of updates since a slot was written. They are converted as follows, with `step` the smallest
number of updates that fits the ages:

| the port                           | the state                                                                      |
| ---------------------------------- | ------------------------------------------------------------------------------ |
| `data[embedding_key]`              | `items.embedding`                                                              |
| the other keys of `data`           | `items.features`                                                               |
| `age`                              | `items.embedded_at` and `items.inserted_at`: `step - 1 - age`                  |
| a slot that never held a document  | an empty slot; it has no mark there, and is recognised by its zeros (`empty`)  |
| copies of a document, with an id   | the one of least age stays, ties by slot; the others are empty slots           |

The port keeps one age. With `use_lru=True` it is that of the embedding, with `use_lru=False` that of the document;
continue with `evict="lru"` or "fifo" respectively to keep the order in which documents leave.

As a script: `python -m negcache_fn.integrations.port cache.pt state.pt`, see `--help`.
"""

import argparse
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from negcache_fn._cache.ids import first_of_each
from negcache_fn._cache.state import assemble_state, live, scalar
from negcache_fn._cache.validate import validate
from negcache_fn._checks import check_choice, check_rows
from negcache_fn._features import rows_where

__all__ = ["EMPTY", "convert_cache", "convert_caches", "main"]

EMPTY = ("zeros", "zero_embeddings")


def convert_cache(
    cache: Any,
    *,
    embedding_key: str = "embedding",
    data_keys: Sequence[str] | None = None,
    id_key: str | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    empty: str | Tensor = "zeros",
    seed: int = 0,
) -> TensorDictBase:
    """A cache of the port as a state.

    Args:
        cache: the port's `NegativeCache` (`handler.cache`), or a dict {"data": ..., "age": ...}. Everything is copied,
            as the port writes into its tensors.
        embedding_key: the key of the embeddings, [C, D] floating; stored in their dtype.
        data_keys: the keys of the features, the inputs of the encoder; None: all except the embeddings'.
        id_key: a key of integers [C] or [C, 1] that are the documents' ids (-1: anonymous); it need not be one of
            `data_keys`. None: all documents are anonymous.
        dtypes: new dtypes for features, if the batches of `step` have another dtype than the port's cache.
        empty: the slots that hold no document. "zeros": those whose embedding is all zero, and those whose features are
            all zero, since the port draws, encodes and writes back empty slots. "zero_embeddings": the first kind only,
            if zeros can be the features of a document, such as an index. Or a tensor [C] bool.
        seed: key of the noise from now on.

    Returns:
        The state, locked and valid. Embeddings and features stay on their devices, everything else is on that of the
        embeddings.

    Raises:
        ValueError: missing keys; tensors that are not [C, ...]; a negative age, as in the cache that was given to the
            port's `update_cache`, which writes into it; embeddings of documents that are not finite.
        TypeError: an object that is not a cache of the port; embeddings that are not floating; ids or ages that are not
            integers.

    Examples:
        >>> embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> data = {"tokens": torch.tensor([[3, 4], [5, 0], [0, 0]]), "embedding": embedding}
        >>> state = convert_cache({"data": data, "age": torch.tensor([1, 0, 2], dtype=torch.int32)})
        >>> state["items", "embedded_at"], state["step"]
        (tensor([ 0,  1, -1]), tensor(2))
    """
    data, age = _fields(cache)
    embedding = _embeddings(data, embedding_key)
    capacity, device = embedding.shape[0], embedding.device
    age = _ages(age, capacity).to(device)
    rest = _rest(data, embedding_key, capacity)
    features = _features(rest, data_keys, dtypes or {})
    with torch.no_grad():  # a cache is a constant
        alive = ~_empty_slots(empty, embedding, rest)
        ids = torch.full_like(age, -1) if id_key is None else torch.where(alive, _ids(rest, id_key, device), -1)
        alive = alive & _youngest_of_each(ids, age)
        # Slots that were never written have been aging since the first update, the others for one update less at most.
        step = torch.where(alive, age + 1, age).max()
        written_at = torch.where(alive, step - 1 - age, -1)

        def kept(leaf: Tensor) -> Tensor:
            return rows_where(alive.to(leaf.device), leaf.detach(), torch.zeros_like(leaf))

        state = assemble_state(
            kept(embedding),
            TensorDict({key: kept(leaf) for key, leaf in features.items()}, [capacity]),
            step,
            torch.full_like(step, seed),
            id=torch.where(alive, ids, -1),
            embedded_at=written_at,
            inserted_at=written_at.clone(),
        )
    validate(state)
    return state


def convert_caches(caches: Mapping[str, Any], *, seed: int = 0, **options: Any) -> dict[str, TensorDictBase]:
    """The caches of the port's `_MultiCacheLossHandler`, each as a state, by their names.

    Args:
        caches: `handler.cache`: caches by name.
        seed: seed of the first cache in the order of names; each further one adds 1, since merged caches need different
            seeds.
        **options: those of `convert_cache` except `seed`. Ids are unique within a cache; a document in two stays in
            both.

    Returns:
        The states in the order of names, in which the port concatenates its caches.

    Raises:
        ValueError, TypeError: as `convert_cache`, with the name of the cache.

    Examples:
        >>> data = {"tokens": torch.ones(3, 2), "embedding": torch.ones(3, 4)}
        >>> cache = {"data": data, "age": torch.zeros(3, dtype=torch.int32)}
        >>> states = convert_caches({"title": cache, "body": cache}, seed=7)
        >>> [(name, int(state["seed"])) for name, state in states.items()]
        [('body', 7), ('title', 8)]
    """
    states: dict[str, TensorDictBase] = {}
    name = ""
    try:
        for place, name in enumerate(sorted(caches)):
            states[name] = convert_cache(caches[name], seed=seed + place, **options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"in the cache {name!r}: {error}") from error
    return states


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts a file; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        given = torch.load(options.cache, map_location="cpu", weights_only=True)
        if not isinstance(given, Mapping):
            raise TypeError(f"{options.cache} holds a {type(given).__name__}; expected a dict")
        given = cast("Mapping[str, Any]", given)
        names = ("embedding_key", "data_keys", "id_key", "empty", "seed")
        wanted: dict[str, Any] = {name: getattr(options, name) for name in names}
        wanted["dtypes"] = dict(options.dtype)
        several = set(given) != {"data", "age"}
        states = convert_caches(given, **wanted) if several else {"cache": convert_cache(given, **wanted)}
        torch.save(states if several else states["cache"], options.state)
    except pickle.UnpicklingError:
        wanted_file = "plain dicts of tensors, as from torch.save(handler.cache._asdict(), ...)"
        print(f"error: {options.cache} holds other objects than tensors; expected {wanted_file}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, state in states.items():
        alive = live(state)
        print(f"{name}: {int(alive.sum())} documents in {alive.shape[0]} slots, step {int(scalar(state, 'step'))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m negcache_fn.integrations.port",
        description="A cache of the PyTorch port as a state of negcache_fn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("cache", type=Path, help='dict {"data": ..., "age": ...}, or a dict of those by name')
    parser.add_argument("state", type=Path, help="where the state goes, or the dict of states by name")
    parser.add_argument("--embedding-key", default="embedding", metavar="KEY", help="of the embeddings")
    parser.add_argument("--data-keys", nargs="+", metavar="KEY", help="of the features; None: all others")
    parser.add_argument("--id-key", metavar="KEY", help="of the documents' ids")
    parser.add_argument("--dtype", type=_dtype, action="append", default=[], metavar="KEY=DTYPE", help="of a feature")
    parser.add_argument("--empty", choices=EMPTY, default=EMPTY[0], help="which slots hold no document")
    parser.add_argument("--seed", type=int, default=0, help="key of the noise")
    return parser


def _dtype(text: str) -> tuple[str, torch.dtype]:
    key, _, name = text.rpartition("=")
    dtype = getattr(torch, name, None)
    if not key or not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=DTYPE, such as input_ids=int64")
    return key, dtype


def _fields(cache: Any) -> tuple[Mapping[str, Any], Tensor]:
    kind = type(cache).__name__
    if not isinstance(cache, Mapping):
        cache = {name: getattr(cache, name, None) for name in ("data", "age")}
    data, age = (cast("Mapping[str, Any]", cache).get(name) for name in ("data", "age"))
    if not isinstance(data, Mapping) or not isinstance(age, Tensor):
        raise TypeError(f"cache is a {kind}; expected the port's NegativeCache: data, a dict of tensors, and age")
    return cast("Mapping[str, Any]", data), age


def _embeddings(data: Mapping[str, Any], key: str) -> Tensor:
    embedding = _tensor(data, key, "embedding_key")
    if embedding.ndim != 2 or embedding.numel() == 0:
        raise ValueError(f"data[{key!r}] has shape {tuple(embedding.shape)}; expected [C, D]")
    if not embedding.dtype.is_floating_point:
        raise TypeError(f"data[{key!r}] has dtype {embedding.dtype}; expected a floating dtype")
    return embedding


def _ages(age: Tensor, capacity: int) -> Tensor:
    if not _is_integer(age):
        raise TypeError(f"age has dtype {age.dtype}; expected integers")
    if age.shape != (capacity,):
        raise ValueError(f"age has shape {tuple(age.shape)}; expected [{capacity}], one for each slot")
    if int(age.min()) < 0:
        raise ValueError(
            f"age is {int(age.min())} somewhere; expected 0 or more: the port's update_cache writes into its argument, "
            f"so that only its result is a cache"
        )
    return age.to(torch.int64)


def _rest(data: Mapping[str, Any], embedding_key: str, capacity: int) -> dict[str, Tensor]:
    """All keys except the embeddings'."""
    rest = {key: _tensor(data, key, "data") for key in data if key != embedding_key}
    for key, leaf in rest.items():
        if leaf.ndim == 0 or leaf.shape[0] != capacity:
            raise ValueError(f"data[{key!r}] has shape {tuple(leaf.shape)}; expected [{capacity}, ...]")
    return rest


def _features(
    rest: dict[str, Tensor], data_keys: Sequence[str] | None, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    keys = list(rest) if data_keys is None else list(data_keys)
    if not keys:
        raise ValueError("data_keys is empty; expected the keys of the encoder's inputs")
    features = {key: _tensor(rest, key, "data_keys") for key in keys}
    if not dtypes.keys() <= features.keys():
        raise ValueError(f"dtypes has keys {sorted(dtypes)}; expected some of {keys}")
    return {key: leaf.to(dtypes.get(key, leaf.dtype)) for key, leaf in features.items()}


def _empty_slots(empty: str | Tensor, embedding: Tensor, rest: dict[str, Tensor]) -> Tensor:
    """[C] bool, on the device of the embeddings."""
    if isinstance(empty, Tensor):
        check_rows("empty", empty, torch.bool, embedding.shape[0], embedding.device)
        return empty
    check_choice("empty", empty, EMPTY)
    slots = _is_zero(embedding)
    if empty == "zeros":
        slots = slots | torch.stack([_is_zero(leaf).to(slots.device) for leaf in rest.values()]).all(0)
    return slots


def _is_zero(leaf: Tensor) -> Tensor:
    return (leaf == 0).unsqueeze(-1).flatten(1).all(1)


def _ids(rest: dict[str, Tensor], key: str, device: torch.device) -> Tensor:
    ids = _tensor(rest, key, "id_key")
    if not _is_integer(ids):
        raise TypeError(f"data[{key!r}] has dtype {ids.dtype}; expected integers, one for each document")
    if ids.numel() != ids.shape[0]:
        raise ValueError(f"data[{key!r}] has shape {tuple(ids.shape)}; expected [C] or [C, 1], an id each")
    return ids.flatten().to(device, torch.int64)


def _youngest_of_each(ids: Tensor, age: Tensor) -> Tensor:
    """[C] bool: whether no other slot has the same id and a lower age, or the same age and comes first."""
    order = age.sort(stable=True).indices
    return torch.zeros_like(ids, dtype=torch.bool).scatter(0, order, first_of_each(ids[order]))


def _tensor(data: Mapping[str, Any], key: str, name: str) -> Tensor:
    if key not in data:
        raise ValueError(f"{name} names {key!r}; expected one of {sorted(data)}")
    if not isinstance(data[key], Tensor):
        raise TypeError(f"data[{key!r}] is a {type(data[key]).__name__}; expected a tensor")
    return data[key]


def _is_integer(values: Tensor) -> bool:
    return not (values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool)


if __name__ == "__main__":
    sys.exit(main())
