"""Order for work that a compiler could reorder: neither side needs the other's result, but one must come first."""

from typing import Any

import torch
from torch import Tensor

from negcache_fn._operators import operator

__all__ = ["sequenced_after"]


def sequenced_after(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, for work that a compiler must not start before `other` is computed.

    Differentiable: in the backward pass, the gradient of `other` waits for the gradient of `tensor`.
    """
    if not torch.compiler.is_compiling():
        return tensor
    return _sequenced_after_op(tensor, other if tensor.requires_grad else other.detach())


def _fake_like_first(first: Tensor, other: Tensor) -> Tensor:
    return torch.empty_like(first)


@operator("zeros_after", fake=_fake_like_first)
def _zeros_after_op(like: Tensor, other: Tensor) -> Tensor:
    return torch.zeros_like(like)


def _keep_other(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
    (other,) = ctx.saved_tensors
    return gradient, _zeros_after_op(other, gradient) if ctx.needs_input_grad[1] else None


@operator("after", fake=_fake_like_first, gradient=_gradient, keep=_keep_other)
def _sequenced_after_op(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.clone()
