"""The cache of a loss: made for its first batch, and widened where documents need more room than those before."""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from negcache_fn._cache.state import init_cache, with_items
from negcache_fn._cache.update import update_
from negcache_fn._ranks.group import SHARD_MULTIPLE, ranks_of
from negcache_fn.distributed import local_capacity
from negcache_fn.integrations.sentence_transformers.layout import Layout, Rows
from negcache_fn.integrations.sentence_transformers.settings import Settings
from negcache_fn.integrations.sentence_transformers.terms import BatchFacts

__all__ = ["all_ranks", "empty_cache", "fill_cache", "widened", "widest_of_ranks", "widths"]


def all_ranks() -> dist.ProcessGroup | None:
    """Of the process, if there are several."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def empty_cache(
    settings: Settings, dimensions: int, documents: Rows, group: dist.ProcessGroup | None
) -> TensorDictBase:
    """As wide as these documents; this rank's part, if ranks share it."""
    capacity, seed = settings.cache_size, settings.seed
    if group is not None:
        multiple = SHARD_MULTIPLE * group.size()
        capacity = local_capacity(-(-capacity // multiple) * multiple, group)
    elif (ranks := all_ranks()) is not None:
        seed += ranks.rank()  # caches of their own, draws of their own
    device = next(iter(documents.values())).device
    return init_cache(
        capacity, dimensions, documents, embedding_dtype=settings.embedding_dtype, seed=seed, device=device
    )


def widths(layout: Layout, features: Any) -> dict[str, int]:
    """Of the tokens and pieces, in rows or in a cache, by key."""
    return {
        key: features[key].shape[1]
        for key, leaf in layout.leaves.items()
        if leaf.kind != "rows" and features.get(key, None) is not None
    }


def widest_of_ranks(found: Mapping[str, int], group: dist.ProcessGroup, device: torch.device) -> dict[str, int]:
    """The widths that documents of all ranks fit in."""
    most = ranks_of(group).all_max(torch.tensor(list(found.values()), device=device))
    return dict(zip(found, cast("list[int]", most.tolist()), strict=True))


def widened(state: TensorDictBase, layout: Layout, documents: Rows, group: dist.ProcessGroup | None) -> TensorDictBase:
    """The cache with room for these documents: the same object, if it has room."""
    items = cast(TensorDictBase, state["items"])
    features = cast(TensorDictBase, items["features"])
    wanted = widths(layout, documents)
    narrow = {key for key, width in widths(layout, features).items() if width < wanted[key]}
    if not narrow:
        return state
    if group is not None:
        key = sorted(narrow)[0]
        raise ValueError(
            f"{key} has up to {wanted[key]} entries for a document; expected at most {features[key].shape[1]}, as in "
            f"the first batch, as the slots of a cache that ranks share cannot be widened: bring documents to one size"
        )
    leaves: dict[str, Any] = dict(cast(Any, features.items()))
    for key in narrow:
        leaves[key] = layout.widened(key, leaves[key], wanted[key])
    columns: dict[str, Any] = dict(cast(Any, items.items()))
    columns["features"] = TensorDict(leaves, batch_size=features.batch_size)
    return with_items(state, TensorDict(columns, batch_size=items.batch_size))


def fill_cache(
    state: TensorDictBase,
    documents: Rows,
    embeddings: Tensor,
    facts: BatchFacts,
    settings: Settings,
    group: dist.ProcessGroup | None,
) -> None:
    """Writes documents into the cache."""
    update_(
        state,
        documents,
        embeddings,
        ids=facts.ids,
        log_weights=facts.log_weights,
        cacheable=facts.cacheable,
        group=group,
        **settings.options.of_update(),
    )
