"""Monitoring: how old the cached embeddings are, as counts that can be logged.

Ages are whole steps, and so are the edges of the bins: every live slot is in exactly one bin, and no count depends on
rounding.
"""

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.state import check_state, scalar, stored
from negcache_fn._checks import check_size
from negcache_fn._ranks.agree import check_ranks_agree, checking_arguments
from negcache_fn._ranks.group import ranks_of

__all__ = ["age_histogram", "bin_width", "count_ages"]


def age_histogram(
    state: TensorDictBase, *, bins: int = 10, group: torch.distributed.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """A histogram of ages: `counts[i]` live slots have `edges[i] <= step - embedded_at < edges[i + 1]`.

    All bins have the same width, the smallest whole number of steps with which they reach the oldest embedding.

    Args:
        state: the cache.
        bins: number of bins.
        group: ranks over which the cache is sharded: the histogram covers the whole cache. A replicated cache needs no
            group.

    Returns:
        Counts [bins] int64 and edges [bins + 1] int64 in steps, from 0. For an empty cache all counts are 0.

    Raises:
        ValueError, TypeError: `bins` is not a positive integer; with a group, ranks that differ in it.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> for _ in range(3):
        ...     state = update(state, torch.ones(2, 3), torch.ones(2, 4))
        >>> age_histogram(state, bins=4)
        (tensor([0, 2, 2, 2]), tensor([0, 1, 2, 3, 4]))
    """
    ranks = ranks_of(group)
    with checking_arguments(ranks):
        check_state(state)
        check_size("bins", bins)
    embedded_at = stored(state, "embedded_at")
    now, _ = check_ranks_agree(
        ranks,
        scalar(state, "step").view(1, 1),
        embedded_at.shape[0],
        function="age_histogram",
        name="state['step']",
        numbers={"bins": bins},
        seed_and_step=(scalar(state, "seed"), scalar(state, "step")),
    )
    width = ranks.all_max(bin_width(embedded_at, now.view(1), bins))
    counts = ranks.all_sum(count_ages(embedded_at, now.view(1), width, bins))
    return counts, torch.arange(bins + 1, device=counts.device) * width


def bin_width(written_at: Tensor, now: Tensor, bins: int) -> Tensor:
    """[1] the least width in steps with which the bins reach the age of every slot written at [C], `now` being [1]."""
    ages = torch.where(written_at >= 0, now - written_at, 0)
    return ages.max() // bins + torch.ones_like(now)


def count_ages(written_at: Tensor, now: Tensor, width: Tensor, bins: int) -> Tensor:
    """[bins] int64: live slots by age, `width` [1] steps a bin."""
    places = torch.where(written_at >= 0, (now - written_at) // width, bins)  # empty slots into a bin of their own
    return places.new_zeros(bins + 1).scatter_add_(0, places, torch.ones_like(places))[:bins]
