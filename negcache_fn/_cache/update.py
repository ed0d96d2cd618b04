"""Writing: the next state of the cache.

`update_` writes into the given state and `update` into a copy; they are otherwise the same. Shapes do not depend on the
data, so that both compile.
"""

from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from negcache_fn._cache.arrivals import Arrivals, capacity_of, check_facts
from negcache_fn._cache.assign import assign_slots
from negcache_fn._cache.eviction import eviction_key
from negcache_fn._cache.ids import last_of_each
from negcache_fn._cache.rows import write_rows_
from negcache_fn._cache.state import (
    COLUMNS,
    check_state,
    check_writable,
    embedding_columns,
    feature_leaves,
    lock,
    of_normal_tensors,
    rows_of_cache,
    scalar,
    stored,
    stored_features,
)
from negcache_fn._checks import check_embeddings, check_slots
from negcache_fn._codec import encode, storable
from negcache_fn._features import Features, fit_to_slots, in_slots, leaves
from negcache_fn._options import Eviction, Placement, StepOptions
from negcache_fn._ranks.agree import check_ranks_agree, checking_arguments
from negcache_fn._ranks.group import Shards, ranks_of

__all__ = ["copy_state", "update", "update_", "write_"]


def update(
    state: TensorDictBase,
    features: Features,
    embeddings: Tensor,
    *,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    cacheable: Tensor | None = None,
    refresh: tuple[Tensor, Tensor] | None = None,
    evict: Eviction = "lru",
    priorities: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    placement: Placement = "sharded",
) -> TensorDictBase:
    """The cache after one step: writes the fresh embeddings of `refresh`, then inserts the documents of a batch.

    A document whose id is cached replaces that entry. The others take, in order, empty slots first and then the slots
    that `evict` chooses, ties by slot. Of several rows with one id the last counts. Rows with a non-finite embedding
    (as stored), a log-weight that is NaN or +inf, or a feature that would become infinite in the cache's dtype never
    enter: they are left out like rows with `cacheable=False`.

    Args:
        state: the cache, C slots.
        features: of N <= C documents, nested as in the cache; narrower leaves are padded with zeros on the right, and
            floats cast to the cache's dtype.
        embeddings: [N, D] floating; stored without gradient, in the cache's dtype.
        ids: [N] int64, -1 where anonymous; all anonymous by default.
        log_weights: [N] floating, added to the documents' scores from now on; 0 by default.
        cacheable: [N] bool, False for rows to leave out.
        refresh: slots [R] int64 and their fresh embeddings [R, D]; negative and empty slots are ignored, and of several
            rows for one slot the last counts. The age of a refreshed document starts again at 0.
        evict: "lru" (oldest embedding) or "fifo" (oldest insertion).
        priorities: instead of `evict`, the priority of every slot here, [C] floating or int64: the lowest leave first.
            NaN counts as -inf; floats are rounded to float32, integers beyond 32 bits to the nearest 32-bit integer. If
            the cache is replicated, the same on every rank.
        group: ranks that share a cache: the documents of all ranks are inserted, in the order of ranks, and slots are
            numbered over the whole cache.
        placement: "sharded": each rank has a part of the cache; "replicated": each has the whole.

    Returns:
        The new state, its `step` one further. The given one is unchanged.

    Raises:
        ValueError, TypeError: features unlike those of the cache; N > C; invalid shapes, dtypes or devices; an unknown
            `evict`; priorities of another shape, dtype or device. Nothing has been written then.

    Examples:
        >>> state = init_cache(8, 4, {"input_ids": torch.zeros(1, 5, dtype=torch.int64)})
        >>> state = update(state, {"input_ids": torch.ones(2, 3, dtype=torch.int64)}, torch.randn(2, 4))
        >>> occupancy(state), state["items", "features", "input_ids"][0]
        (tensor(0.2500), tensor([1, 1, 1, 0, 0]))
    """
    return update_(
        copy_state(state),
        features,
        embeddings,
        ids=ids,
        log_weights=log_weights,
        cacheable=cacheable,
        refresh=refresh,
        evict=evict,
        priorities=priorities,
        group=group,
        placement=placement,
    )


def update_(
    state: TensorDictBase,
    features: Features,
    embeddings: Tensor,
    *,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    cacheable: Tensor | None = None,
    refresh: tuple[Tensor, Tensor] | None = None,
    evict: Eviction = "lru",
    priorities: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    placement: Placement = "sharded",
) -> TensorDictBase:
    """`update` in place: writes the rows that change into `state` and returns it. Arguments and errors are the same.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> update_(state, torch.ones(2, 3), torch.randn(2, 4)) is state
        True
    """
    ranks = ranks_of(group)
    with checking_arguments(ranks):
        options = StepOptions(evict=evict, placement=placement)
        options.check_group(ranks.name is None)
        check_state(state)
        check_writable(state)
        cached = stored(state, "embedding")
        check_embeddings("embeddings", embeddings, cached, of="the cache")
        rows, device = embeddings.shape[0], cached.device
        most = cached.shape[0] // ranks.size if options.replicated else cached.shape[0]
        if rows > most:
            raise ValueError(f"embeddings has {rows} rows; expected at most {most}, {capacity_of(ranks)}")
        features = fit_to_slots(stored_features(state), features, rows, "features", device)
        check_facts(rows, cached, ids, log_weights, cacheable, priorities)
        if refresh is not None:
            _check_refresh(refresh, cached)
    embeddings, shards = check_ranks_agree(
        ranks,
        embeddings.detach(),
        cached.shape[0],
        function="update",
        name="embeddings",
        options=options,
        seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
        rows={
            **rows_of_cache(state),
            "log_weights": log_weights,
            "refresh[1]": None if refresh is None else refresh[1].detach(),
        },
        numbers={"documents": rows, "refresh": 0 if refresh is None else refresh[0].shape[0]},
        choices={"priorities": None if priorities is None else priorities.dtype},
    )
    if refresh is not None:
        slots, fresh = ranks.gather_all(refresh[0], refresh[1].detach())
        refresh = (torch.where(slots < shards.capacity, slots, -1), fresh)
    to_store, fits = in_slots(stored_features(state), features)
    arrivals = Arrivals.of(to_store, embeddings, ids, log_weights, cacheable, fits=fits)
    arrivals = arrivals.gathered(rows, ranks)
    return write_(state, arrivals, refresh, shards, options, priorities)


def write_(
    state: TensorDictBase,
    arrivals: Arrivals,
    refresh: tuple[Tensor, Tensor] | None,
    shards: Shards,
    options: StepOptions,
    priorities: Tensor | None,
) -> TensorDictBase:
    """`update_` with the documents of all ranks; each rank writes those that belong into its slots."""
    with torch.no_grad():  # cached embeddings are constants
        # Arguments may be views of the state: copy or use them before a write if they are read after it.
        key = None if priorities is None else eviction_key(state, options, priorities)
        if refresh is not None:
            arrivals = arrivals._replace(embeddings=arrivals.embeddings.clone())
            _refresh_(state, *refresh, shards)
        _insert_(state, arrivals, shards, eviction_key(state, options, None) if key is None else key)
        scalar(state, "step").add_(1)
    return state


def copy_state(state: TensorDictBase) -> TensorDictBase:
    """A state that shares no storage with `state`, locked like it."""
    check_state(state)
    with of_normal_tensors():
        copy = cast(TensorDict, state.clone())
    return lock(copy) if state.is_locked else copy


def _check_refresh(refresh: tuple[Tensor, Tensor], cached: Tensor) -> None:
    if not isinstance(refresh, tuple) or len(refresh) != 2:  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not check types
        raise TypeError(f"refresh is {type(refresh).__name__}; expected a pair (slots, embeddings)")
    slots, embeddings = refresh
    check_slots("refresh[0]", slots, cached.device)
    if slots.ndim != 1:
        raise ValueError(f"refresh[0] has shape {tuple(slots.shape)}; expected [rows], a slot each")
    check_embeddings("refresh[1]", embeddings, cached, rows=slots.shape[0], at_least=0)


def _refresh_(state: TensorDictBase, slots: Tensor, embeddings: Tensor, shards: Shards) -> None:
    cached, embedded_at = stored(state, "embedding"), stored(state, "embedded_at")
    if slots.shape[0] == 0:
        return
    slots = shards.local(slots, cached.shape[0])
    wanted = (embedded_at[slots.clamp(min=0)] >= 0) & storable(embeddings, cached.dtype)
    target = torch.where(wanted, slots, -1)
    target = torch.where(last_of_each(target), target, -1)
    columns, rows = _as_stored(state, embeddings)
    write_rows_([*columns, embedded_at], [*rows, scalar(state, "step").expand_as(target)], target)


def _insert_(state: TensorDictBase, arrivals: Arrivals, shards: Shards, key: Tensor) -> None:
    cached = stored(state, "embedding")
    log_weights = arrivals.log_weights.to(stored(state, "log_weight").dtype)  # as stored, it may be infinite
    wanted = arrivals.cacheable & storable(arrivals.embeddings, cached.dtype) & (log_weights < float("inf"))
    target = assign_slots(state, arrivals.ids, wanted, key, shards)

    columns, rows = _as_stored(state, arrivals.embeddings)
    columns += feature_leaves(state)
    rows += [leaf for _, leaf in leaves(cast(Features, arrivals.features))]
    facts = {"ids": arrivals.ids, "log_weights": arrivals.log_weights, "now": scalar(state, "step").expand_as(target)}
    columns += [stored(state, name) for name in COLUMNS]
    rows += [facts[column.arriving] for column in COLUMNS.values()]
    write_rows_(columns, rows, target)


def _as_stored(state: TensorDictBase, embeddings: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The columns of the cache that hold embeddings, and the rows that they hold of the embeddings [M, D]."""
    encoded, columns = encode(embeddings, stored(state, "embedding").dtype), embedding_columns(state)
    return list(columns.values()), [encoded[name] for name in columns]
