"""Collectives as operators, around public functions of torch.distributed; the only file that calls those in a step.

As operators, they compile into one graph with the rest of a step, and nothing depends on torch's functional
collectives, which are private and change from release to release. Shapes must be the same on all ranks:
`check_ranks_agree` makes sure of that before anything else is sent.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

# There is no public way from a group's name, the only argument an operator can take, to the group.
from torch.distributed.distributed_c10d import (
    GroupName,
    _resolve_process_group,  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] - nothing public does it
)

from negcache_fn._operators import operator

__all__ = [
    "all_gather",
    "all_gather_packed",
    "all_reduce",
    "all_to_all",
    "all_to_all_packed",
    "gather_into",
    "group_named",
    "row_bytes",
]


def _either(name: str, before: str) -> Callable[..., object]:
    """A function of torch.distributed by its name since torch 2.13, or the one before."""
    return cast("Callable[..., object]", getattr(dist, name, None) or getattr(dist, before))


gather_into = _either("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _either("reduce_scatter_single", "reduce_scatter_tensor")


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    return _resolve_process_group(GroupName(name))


def row_bytes(tensor: Tensor) -> int:
    """The size of one of its rows."""
    return tensor.element_size() * math.prod(tensor.shape[1:])


def _bytes(values: Tensor) -> Tensor:
    """Contiguous, as bytes: gloo does not send every type, and they are only moved."""
    return values.contiguous().view(torch.uint8)


def _fake_reduce_scatter(values: Tensor, name: str, size: int) -> Tensor:
    return values.new_empty(values.shape[0] // size, *values.shape[1:])


@operator("reduce_scatter", fake=_fake_reduce_scatter)
def _reduce_scatter_op(values: Tensor, name: str, size: int) -> Tensor:
    wide = values.to(torch.promote_types(values.dtype, torch.float32)).contiguous()
    scattered = wide.new_empty(wide.shape[0] // size, *wide.shape[1:])
    _reduce_scatter(scattered, wide, group=group_named(name))
    return scattered.to(values.dtype)


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _fake_all_gather(values: Tensor, name: str, size: int) -> Tensor:
    return values.new_empty(size * values.shape[0], *values.shape[1:])


def _all_gather_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _reduce_scatter_op(gradient, *ctx.arguments), None, None


@operator("all_gather", fake=_fake_all_gather, gradient=_all_gather_gradient, keep=_keep_arguments)
def all_gather(values: Tensor, name: str, size: int) -> Tensor:
    """[n, ...] -> [size * n, ...]. Differentiable."""
    gathered = values.new_empty(size * values.shape[0], *values.shape[1:])
    gather_into(_bytes(gathered), _bytes(values), group=group_named(name))
    return gathered


def _fake_all_to_all(values: Tensor, name: str) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _all_to_all_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return all_to_all(gradient, *ctx.arguments), None


@operator("all_to_all", fake=_fake_all_to_all, gradient=_all_to_all_gradient, keep=_keep_arguments)
def all_to_all(values: Tensor, name: str) -> Tensor:
    """[size * n, ...] -> [size * n, ...]: the r-th n rows go to rank r. Differentiable."""
    received = torch.empty_like(values, memory_format=torch.contiguous_format)
    dist.all_to_all_single(_bytes(received), _bytes(values), group=group_named(name))
    return received


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


def _fake_all_gather_packed(values: list[Tensor], name: str, size: int) -> list[Tensor]:
    return [tensor.new_empty(size * tensor.shape[0], *tensor.shape[1:]) for tensor in values]


@operator("all_gather_packed", fake=_fake_all_gather_packed)
def all_gather_packed(values: list[Tensor], name: str, size: int) -> list[Tensor]:
    """`all_gather` of each in one message, without gradient."""
    packed = _packed(values, 1)
    gathered = packed.new_empty(size, packed.shape[1])
    if packed.shape[1] > 0:
        gather_into(gathered.view(-1), packed.view(-1), group=group_named(name))
    return _unpacked(gathered, values, [size * tensor.shape[0] for tensor in values])


def _fake_all_to_all_packed(values: list[Tensor], name: str, size: int) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in values]


@operator("all_to_all_packed", fake=_fake_all_to_all_packed)
def all_to_all_packed(values: list[Tensor], name: str, size: int) -> list[Tensor]:
    """`all_to_all` of each in one message, without gradient."""
    packed = _packed(values, size)
    received = torch.empty_like(packed)
    dist.all_to_all_single(received, packed, group=group_named(name))
    return _unpacked(received, values, [tensor.shape[0] for tensor in values])


def _fake_all_reduce(values: Tensor, operation: str, name: str) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@operator("all_reduce", fake=_fake_all_reduce)
def all_reduce(values: Tensor, operation: str, name: str) -> Tensor:
    """The "sum" or "max" over the ranks, without gradient."""
    reduced = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX, group=group_named(name))
    return reduced
