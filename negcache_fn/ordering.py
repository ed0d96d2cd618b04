"""What a compiler must not do before something else, though neither needs the other's result."""

from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["after"]


def after(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, for what a compiler must not start before `other` is there. Differentiable in `tensor`."""
    return cast(Tensor, _after_op(tensor, other.detach())) if torch.compiler.is_compiling() else tensor


@torch.library.custom_op("negcache_fn::after", mutates_args=())
def _after_op(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.clone()


@_after_op.register_fake
def _(tensor: Tensor, other: Tensor) -> Tensor:
    return torch.empty_like(tensor)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None


_after_op.register_autograd(_gradient)
