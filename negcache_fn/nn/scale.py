"""The scale of inner products as a module: a number, or learnable."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from negcache_fn._ranks.group import Ranks, ranks_of

__all__ = ["Scale"]


class Scale(nn.Module):
    """The scale of inner products, a number or learnable.

    Args:
        scale: above 0.
        learnable: whether its logarithm is a parameter.

    Raises:
        ValueError, TypeError: a scale that is not a number above 0.

    Examples:
        >>> Scale(20.0)()
        20.0
        >>> Scale(20.0, learnable=True)().requires_grad
        True
    """

    logarithm: nn.Parameter | None

    def __init__(self, scale: float, *, learnable: bool = False) -> None:
        super().__init__()
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not check types
            raise TypeError(f"scale is {scale!r}, a {type(scale).__name__}; expected a number above 0")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}; expected a number above 0")
        self.fixed = scale
        self.logarithm = nn.Parameter(torch.tensor(math.log(scale))) if learnable else None

    def forward(self, group: torch.distributed.ProcessGroup | None = None) -> float | Tensor:
        """The number or, if learnable, a 0-d tensor, whose gradient is averaged over the ranks of the group."""
        if self.logarithm is None:
            return self.fixed
        scale = self.logarithm.exp()
        return scale if group is None else cast(Tensor, _AverageGradient.apply(scale, ranks_of(group)))

    def extra_repr(self) -> str:
        """The scale, for `print`."""
        return f"{self.fixed}" if self.logarithm is None else f"{float(self.logarithm.detach().exp()):.4g}, learnable"


class _AverageGradient(torch.autograd.Function):
    """The identity, whose gradient is averaged over the ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ranks = ctx.ranks.afresh()  # the messages of the forward pass are over
        return ranks.all_sum(gradients[0]) / ranks.size, None
