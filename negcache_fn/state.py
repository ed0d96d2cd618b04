"""The cache as a value: a locked TensorDict of plain tensors, and the views derived from it.

Schema (C slots, D dimensions); the invariants hold in every state that this package returns:

| key                 | shape    | dtype    | meaning and invariant                                                 |
| ------------------- | -------- | -------- | --------------------------------------------------------------------- |
| `items.embedding`   | [C, D]   | floating | stale embedding; finite                                               |
| `items.features`    | [C, ...] | as given | what the document encoder takes: a nested TensorDict, or one tensor   |
| `items.id`          | [C]      | int64    | document id; -1: anonymous; ids >= 0 of live slots are unique         |
| `items.embedded_at` | [C]      | int64    | step of the embedding; -1: empty slot                                 |
| `items.log_weight`  | [C]      | float32  | added to the document's score; below +inf, never NaN                  |
| `items.inserted_at` | [C]      | int64    | step at which the document came in; -1 exactly where `embedded_at` is |
| `step`              | []       | int64    | number of updates so far                                              |
| `seed`              | []       | int64    | key of the noise                                                      |

A slot is *live* when `embedded_at >= 0`. The structure is locked; only functions with a trailing underscore write to
the storage of a state.
"""

from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.functional import pad

from negcache_fn._kernels import dispatch
from negcache_fn.checks import check_size, check_slots, check_state
from negcache_fn.collectives import Shards, agree, distribute, fetch, in_one_place
from negcache_fn.features import Features, as_stored, check_example, leaves, map_features, nested_as

__all__ = [
    "as_features",
    "feature_leaves",
    "init_cache",
    "live",
    "lock",
    "lowest",
    "occupancy",
    "scalar",
    "segments",
    "stalest",
    "stored",
    "stored_features",
    "take",
    "whole",
    "with_items",
]

_SEGMENT = 2**19  # slots; a multiple of the 4096 whose groups share a Philox call in sampling


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
        features: an example batch of what the document encoder takes: a tensor, or a (nested) mapping of tensors, each
            [rows, ...]. Only the shapes past the first dimension and the dtypes are used. Make variable-width
            features (token ids) as wide as they can get: narrower ones are padded with zeros on the right.
        embedding_dtype: storage of the embeddings: float32, bfloat16, float16 or float64. Scores are accumulated in
            float32 or wider whatever it is.
        seed: key of the noise. Caches whose draws are merged need different seeds.
        device: where the state lives; the device of the features by default.

    Returns:
        The state, a locked TensorDict (see the module's schema).

    Raises:
        ValueError: non-positive sizes; a feature without a row dimension; features on several devices.
        TypeError: a feature that is no tensor; an embedding dtype that is not floating.

    Examples:
        >>> documents = {"input_ids": torch.zeros(1, 32, dtype=torch.int64)}
        >>> state = init_cache(1024, 16, documents)
        >>> state["items", "embedding"].shape, state["items", "features", "input_ids"].shape
        (torch.Size([1024, 16]), torch.Size([1024, 32]))
    """
    check_size("capacity", capacity)
    check_size("embedding_dim", embedding_dim)
    if not embedding_dtype.is_floating_point:
        raise TypeError(f"embedding_dtype is {embedding_dtype}; expected a floating dtype, such as torch.float32")
    example_device = check_example(features)
    device = example_device if device is None else torch.device(device)

    def slots(dtype: torch.dtype, value: float) -> Tensor:
        return torch.full((capacity,), value, dtype=dtype, device=device)

    def empty(leaf: Tensor) -> Tensor:
        return torch.zeros((capacity, *leaf.shape[1:]), dtype=leaf.dtype, device=device)

    items = TensorDict(
        {
            "embedding": torch.zeros(capacity, embedding_dim, dtype=embedding_dtype, device=device),
            "features": map_features(empty, as_stored(features)),
            "id": slots(torch.int64, -1),
            "embedded_at": slots(torch.int64, -1),
            "log_weight": slots(torch.float32, 0.0),
            "inserted_at": slots(torch.int64, -1),
        },
        batch_size=[capacity],
    )
    step = torch.zeros((), dtype=torch.int64, device=device)
    state = TensorDict({"items": items, "step": step, "seed": torch.full_like(step, seed)}, batch_size=[])
    return lock(state)


def take(
    state: TensorDictBase, slots: Tensor, *, group: torch.distributed.ProcessGroup | None = None
) -> Tensor | TensorDictBase:
    """The features at `slots`.

    Args:
        state: the cache.
        slots: int64 of any shape. Negative slots ("nothing drawn") read slot 0.
        group: of the ranks over which the cache is sharded; slots are then numbers of all its slots.

    Returns:
        The features, nested as in the state, each leaf [*slots.shape, ...].

    Raises:
        TypeError: slots that are not int64.

    Examples:
        >>> state = init_cache(8, 4, {"input_ids": torch.zeros(1, 3, dtype=torch.int64)})
        >>> take(state, torch.tensor([[0, 5]]))["input_ids"].shape
        torch.Size([1, 2, 3])
    """
    ranks = distribute(group)
    with ranks.checking():
        check_state(state)
        check_slots("slots", slots, stored(state, "embedding").device)
    shards = whole(state)
    if group is not None:
        flat, shards = agree(
            ranks,
            slots.reshape(-1, 1),
            stored(state, "embedding").shape[0],
            placement="sharded",
            options="take",
            queries=slots.numel(),
        )
        slots = flat.view(slots.shape)
    rows = fetch(feature_leaves(state), slots.flatten(), shards)
    return as_features(state, [leaf.view(slots.shape + leaf.shape[1:]) for leaf in rows])


def feature_leaves(state: TensorDictBase) -> list[Tensor]:
    """The tensors of the features, [C, ...] each."""
    return [leaf for _, leaf in leaves(stored_features(state))]


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
    return live(state).sum() / stored(state, "embedded_at").shape[0]


def stalest(state: TensorDictBase, n: int) -> Tensor:
    """Slots of the `n` oldest embeddings, oldest first, ties by slot.

    Args:
        state: the cache.
        n: how many, at most the capacity.

    Returns:
        [n] int64; -1 where fewer than `n` slots are live.

    Raises:
        ValueError: `n` not in 1 ... C.

    Examples:
        >>> stalest(init_cache(8, 4, torch.zeros(1, 3)), 2)
        tensor([-1, -1])
    """
    check_state(state)
    embedded_at = stored(state, "embedded_at")
    check_size("n", n, most=embedded_at.shape[0])
    return lowest(embedded_at, n, skip=~live(state), shards=whole(state))


def stored(state: TensorDictBase, name: str) -> Tensor:
    """The tensor `name` of the items, [C, ...]."""
    return cast(Tensor, state["items", name])


def scalar(state: TensorDictBase, name: str) -> Tensor:
    """The 0-d tensor "step" or "seed"."""
    return cast(Tensor, state[name])


def stored_features(state: TensorDictBase) -> Tensor | TensorDictBase:
    """The features of the items, nested as they were given."""
    return cast("Tensor | TensorDictBase", state["items", "features"])


def live(state: TensorDictBase) -> Tensor:
    """[C] bool, True where a slot holds a document."""
    return stored(state, "embedded_at") >= 0


def whole(state: TensorDictBase) -> Shards:
    """All slots here."""
    return in_one_place(stored(state, "embedding").shape[0])


def segments(capacity: int) -> list[tuple[int, int]]:
    """First and last slot (exclusive) of the stretches in which what needs memory for every slot is done."""
    return [(start, min(start + _SEGMENT, capacity)) for start in range(0, capacity, _SEGMENT)]


def lowest(key: Tensor, n: int, *, skip: Tensor, shards: Shards) -> Tensor:
    """[n] slots of the smallest `key` [C], ascending, ties by slot, without those to skip [C]; -1 if too few."""
    slots = cast(Tensor, _lowest_op(key, skip, n))
    if shards.ranks.name is None:
        return slots
    # Distinct integers in the order of (key, slot).
    last = torch.iinfo(torch.int64).max
    ranked = key[slots.clamp(min=0)] * shards.capacity + slots + shards.first
    best = shards.ranks.gather(torch.where(slots >= 0, ranked, last)).topk(n, largest=False, sorted=True).values
    return torch.where(best == last, -1, best % shards.capacity)


@torch.library.custom_op("negcache_fn::lowest", mutates_args=())
def _lowest_op(key: Tensor, skip: Tensor, n: int) -> Tensor:
    slots = dispatch.lowest_slots(key, skip, n)
    if slots is not None:
        return slots
    capacity, last = key.shape[0], torch.iinfo(torch.int64).max
    best = key.new_empty(0)
    for start, stop in segments(capacity):
        # Distinct integers in the order of (key, slot): their top-k is deterministic.
        ranked = key[start:stop] * capacity + torch.arange(start, stop, device=key.device)
        best = torch.cat([best, ranked.masked_fill(skip[start:stop], last)])
        best = best.topk(min(n, best.shape[0]), largest=False, sorted=True).values
    return pad(torch.where(best == last, -1, best % capacity), (0, n - best.shape[0]), value=-1)


@_lowest_op.register_fake
def _(key: Tensor, skip: Tensor, n: int) -> Tensor:
    return key.new_empty(n)


def with_items(state: TensorDictBase, items: TensorDict) -> TensorDictBase:
    """A state of other items that goes on where `state` is: its `step` and `seed`, locked like it."""
    scalars = {name: scalar(state, name).clone() for name in ("step", "seed")}
    new = TensorDict({"items": items, **scalars}, batch_size=[])
    return lock(new) if state.is_locked else new


def lock(state: TensorDict) -> TensorDict:
    """Locks the structure of a state.

    Inside a compiled graph `lock_` warns, because the parent references that it registers do not exist there; and a
    state must leave a compiled step with the flag that it came with, else the next call recompiles. So there the flag
    alone is set.
    """
    if not torch.compiler.is_compiling():
        return state.lock_()
    for child in state.values():
        if isinstance(child, TensorDict):
            lock(child)
    state._is_locked = True  # pyright: ignore[reportPrivateUsage] - TensorDict has no public way inside a graph
    return state
