"""Activation checkpointing around a whole step: `backward` calls the step again, which must see the same state.

`step_` has written its state by then, and would draw and write once more, so it raises. `step` draws the same again, as
long as it is given the state of the first call, and not one that has replaced it in a variable.
"""

from typing import Any, cast

import torch
from torch import Tensor

from negcache_fn._checks import transforms_around

__all__ = ["check_not_recomputed", "same_when_recomputed"]


def check_not_recomputed() -> None:
    """Raises inside `torch.utils.checkpoint.checkpoint`, where a state must not be written in place.

    With `use_reentrant=True` the first call is under `no_grad` and writes nothing, so that one is right.
    """
    # There is no public way to ask. A graph is made without the hooks around it.
    if torch.compiler.is_compiling():
        return
    hooks = cast(Any, torch._C)._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportPrivateUsage] - no public way
    if hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint":
        raise ValueError(
            "step_ is called under torch.utils.checkpoint, which calls it again in the backward pass, when state is "
            "written; expected a step outside the checkpoint, whose encoder may be checkpointed "
            "(negcache_fn.chunked), or the pure `step` on a state that is kept unchanged"
        )


def same_when_recomputed(loss: Tensor, step: Tensor) -> Tensor:
    """The loss, whose backward pass raises if it was computed again from a state of another `step`."""
    if torch.compiler.is_compiling() or transforms_around() or not loss.requires_grad:
        return loss
    return cast(Tensor, _SameStep.apply(loss, step.clone()))


class _SameStep(torch.autograd.Function):
    """The identity. A recomputation replaces the saved tensor; the attribute keeps that of the first call."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, step: Tensor) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(step)
        return loss.clone()  # a view made here could not be written in place, as `loss /= 4` does

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (step,) = ctx.saved_tensors
        # The same tensor unless hooks for saved tensors are active: only then compare the values.
        if step is not ctx.step and not torch.equal(step, ctx.step):
            raise RuntimeError(
                f"the backward pass computes the step again from a state of step {int(step)}; expected that of step "
                f"{int(ctx.step)}, from which the loss is: under torch.utils.checkpoint, give `step` the state as an "
                f"argument, and replace it outside"
            )
        return gradients[0], None
