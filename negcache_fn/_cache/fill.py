"""Filling and resizing: changes of a cache outside a training step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from negcache_fn._cache.select import lowest_slots
from negcache_fn._cache.state import (
    COLUMNS,
    check_state,
    embedding_columns,
    live,
    of_normal_tensors,
    stored,
    with_items,
)
from negcache_fn._cache.update import copy_state, update_
from negcache_fn._checks import check_encoder, check_size
from negcache_fn._features import Features, all_moved, copied, map_features, moved, rows_where
from negcache_fn._options import StepOptions, check_options
from negcache_fn._ranks.agree import checking_arguments
from negcache_fn._ranks.group import ranks_of, unsharded

__all__ = ["Batch", "prefill", "reset", "resize"]

Batch: TypeAlias = "Tensor | Mapping[str, Features] | TensorDictBase | tuple[Features, Tensor]"


def prefill(
    state: TensorDictBase,
    batches: Iterable[Batch],
    encode: Callable[[Any], Tensor],
    *,
    options: StepOptions = StepOptions(),
    group: torch.distributed.ProcessGroup | None = None,
) -> TensorDictBase:
    """The cache after the documents of many batches, embedded without gradient.

    Equivalent to `update(state, features, encode(features), ids=ids)` for every batch, with one copy in all. Put the
    encoder into evaluation mode to keep dropout out of the cached embeddings; wrap `batches` in tqdm for progress.

    Args:
        state: the cache.
        batches: features of some documents each, or pairs of features and ids [N] int64.
        encode: the document encoder.
        options: options of the following steps; `evict` and `placement` are used.
        group: as in `update`.

    Returns:
        The new state; its `step` is one further for every batch.

    Raises:
        ValueError, TypeError: as `update`, at the first invalid batch.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> state = prefill(state, torch.ones(6, 3).split(2), torch.nn.Linear(3, 4))
        >>> occupancy(state)
        tensor(0.7500)
    """
    state, ranks = copy_state(state), ranks_of(group)
    check_options(options)
    check_encoder(encode)
    if not isinstance(batches, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not check types
        raise TypeError(f"batches is a {type(batches).__name__}; expected batches of features, to iterate over")
    with torch.no_grad():  # cached embeddings are constants
        for batch in batches:
            features, ids = batch if isinstance(batch, tuple) else (batch, None)
            with checking_arguments(ranks):  # the others are in `update_`
                features = all_moved(features, stored(state, "embedding").device)
                kept = copied(features)  # the encoder may write into its features
                embeddings = encode(features)
            state = update_(state, kept, embeddings, ids=ids, group=group, **options.of_update())
    return state


def reset(state: TensorDictBase) -> TensorDictBase:
    """An empty cache of the same shape, with the `step` and `seed` of the given one, so that its noise continues.

    Examples:
        >>> state = update(init_cache(8, 4, torch.zeros(1, 3)), torch.ones(2, 3), torch.ones(2, 4))
        >>> occupancy(reset(state))
        tensor(0.)
    """
    check_state(state)
    nothing = torch.full_like(stored(state, "id")[:1], -1).expand(stored(state, "id").shape[0])
    return _picked(state, nothing)


def resize(state: TensorDictBase, capacity: int) -> TensorDictBase:
    """A cache of another capacity with the same documents; those with the freshest embeddings, if not all fit.

    Documents that stay keep their order; ties go to the lower slot. Growing leaves every document in its slot.

    Args:
        state: the cache, C slots. Join a sharded one by `distributed.unshard` first.
        capacity: number of slots of the new one.

    Returns:
        The new state.

    Raises:
        ValueError, TypeError: a `capacity` that is not a positive integer.

    Examples:
        >>> state = update(init_cache(8, 4, torch.zeros(1, 3)), torch.ones(2, 3), torch.ones(2, 4))
        >>> occupancy(resize(state, 4)), occupancy(resize(state, 16))
        (tensor(0.5000), tensor(0.1250))
    """
    check_state(state)
    check_size("capacity", capacity)
    rows = stored(state, "id").shape[0]
    if capacity >= rows:
        slots = torch.arange(capacity, device=stored(state, "id").device)
        return _picked(state, torch.where(slots < rows, slots, -1))
    freshest = lowest_slots(-stored(state, "embedded_at"), capacity, skip=~live(state), shards=unsharded(rows))
    kept = torch.where(freshest >= 0, freshest, rows).sort().values
    return _picked(state, torch.where(kept < rows, kept, -1))


def _picked(state: TensorDictBase, slots: Tensor) -> TensorDictBase:
    """A state of the items at `slots`, empty ones where that is negative."""
    with of_normal_tensors():
        rows, exists = slots.clamp(min=0), slots >= 0

        def pick(leaf: Tensor, empty: float = 0) -> Tensor:
            at = leaf[moved(rows, leaf.device)]
            return rows_where(moved(exists, leaf.device), at, torch.full_like(leaf[:1], empty))

        items = cast(TensorDict, state["items"])
        picked: dict[str, Any] = {name: pick(stored(state, name), column.empty) for name, column in COLUMNS.items()}
        picked |= {name: pick(column) for name, column in embedding_columns(state).items()}
        picked["features"] = map_features(pick, cast(Features, items["features"]))
        return with_items(state, TensorDict(picked, batch_size=[slots.shape[0]]))
