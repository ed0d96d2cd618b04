"""Order for work that a compiler could reorder: neither side needs the other's result, but one must come first."""

from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["sequenced_after"]


def sequenced_after(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, for work that a compiler must not start before `other` is computed.

    Differentiable: in the backward pass, the gradient of `other` waits for the gradient of `tensor`.
    """
    if not torch.compiler.is_compiling():
        return tensor
    return cast(Tensor, _sequenced_after_op(tensor, other if tensor.requires_grad else other.detach()))


@torch.library.custom_op("negcache_fn::after", mutates_args=())
def _sequenced_after_op(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.clone()


@_sequenced_after_op.register_fake
def _(tensor: Tensor, other: Tensor) -> Tensor:
    return torch.empty_like(tensor)


@torch.library.custom_op("negcache_fn::zeros_after", mutates_args=())
def _zeros_after_op(like: Tensor, other: Tensor) -> Tensor:
    return torch.zeros_like(like)


@_zeros_after_op.register_fake
def _(like: Tensor, other: Tensor) -> Tensor:
    return torch.empty_like(like)


def _keep_other(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
    (other,) = ctx.saved_tensors
    return gradient, cast(Tensor, _zeros_after_op(other, gradient)) if ctx.needs_input_grad[1] else None


_sequenced_after_op.register_autograd(_gradient, setup_context=_keep_other)
