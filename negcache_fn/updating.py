"""Writing: the next state of the cache.

`update_` writes into the state it is given and `update` into a copy; they are otherwise the same. Shapes are fixed
whatever the data, so that both compile: a row that must not be written repeats the write of one that must.
"""

from typing import NamedTuple, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from negcache_fn.checks import check_embeddings, check_rows, check_slots, check_state
from negcache_fn.collectives import Ranks, Shards, agree, check_placement, distribute, in_order
from negcache_fn.eviction import Evict, check_evict, eviction_key
from negcache_fn.features import Features, fit, leaves, map_features, moved, nested_as
from negcache_fn.ids import find_slots, last_of_each
from negcache_fn.state import lock, lowest, scalar, stored, stored_features

__all__ = ["Arrivals", "copy_state", "storable", "update", "update_", "write_"]


def update(
    state: TensorDictBase,
    features: Features,
    embeddings: Tensor,
    *,
    ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    mask: Tensor | None = None,
    refresh: tuple[Tensor, Tensor] | None = None,
    evict: Evict = "lru",
    group: torch.distributed.ProcessGroup | None = None,
    placement: str = "sharded",
) -> TensorDictBase:
    """The cache after one step: re-embeds `refresh`, then puts in the documents of a batch.

    A document whose id is cached replaces that one. The others take, in order, empty slots first and then those that
    `evict` names, ties by slot. Of several rows with one id the last counts. Rows with a non-finite embedding (as
    stored), or a log-weight that is NaN or +inf, never enter: they are left out like those with `mask=False`.

    Args:
        state: the cache, C slots.
        features: of N <= C documents, nested as in the cache; narrower leaves are padded with zeros on the right.
        embeddings: [N, D] floating; stored without gradient, in the cache's dtype.
        ids: [N] int64, -1 where anonymous; all anonymous by default.
        log_weights: [N] floating, added to the documents' scores from now on; 0 by default.
        mask: [N] bool, False for rows to leave out.
        refresh: slots [R] int64 and their fresh embeddings [R, D]; negative and empty slots are ignored, and of
            several rows for one slot the last counts. The documents' age is that of their embedding from then on.
        evict: "lru" (oldest embedding), "fifo" (oldest insertion), or the priority of every slot here, [C] floating or
            int64: the lowest leave first. NaN counts as -inf; floats are rounded to float32, integers beyond 32 bits
            count as the nearest within. If the cache is replicated, the same on every rank.
        group: of ranks that share a cache: the documents of all come in, in the order of ranks, and slots are numbers
            of all its slots.
        placement: "sharded": each rank has a part of the cache; "replicated": each has the whole.

    Returns:
        The new state, its `step` one further. The given one is untouched.

    Raises:
        ValueError, TypeError: features unlike those of the cache; N > C; shapes, dtypes or devices that do not fit; an
            unknown `evict`; priorities of another shape, dtype or device. Nothing has been written then.

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
        mask=mask,
        refresh=refresh,
        evict=evict,
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
    mask: Tensor | None = None,
    refresh: tuple[Tensor, Tensor] | None = None,
    evict: Evict = "lru",
    group: torch.distributed.ProcessGroup | None = None,
    placement: str = "sharded",
) -> TensorDictBase:
    """`update` in place: writes the rows that change into `state` and returns it. Arguments and errors as there.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> update_(state, torch.ones(2, 3), torch.randn(2, 4)) is state
        True
    """
    ranks = distribute(group)
    with ranks.checking():
        check_placement(placement, ranks)
        check_state(state)
        cached = stored(state, "embedding")
        check_embeddings("embeddings", embeddings, cached, of="the cache")
        rows, device = embeddings.shape[0], cached.device
        most = cached.shape[0] if placement == "sharded" else cached.shape[0] // ranks.size
        if rows > most:
            raise ValueError(f"embeddings has {rows} rows; expected at most {most}, the capacity of the cache per rank")
        features = fit(stored_features(state), features, rows, "features", device)
        if ids is not None:
            check_rows("ids", ids, torch.int64, rows, device)
        if log_weights is not None:
            check_rows("log_weights", log_weights, None, rows, device)
        if mask is not None:
            check_rows("mask", mask, torch.bool, rows, device)
        evict_kind = check_evict(evict, cached)
        if refresh is not None:
            _check_refresh(refresh, cached)
    embeddings, shards = agree(
        ranks,
        embeddings,
        cached.shape[0],
        placement=placement,
        options=f"update evict={evict_kind}",
        seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
        documents=rows,
        num_samples=0 if refresh is None else refresh[0].shape[0],
    )
    if refresh is not None:
        slots, fresh = ranks.gather_all(refresh[0], refresh[1].detach())
        refresh = (slots, fresh)
    arrivals = Arrivals.of(features, embeddings.detach(), ids, log_weights, mask)
    return write_(state, arrivals.gathered(rows, ranks, differentiable=False), refresh, shards, evict=evict)


class Arrivals(NamedTuple):
    """The documents that come in."""

    features: Features
    embeddings: Tensor  # [N, D]
    ids: Tensor  # [N]
    log_weights: Tensor  # [N]
    mask: Tensor  # [N]

    @classmethod
    def of(
        cls,
        features: Features,
        embeddings: Tensor,
        ids: Tensor | None,
        log_weights: Tensor | None,
        mask: Tensor | None,
    ) -> "Arrivals":
        """With what stands for ids, log-weights and a mask that are not given."""
        rows, device = embeddings.shape[0], embeddings.device
        ids = torch.full((rows,), -1, device=device) if ids is None else ids
        log_weights = torch.zeros(rows, device=device) if log_weights is None else log_weights
        mask = torch.ones(rows, dtype=torch.bool, device=device) if mask is None else mask
        return cls(features, embeddings, ids, log_weights, mask)

    def gathered(self, positives: int, ranks: Ranks, *, differentiable: bool) -> "Arrivals":
        """Those of all ranks: the first rows, the positives of queries, of each, then the others.

        With a gradient for the embeddings where the loss uses them, at the price of a message.
        """
        if ranks.name is None:
            return self
        parts = [leaf for _, leaf in leaves(cast(Features, self.features))]
        parts = [*parts, self.ids, self.log_weights, self.mask]
        if differentiable:
            *found, ids, log_weights, mask = ranks.gather_all(*parts)
            embeddings = ranks.gather(self.embeddings)
        else:
            *found, ids, log_weights, mask, embeddings = ranks.gather_all(*parts, self.embeddings)
        features = nested_as(cast(Features, self.features), [in_order(rows, positives, ranks) for rows in found])
        rest = (in_order(rows, positives, ranks) for rows in (embeddings, ids, log_weights, mask))
        return Arrivals(features, *rest)


def write_(
    state: TensorDictBase,
    arrivals: Arrivals,
    refresh: tuple[Tensor, Tensor] | None,
    shards: Shards,
    *,
    evict: Evict,
) -> TensorDictBase:
    """`update_` with what all ranks bring; each writes what belongs into its slots."""
    with torch.no_grad():  # what is cached is a constant
        if refresh is not None:
            _refresh_(state, *refresh, shards)
        _insert_(state, arrivals, shards, evict)
        scalar(state, "step").add_(1)
    return state


def copy_state(state: TensorDictBase) -> TensorDictBase:
    """A state that shares no storage with `state`, locked like it."""
    check_state(state)
    copy = cast(TensorDict, state.clone())
    return lock(copy) if state.is_locked else copy


def storable(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows] bool: whether a row is finite once it is stored in `dtype`."""
    return embeddings.to(dtype).isfinite().all(-1)


def _check_refresh(refresh: tuple[Tensor, Tensor], cached: Tensor) -> None:
    if not isinstance(refresh, tuple) or len(refresh) != 2:  # pyright: ignore[reportUnnecessaryIsInstance] - who calls may not check types
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
    slots = torch.where(slots >= 0, slots - shards.first, -1)
    inside = (slots >= 0) & (slots < cached.shape[0])
    wanted = inside & (embedded_at[slots.clamp(0, cached.shape[0] - 1)] >= 0) & storable(embeddings, cached.dtype)
    target = torch.where(wanted, slots, -1)
    target = torch.where(last_of_each(target), target, -1)
    _write_(cached, target, embeddings)
    _write_(embedded_at, target, scalar(state, "step").expand_as(target))


def _insert_(state: TensorDictBase, arrivals: Arrivals, shards: Shards, evict: Evict) -> None:
    cached, ids = stored(state, "embedding"), arrivals.ids
    capacity = cached.shape[0]
    log_weights = arrivals.log_weights.to(stored(state, "log_weight").dtype)  # as stored, it may be infinite
    wanted = arrivals.mask & storable(arrivals.embeddings, cached.dtype) & (log_weights < float("inf"))
    ids = torch.where(wanted, ids, -1)
    wanted = wanted & last_of_each(ids)
    replaced_here = find_slots(state, torch.where(wanted, ids, -1))
    # Slots that are replaced by id are not for others to take.
    is_replaced = torch.zeros(capacity + 1, dtype=torch.bool, device=cached.device)
    is_replaced = is_replaced.scatter(0, torch.where(replaced_here >= 0, replaced_here, capacity), True)[:capacity]
    evicted = lowest(eviction_key(state, evict), ids.shape[0], skip=is_replaced, shards=shards)
    replaced = shards.ranks.largest(torch.where(replaced_here >= 0, replaced_here + shards.first, -1))
    takes = wanted & (replaced < 0)
    place = takes.cumsum(0) - 1
    target = torch.where(takes, evicted[place.clamp(min=0)], torch.where(wanted, replaced, -1))
    target = target - shards.first
    target = torch.where((target >= 0) & (target < capacity), target, -1)

    now = scalar(state, "step").expand_as(target)

    def write_rows_(leaf: Tensor, new: Tensor) -> Tensor:
        return _write_(leaf, target, new)

    map_features(write_rows_, stored_features(state), cast(Features, arrivals.features))
    for name, values in (
        ("embedding", arrivals.embeddings),
        ("id", arrivals.ids),
        ("embedded_at", now),
        ("log_weight", arrivals.log_weights),
        ("inserted_at", now),
    ):
        _write_(stored(state, name), target, values)


def _write_(stored_rows: Tensor, target: Tensor, values: Tensor) -> Tensor:
    """Writes `values` [M, ...] into the rows `target` [M], distinct but for -1: nowhere.

    A row that goes nowhere repeats the first one that goes somewhere; if there is none, all rewrite what slot 0 holds.
    """
    target, values = moved(target, stored_rows.device), moved(values, stored_rows.device)
    somewhere = target >= 0
    source = torch.where(somewhere, torch.arange(target.shape[0], device=target.device), somewhere.int().argmax())
    slots = target[source].clamp(min=0)
    new = values[source].to(stored_rows.dtype)
    new = torch.where(somewhere.any(), new, stored_rows[slots])
    return stored_rows.index_copy_(0, slots, new)
