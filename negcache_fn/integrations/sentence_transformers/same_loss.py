"""Whether all ranks are in the same loss: with one for each data set, their batches may be of different data sets.

Losses have the numbers in which they were made, which is the same order on every rank.
"""

import itertools

import torch
import torch.distributed as dist

from negcache_fn._ranks.agree import check_ranks_agree, device_of
from negcache_fn._ranks.group import ranks_of
from negcache_fn.nn import Scale

__all__ = ["check_same_loss", "next_number"]

_NUMBERS = itertools.count()


def next_number() -> int:
    """For a loss that is being made."""
    return next(_NUMBERS)


def check_same_loss(
    number: int, scaling: Scale, *, sharing: dist.ProcessGroup | None, everyone: dist.ProcessGroup | None
) -> None:
    """Raises on every rank unless all are in one loss, where they share a cache, or average the gradient of a scale.

    Args:
        number: of the loss here.
        scaling: its scale.
        sharing: the ranks that share its cache, if they do.
        everyone: all ranks, if there are several.
    """
    averaged = scaling.logarithm is not None and torch.is_grad_enabled()
    group = everyone if averaged else sharing
    if group is not None:
        nothing = torch.zeros(1, 1, device=device_of(group))
        function, numbers = "NegativeCacheLoss", {"loss": number}
        check_ranks_agree(ranks_of(group), nothing, 0, function=function, numbers=numbers)
