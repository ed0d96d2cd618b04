"""The scale of inner products as a module: a number, or learnable."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from negcache_fn._checks import check_flag
from negcache_fn._ranks.group import Ranks, ranks_of

__all__ = ["Scale"]


class Scale(nn.Module):
    """The scale of inner products, a number or learnable.

    A learnable scale has its logarithm as the parameter. The parameter stays float32 or wider when the module is cast,
    because the steps of an optimizer vanish in the 8 bits of bfloat16. Weight decay would pull the scale towards 1. The
    Trainer of transformers leaves the parameter out of weight decay, because its name contains "bias". In other
    training loops, leave it out yourself, as below.

    Args:
        scale: above 0.
        learnable: whether its logarithm is a parameter.
        max_scale: upper bound of a learnable scale, as in CLIP.

    Raises:
        ValueError, TypeError: a scale that is not a number above 0; a learnable one above `max_scale`.

    Examples:
        >>> Scale(20.0)()
        20.0
        >>> scale = Scale(20.0, learnable=True)
        >>> scale().requires_grad
        True
        >>> groups = [{"params": list(scale.parameters()), "weight_decay": 0.0}]
        >>> optimizer = torch.optim.AdamW([*groups, {"params": list(torch.nn.Linear(3, 4).parameters())}])

    Reference: Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021,
    section 2.5 (the bound).
    """

    log_scale_bias: nn.Parameter | None

    def __init__(self, scale: float, *, learnable: bool = False, max_scale: float = 100.0) -> None:
        super().__init__()
        for name, value in (("scale", scale), ("max_scale", max_scale)):
            _check_positive(name, value)
        check_flag("learnable", learnable)
        if learnable and scale > max_scale:
            raise ValueError(f"scale is {scale}; expected at most max_scale, which is {max_scale}")
        self.fixed = scale
        self.max_scale = max_scale
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # see `_apply`
        value = torch.tensor(math.log(scale), dtype=dtype)
        self.log_scale_bias = nn.Parameter(value) if learnable else None

    @property
    def logarithm(self) -> nn.Parameter | None:
        """The parameter; None if the scale is a number."""
        return self.log_scale_bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def apply(value: Tensor) -> Tensor:
            new = fn(value)
            return new if new.dtype.itemsize >= torch.float32.itemsize else value.to(new.device)

        return super()._apply(apply, recurse)

    def forward(self, group: torch.distributed.ProcessGroup | None = None) -> float | Tensor:
        """The number or, if learnable, a 0-d tensor, whose gradient is averaged over the ranks of the group."""
        if self.log_scale_bias is None:
            return self.fixed
        value, most = self.log_scale_bias, math.log(self.max_scale)
        # Folded at the bound, not cut: a step past it leads back below, and no gradient is lost.
        scale = torch.where(value > most, 2 * most - value, value).exp()
        return scale if group is None else cast(Tensor, _AverageGradient.apply(scale, ranks_of(group)))

    def extra_repr(self) -> str:
        """The scale, for `print`."""
        with torch.no_grad():
            return f"{self.fixed}" if self.log_scale_bias is None else f"{float(self()):.4g}, learnable"


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected a number above 0")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; expected a number above 0")


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
