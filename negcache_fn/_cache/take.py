"""Reading the features of slots, here or on the rank that holds them."""

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.state import (
    as_features,
    check_state,
    embedding_columns,
    feature_leaves,
    rows_of_cache,
    scalar,
    stored,
)
from negcache_fn._checks import check_slots
from negcache_fn._codec import decode, read_as
from negcache_fn._ranks.agree import check_ranks_agree, checking_arguments
from negcache_fn._ranks.group import Shards, fetch_rows, ranks_of, unsharded

__all__ = ["fetch_embeddings", "take"]


def take(
    state: TensorDictBase, slots: Tensor, *, group: torch.distributed.ProcessGroup | None = None
) -> Tensor | TensorDictBase:
    """The features at `slots`.

    Args:
        state: the cache.
        slots: int64 of any shape. Negative slots ("nothing drawn") read slot 0.
        group: ranks over which the cache is sharded; `slots` are then numbered over the whole cache.

    Returns:
        The features, nested as in the state, each leaf [*slots.shape, ...].

    Raises:
        TypeError: slots that are not int64.

    Examples:
        >>> state = init_cache(8, 4, {"input_ids": torch.zeros(1, 3, dtype=torch.int64)})
        >>> take(state, torch.tensor([[0, 5]]))["input_ids"].shape
        torch.Size([1, 2, 3])
    """
    ranks = ranks_of(group)
    with checking_arguments(ranks):
        check_state(state)
        check_slots("slots", slots, stored(state, "embedding").device)
    shards = unsharded(stored(state, "embedding").shape[0])
    if group is not None:
        flat, shards = check_ranks_agree(
            ranks,
            slots.reshape(-1, 1),
            stored(state, "id").shape[0],
            function="take",
            name="slots",
            seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
            rows=rows_of_cache(state),
            numbers={"slots": slots.numel()},
        )
        slots = flat.view(slots.shape)
    rows = fetch_rows(feature_leaves(state), slots.flatten(), shards)
    return as_features(state, [leaf.view(slots.shape + leaf.shape[1:]) for leaf in rows])


def fetch_embeddings(
    state: TensorDictBase, slots: Tensor, shards: Shards, others: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The embeddings [M, D] of some slots [M], exactly as they are scored, and the rows of further columns."""
    columns = list(embedding_columns(state).values())
    fetched = fetch_rows([*columns, *others], slots, shards)
    rows, scale = fetched[0], fetched[1] if len(columns) > 1 else None
    return decode(rows, scale, read_as(rows.dtype)), list(fetched[len(columns) :])
