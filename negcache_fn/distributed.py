"""A cache over several ranks: its parts, its checkpoints, and the gradients of parameters outside wrapped modules.

With `group=`, the functions of this package work on a sharded cache: each rank holds a part of the slots, and draws,
losses and states are those of a single rank that holds all (docs/scaling.md). This module has the steps around a step.

Each rank except the last has the same whole number of groups of 1024 slots, and the last has the rest. These are the
groups of the hierarchical draw, whose noise depends on their number, so the number of ranks does not change the draws.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from negcache_fn._cache.state import check_state, rows_of_cache, scalar, stored, with_items
from negcache_fn._checkpoints.checkpoint import load_checkpoint, save_checkpoint
from negcache_fn._checks import check_size
from negcache_fn._features import map_features
from negcache_fn._ranks.agree import check_ranks_agree, checking_arguments, device_of
from negcache_fn._ranks.group import SHARD_MULTIPLE, Ranks, Shards, ranks_of

__all__ = [
    "average_gradients",
    "checkpointable",
    "load_checkpoint",
    "local_capacity",
    "save_checkpoint",
    "shard",
    "unshard",
]


def local_capacity(capacity: int, group: dist.ProcessGroup | None = None) -> int:
    """How many of a cache's `capacity` slots this rank holds: the capacity to pass to `init_cache`.

    Args:
        capacity: slots of the whole cache, a multiple of 1024.
        group: the ranks; None: this process alone.

    Returns:
        The slots of this rank: the same number on every rank except the last, which may have fewer.

    Raises:
        ValueError: on every rank, if the capacity is not a multiple of 1024 or leaves a rank without a slot.

    Examples:
        >>> local_capacity(7168)
        7168
    """
    ranks = ranks_of(group)
    check_size("capacity", capacity)
    if capacity % SHARD_MULTIPLE:
        raise ValueError(
            f"capacity is {capacity}; expected a multiple of {SHARD_MULTIPLE}, such as "
            f"{-(-capacity // SHARD_MULTIPLE) * SHARD_MULTIPLE}"
        )
    chunk = _chunk(capacity, ranks)
    if chunk * (ranks.size - 1) >= capacity:
        raise ValueError(
            f"capacity is {capacity}: in parts of {chunk} slots it leaves some of the {ranks.size} ranks without any; "
            f"expected a multiple of {SHARD_MULTIPLE * ranks.size}"
        )
    return min(chunk, capacity - chunk * ranks.rank)


def shard(state: TensorDictBase, group: dist.ProcessGroup) -> TensorDictBase:
    """This rank's part of a whole cache, a copy.

    Args:
        state: the whole cache, the same on every rank.
        group: the ranks.

    Returns:
        The slots `r * chunk ... (r + 1) * chunk - 1` on rank r, for the functions that take `group=`.

    Raises:
        ValueError: as `local_capacity`.
    """
    check_state(state)
    capacity, ranks = stored(state, "embedding").shape[0], ranks_of(group)
    rows = local_capacity(capacity, group)
    first = _chunk(capacity, ranks) * ranks.rank

    def part(leaf: Tensor) -> Tensor:
        return leaf[first : first + rows].clone()

    return with_items(state, map_features(part, cast(TensorDict, state["items"])))


def unshard(state: TensorDictBase, group: dist.ProcessGroup) -> TensorDictBase:
    """The whole cache, on every rank, from its parts.

    Args:
        state: this rank's part.
        group: the ranks.

    Raises:
        ValueError: on every rank, if the parts do not belong to one cache.
    """
    ranks = ranks_of(group)
    rows, shards = _shards(state, ranks, "unshard")
    chunk, capacity = int(shards.chunk), int(shards.capacity)

    def whole(leaf: Tensor) -> Tensor:
        filled = leaf.new_zeros(chunk, *leaf.shape[1:])
        filled[:rows] = leaf
        return ranks.gather(filled)[:capacity].clone()

    return with_items(state, map_features(whole, cast(TensorDict, state["items"])))


def checkpointable(state: TensorDictBase, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """The tensors of a (part of a) cache as `torch.distributed.checkpoint` saves and loads them on any number of ranks.

    They share the storage of the state: loading into them fills it. A sharded state gives DTensors, `Shard(0)` over
    groups of 1024 slots; a replicated one, or a process alone, tensors of the same global shape.

    Args:
        state: the cache, or this rank's part of it.
        group: ranks over which it is sharded.

    Returns:
        A nested dict.

    Raises:
        ValueError: as `unshard`; a capacity that is not a multiple of 1024.

    Examples:
        >>> state = init_cache(1024, 4, torch.zeros(1, 3))
        >>> checkpointable(state)["items"]["embedding"].shape
        torch.Size([1, 1024, 4])
    """
    _, shards = _shards(state, ranks_of(group), "checkpointable")
    capacity = int(shards.capacity)
    if capacity % SHARD_MULTIPLE:
        raise ValueError(
            f"the cache has {capacity} slots; expected a multiple of {SHARD_MULTIPLE} for checkpoints by part"
        )
    mesh = None if group is None else DeviceMesh.from_group(group, stored(state, "embedding").device.type)

    def spread(leaf: Tensor) -> Tensor:
        local = leaf.view(-1, SHARD_MULTIPLE, *leaf.shape[1:])
        if mesh is None:
            return local
        shape = torch.Size((capacity // SHARD_MULTIPLE, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    items = cast(TensorDictBase, state["items"])
    nested = {name: _nested(items[name], spread) for name in cast("Iterable[str]", items.keys())}
    return {"items": nested, "step": state["step"], "seed": state["seed"]}


def average_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Averages the gradients of parameters outside a module wrapped by DistributedDataParallel, such as a scale.

    Call it after `backward` and before the optimiser's step.

    Args:
        parameters: the same on every rank, in the same order; one without a gradient counts as 0.
        group: the ranks.

    Raises:
        ValueError: on every rank, if their number, shapes or dtypes differ between the ranks.
    """
    ranks, parameters = ranks_of(group), list(parameters)
    rows = {f"parameters[{place}]": parameter.detach()[None] for place, parameter in enumerate(parameters)}
    nothing = torch.zeros(1, 1, device=device_of(group))
    check_ranks_agree(ranks, nothing, 0, function="average_gradients", rows=rows)
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = ranks.all_sum(gradient) / ranks.size


def _chunk(capacity: int, ranks: Ranks) -> int:
    return -(-capacity // SHARD_MULTIPLE // ranks.size) * SHARD_MULTIPLE


def _shards(state: TensorDictBase, ranks: Ranks, function: str) -> tuple[int, Shards]:
    """The slots of this rank and their place in the whole, if the states of all ranks are parts of one cache."""
    with checking_arguments(ranks):
        check_state(state)
    rows = stored(state, "embedding").shape[0]
    _, shards = check_ranks_agree(
        ranks,
        stored(state, "embedding"),
        rows,
        function=function,
        name="state['items', 'embedding']",
        seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
        rows=rows_of_cache(state),
    )
    return rows, shards


def _nested(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return {key: _nested(child, function) for key, child in value.items()}
