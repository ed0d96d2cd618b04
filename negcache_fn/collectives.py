"""What one rank sends to and has from the others; the only module that calls `torch.distributed` inside a step.

`Ranks` is a process group or, with `ALONE`, none: then every collective is the identity, so that sharded code is
unsharded code. `Shards` says which of the cache's slots lie where: rank r has `r * chunk ... (r + 1) * chunk - 1` of a
numbering of all, the last rank what remains.

Each collective is a custom operator around a public function of torch.distributed, so that a step compiles whole and
nothing depends on torch's functional collectives, which are private and change from release to release. Shapes must be
the same on all ranks: `agree` sees to that before anything else is sent.
"""

import math
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

# There is no public way from a group's name, all that an operator can take, to the group.
from torch.distributed.distributed_c10d import (
    GroupName,
    _resolve_process_group,  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
)

from negcache_fn._kernels.blocks import GROUP
from negcache_fn.features import moved
from negcache_fn.ordering import after

__all__ = [
    "ALONE",
    "PLACEMENTS",
    "SHARD_MULTIPLE",
    "Ranks",
    "Shards",
    "agree",
    "check_placement",
    "distribute",
    "fetch",
    "in_one_place",
    "in_order",
    "row_bytes",
]

PLACEMENTS = ("sharded", "replicated")
SHARD_MULTIPLE = GROUP  # slots; a group of the hierarchical draw must lie on one rank


def _either(name: str, before: str) -> Callable[..., object]:
    """A function of torch.distributed by its name since torch 2.13, or the one before."""
    return cast("Callable[..., object]", getattr(dist, name, None) or getattr(dist, before))


_all_gather = _either("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _either("reduce_scatter_single", "reduce_scatter_tensor")
# What ranks must agree on, in numbers; "seed" and "step" are those of the cache.
_SIZES = (
    *("capacity", "embedding_dim", "queries", "documents", "num_samples", "num_draws", "top_k", "exclude_ids"),
    "refresh_stalest",
)
_FIELDS = (*_SIZES, "seed", "step")


class Ranks(NamedTuple):
    """A process group as this process sees it."""

    name: str | None  # of the group; None: this process is alone
    rank: int
    size: int
    last: dict[bool, Tensor]  # of what came with the last message with a gradient, and with the last one without

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] -> [size * n, ...]: the values of all ranks, in their order. Differentiable."""
        if self.name is None:
            return values
        return self._came(cast(Tensor, _all_gather_op(self._in_turn(values), self.name, self.size)))

    def gather_all(self, *values: Tensor) -> list[Tensor]:
        """`gather` of each, in one message and without gradient."""
        if self.name is None:
            return list(values)
        sent = [self._in_turn(values[0].detach()), *values[1:]]
        received = cast("list[Tensor]", _all_gather_packed_op(sent, self.name, self.size))
        self._came(received[0])
        return received

    def exchange(self, values: Tensor) -> Tensor:
        """[size * n, ...] -> [size * n, ...]: the r-th n go to rank r, and come from it. Differentiable."""
        if self.name is None:
            return values
        return self._came(cast(Tensor, _all_to_all_op(self._in_turn(values), self.name)))

    def exchange_all(self, *values: Tensor) -> list[Tensor]:
        """`exchange` of each, in one message and without gradient."""
        if self.name is None:
            return list(values)
        sent = [self._in_turn(values[0].detach()), *values[1:]]
        received = cast("list[Tensor]", _all_to_all_packed_op(sent, self.name, self.size))
        self._came(received[0])
        return received

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        return self._reduce(values, "sum")

    def largest(self, values: Tensor) -> Tensor:
        """The largest over ranks, without gradient."""
        return self._reduce(values, "max")

    def _reduce(self, values: Tensor, operation: str) -> Tensor:
        if self.name is None:
            return values
        return self._came(cast(Tensor, _all_reduce_op(self._in_turn(values.detach()), operation, self.name)))

    def _in_turn(self, values: Tensor) -> Tensor:
        """The values, which are sent after the last message has come; their gradients the other way round.

        Where messages do not depend on each other, a compiler may order them otherwise on each rank, and they meet the
        wrong ones.
        """
        for last in self.last.values():
            values = after(values, last)
        return values

    def _came(self, values: Tensor) -> Tensor:
        self.last[values.requires_grad] = values.flatten()[:1]  # one number has to wait for as long as all
        return values

    def afresh(self) -> "Ranks":
        """The same ranks, no message sent."""
        return Ranks(self.name, self.rank, self.size, {})

    def by_rank(self, values: Tensor) -> Tensor:
        """[size * n, ...] -> [size, n, ...]."""
        return values.view(self.size, values.shape[0] // self.size, *values.shape[1:])

    def own(self, values: Tensor) -> Tensor:
        """[size * n, ...] -> [n, ...]: what of gathered values is this rank's."""
        rows = values.shape[0] // self.size
        return values[self.rank * rows : (self.rank + 1) * rows]

    def checking(self) -> AbstractContextManager[None]:
        """A context for checks of the arguments: an error in one rank's is raised on every rank, and nobody waits."""
        if self.name is None or torch.compiler.is_compiling():
            return nullcontext()
        return _Announcing(self)


class Shards(NamedTuple):
    """Where the slots are."""

    ranks: Ranks  # that have a part each
    first: int | Tensor  # number of the first slot here
    chunk: int | Tensor  # slots of every rank but the last
    capacity: int | Tensor  # of all


ALONE = Ranks(None, 0, 1, {})


def in_one_place(capacity: int) -> Shards:
    """All slots here."""
    return Shards(ALONE, 0, capacity, capacity)


def distribute(group: Any) -> Ranks:
    """The ranks of a process group; `ALONE` without one."""
    if group is None:
        return ALONE
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}; expected a torch.distributed process group, such as "
            f"torch.distributed.group.WORLD after init_process_group(...), on a rank that is in it"
        )
    return Ranks(str(group.group_name), group.rank(), group.size(), {})


def check_placement(placement: Any, ranks: Ranks) -> None:
    """Raises unless `placement` is known and possible."""
    if placement not in PLACEMENTS:
        raise ValueError(f"placement is {placement!r}; expected 'sharded' or 'replicated'")
    if placement != "sharded" and ranks.name is None:
        raise ValueError(f"placement is {placement!r} without a group; expected group= as well")


def agree(
    ranks: Ranks,
    tensor: Tensor,
    capacity: int,
    *,
    placement: str,
    options: str,
    seed_and_step: tuple[Tensor, Tensor] | None = None,
    **sizes: int,
) -> tuple[Tensor, Shards]:
    """Makes sure, before anything is sent, that all ranks are about to do the same.

    Args:
        ranks: of the group.
        tensor: [rows, D], from which all that is sent later derives: the check cannot be reordered behind it.
        capacity: slots here.
        placement: "sharded" or "replicated".
        options: all other arguments that must be equal, spelled out.
        seed_and_step: of the cache, where there is one.
        **sizes: numbers that must be equal, by their names in `_SIZES`.

    Returns:
        `tensor`, and where the slots are.

    Raises:
        ValueError: on every rank, if anything differs, or shards cannot be those of one cache.
    """
    if ranks.name is None:
        return tensor, in_one_place(capacity)
    sizes |= {"capacity": capacity, "embedding_dim": tensor.shape[-1]}
    row = [sizes.get(name, 0) for name in _SIZES]
    marks = tensor.new_zeros(2, dtype=torch.int64) if seed_and_step is None else torch.stack(seed_and_step)
    options = f"{placement} {options}"
    tensor, capacities = cast("tuple[Tensor, Tensor]", _agree_op(tensor, marks, row, options, ranks.name))
    if placement == "replicated":
        return tensor, in_one_place(capacity)
    return tensor, Shards(ranks, capacities[0] * ranks.rank, capacities[0], capacities.sum())


def fetch(leaves: list[Tensor], slots: Tensor, shards: Shards) -> list[Tensor]:
    """Rows of tensors [C, ...] that are spread over the ranks, wherever they are.

    Args:
        leaves: the part of each tensor that is here, on any device.
        slots: [M] int64, numbers of the rows wanted here. Negative ones read some row.
        shards: where they are.

    Returns:
        [M, ...] of each, on the device of `slots`.
    """
    ranks = shards.ranks
    if ranks.name is None:
        rows = slots.clamp(min=0)
        return [_rows(leaf, rows) for leaf in leaves]
    rows = (ranks.gather(slots) - shards.first).clamp(0, leaves[0].shape[0] - 1)
    owner = torch.clamp(slots, min=0) // shards.chunk
    place = torch.arange(slots.shape[0], device=slots.device)
    received = ranks.exchange_all(*(_rows(leaf, rows) for leaf in leaves))
    return [ranks.by_rank(values)[owner, place] for values in received]


def in_order(gathered: Tensor, positives: int, ranks: Ranks) -> Tensor:
    """Documents of all ranks, [size * N, ...]: first the positives of their queries, then the others."""
    of_ranks = ranks.by_rank(gathered)
    if of_ranks.shape[1] == positives:
        return gathered
    return torch.cat([of_ranks[:, :positives].flatten(0, 1), of_ranks[:, positives:].flatten(0, 1)])


def _rows(leaf: Tensor, rows: Tensor) -> Tensor:
    return moved(leaf[moved(rows, leaf.device)], rows.device)


class _Announcing:
    """Tells the other ranks of an error here; they hear of it in `agree`."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, (ValueError, TypeError)):
            group = _group(cast(str, self.ranks.name))
            _gather_rows(torch.tensor([1] + [0] * (len(_FIELDS) + 1), device=_device_of(group)), group)
            _raise_for_all(group, f"{type(error).__name__}: {error}", own=True)


def _group(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(GroupName(name))


def _device_of(group: dist.ProcessGroup) -> torch.device:
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _gather_rows(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n] -> [ranks, n]."""
    rows = row.new_empty(group.size() * row.shape[0])
    _all_gather(rows, row, group=group)
    return rows.view(group.size(), row.shape[0])


def _raise_for_all(group: dist.ProcessGroup, error: str | None, *, own: bool = False) -> None:
    """Raises what went wrong on other ranks; what went wrong here is already being raised."""
    errors: list[str | None] = [None] * group.size()
    dist.all_gather_object(errors, error, group=group)
    if not own:
        told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None)
        raise ValueError(f"another rank of the group was given something wrong. {told}")


@torch.library.custom_op("negcache_fn::agree", mutates_args=())
def _agree_op(tensor: Tensor, marks: Tensor, sizes: list[int], options: str, name: str) -> tuple[Tensor, Tensor]:
    group = _group(name)
    head = torch.tensor([0, zlib.crc32(options.encode()), *sizes], device=marks.device)
    rows = _gather_rows(torch.cat([head, marks]), group)
    failed, digests, *columns = cast("list[list[int]]", rows.t().tolist())
    if any(failed):
        _raise_for_all(group, None)
    for field, column in zip(_FIELDS, columns, strict=True):
        if field != "capacity" and len(set(column)) > 1:
            hint = " (drop_last=True, or pad the last batch)" if field in ("queries", "documents") else ""
            raise ValueError(
                f"{field} differs between the ranks of the group: {column}; expected the same on every rank{hint}"
            )
    if len(set(digests)) > 1:
        told: list[str | None] = [None] * group.size()
        dist.all_gather_object(told, options, group=group)
        raise ValueError(
            f"the ranks of the group were given different arguments: {told}; expected the same on every rank"
        )
    _check_capacities(columns[0], options.split()[0])
    return tensor.clone(), rows[:, 2].clone()


def _check_capacities(capacities: list[int], placement: str) -> None:
    chunk, last = capacities[0], capacities[-1]
    if placement == "replicated":
        if len(set(capacities)) > 1:
            raise ValueError(f"the caches of the ranks have {capacities} slots; expected the same on every rank")
        return
    equal = all(part == chunk for part in capacities[:-1]) and last <= chunk
    if not equal or chunk % SHARD_MULTIPLE or last % SHARD_MULTIPLE:
        raise ValueError(
            f"the shards of the ranks have {capacities} slots; expected multiples of {SHARD_MULTIPLE}, the same on "
            f"every rank but the last, which may have fewer: negcache_fn.distributed.local_capacity(...) gives them"
        )


@_agree_op.register_fake
def _(tensor: Tensor, marks: Tensor, sizes: list[int], options: str, name: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tensor), marks.new_empty(dist.get_world_size(_group(name)))


def _identity_gradient(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return gradient, None, None, None, None


_agree_op.register_autograd(_identity_gradient)


def _bytes(values: Tensor) -> Tensor:
    """Contiguous, as bytes: gloo does not send every type, and they are only moved."""
    return values.contiguous().view(torch.uint8)


@torch.library.custom_op("negcache_fn::all_gather", mutates_args=())
def _all_gather_op(values: Tensor, name: str, size: int) -> Tensor:
    gathered = values.new_empty(size * values.shape[0], *values.shape[1:])
    _all_gather(_bytes(gathered), _bytes(values), group=_group(name))
    return gathered


@_all_gather_op.register_fake
def _(values: Tensor, name: str, size: int) -> Tensor:
    return values.new_empty(size * values.shape[0], *values.shape[1:])


@torch.library.custom_op("negcache_fn::reduce_scatter", mutates_args=())
def _reduce_scatter_op(values: Tensor, name: str, size: int) -> Tensor:
    wide = values.to(torch.promote_types(values.dtype, torch.float32)).contiguous()
    scattered = wide.new_empty(wide.shape[0] // size, *wide.shape[1:])
    _reduce_scatter(scattered, wide, group=_group(name))
    return scattered.to(values.dtype)


@_reduce_scatter_op.register_fake
def _(values: Tensor, name: str, size: int) -> Tensor:
    return values.new_empty(values.shape[0] // size, *values.shape[1:])


@torch.library.custom_op("negcache_fn::all_to_all", mutates_args=())
def _all_to_all_op(values: Tensor, name: str) -> Tensor:
    received = torch.empty_like(values, memory_format=torch.contiguous_format)
    dist.all_to_all_single(_bytes(received), _bytes(values), group=_group(name))
    return received


@_all_to_all_op.register_fake
def _(values: Tensor, name: str) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _packed(values: list[Tensor], parts: int) -> Tensor:
    """[parts, bytes]: of each tensor the first n / parts rows, then the next."""
    return torch.cat([_bytes(tensor).view(parts, -1) for tensor in values], dim=1)


def _unpacked(packed: Tensor, like: list[Tensor], rows: list[int]) -> list[Tensor]:
    """The tensors of [parts, bytes], each with so many rows in all."""
    sizes = [row_bytes(tensor) * count // packed.shape[0] for tensor, count in zip(like, rows, strict=True)]
    unpacked: list[Tensor] = []
    for columns, tensor, count in zip(torch.split(packed, sizes, dim=1), like, rows, strict=True):
        unpacked.append(
            columns.clone(memory_format=torch.contiguous_format)
            .view(-1)
            .view(tensor.dtype)
            .view(count, *tensor.shape[1:])
        )
    return unpacked


def row_bytes(tensor: Tensor) -> int:
    """Of one of its rows."""
    return tensor.element_size() * math.prod(tensor.shape[1:])


@torch.library.custom_op("negcache_fn::all_gather_packed", mutates_args=())
def _all_gather_packed_op(values: list[Tensor], name: str, size: int) -> list[Tensor]:
    packed = _packed(values, 1)
    gathered = packed.new_empty(size, packed.shape[1])
    if packed.shape[1] > 0:
        _all_gather(gathered.view(-1), packed.view(-1), group=_group(name))
    return _unpacked(gathered, values, [size * tensor.shape[0] for tensor in values])


@_all_gather_packed_op.register_fake
def _(values: list[Tensor], name: str, size: int) -> list[Tensor]:
    return [tensor.new_empty(size * tensor.shape[0], *tensor.shape[1:]) for tensor in values]


@torch.library.custom_op("negcache_fn::all_to_all_packed", mutates_args=())
def _all_to_all_packed_op(values: list[Tensor], name: str, size: int) -> list[Tensor]:
    packed = _packed(values, size)
    received = torch.empty_like(packed)
    dist.all_to_all_single(received, packed, group=_group(name))
    return _unpacked(received, values, [tensor.shape[0] for tensor in values])


@_all_to_all_packed_op.register_fake
def _(values: list[Tensor], name: str, size: int) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in values]


@torch.library.custom_op("negcache_fn::all_reduce", mutates_args=())
def _all_reduce_op(values: Tensor, operation: str, name: str) -> Tensor:
    reduced = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX, group=_group(name))
    return reduced


@_all_reduce_op.register_fake
def _(values: Tensor, operation: str, name: str) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _all_gather_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return cast(Tensor, _reduce_scatter_op(gradient, *ctx.arguments)), None, None


def _all_to_all_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return cast(Tensor, _all_to_all_op(gradient, *ctx.arguments)), None


_all_gather_op.register_autograd(_all_gather_gradient, setup_context=_keep_arguments)
_all_to_all_op.register_autograd(_all_to_all_gradient, setup_context=_keep_arguments)
