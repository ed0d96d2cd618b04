"""The ranks of a process group, and the slots of a cache that each of them holds.

`Ranks` is a process group or, with `ALONE`, none: then every collective is the identity, so sharded code also runs
unsharded. `Shards` describes the place of the slots: of all slots, rank r has the numbers
`r * chunk ... (r + 1) * chunk - 1`, and the last rank the remaining ones.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from negcache_fn._features import moved
from negcache_fn._kernels.blocks import GROUP
from negcache_fn._ranks.operators import all_gather, all_gather_packed, all_reduce, all_to_all, all_to_all_packed
from negcache_fn._ranks.order import sequenced_after

__all__ = ["ALONE", "SHARD_MULTIPLE", "Ranks", "Shards", "fetch_rows", "positives_first", "ranks_of", "unsharded"]

SHARD_MULTIPLE = GROUP  # slots: a group of the hierarchical draw must lie on one rank


class Ranks(NamedTuple):
    """A process group as this process sees it."""

    name: str | None  # of the group; None: this process is alone
    rank: int
    size: int
    last: dict[bool, Tensor]  # part of the last message received with a gradient, and of the last one without

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] -> [size * n, ...]: the values of all ranks, in their order. Differentiable."""
        if self.name is None:
            return values
        return self._received(all_gather(self._in_turn(values), self.name, self.size))

    def gather_all(self, *values: Tensor) -> list[Tensor]:
        """`gather` of each, in one message and without gradient."""
        if self.name is None:
            return list(values)
        sent = [self._in_turn(values[0].detach()), *values[1:]]
        received = all_gather_packed(sent, self.name, self.size)
        self._received(received[0])
        return received

    def exchange(self, values: Tensor) -> Tensor:
        """[size * n, ...] -> [size * n, ...]: the r-th n rows go to rank r and come from it. Differentiable."""
        if self.name is None:
            return values
        return self._received(all_to_all(self._in_turn(values), self.name))

    def exchange_all(self, *values: Tensor) -> list[Tensor]:
        """`exchange` of each, in one message and without gradient."""
        if self.name is None:
            return list(values)
        sent = [self._in_turn(values[0].detach()), *values[1:]]
        received = all_to_all_packed(sent, self.name, self.size)
        self._received(received[0])
        return received

    def all_sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, without gradient."""
        return self._reduce(values, "sum")

    def all_max(self, values: Tensor) -> Tensor:
        """The maximum over the ranks, without gradient."""
        return self._reduce(values, "max")

    def afresh(self) -> "Ranks":
        """The same ranks, before any message."""
        return Ranks(self.name, self.rank, self.size, {})

    def by_rank(self, values: Tensor) -> Tensor:
        """[size * n, ...] -> [size, n, ...]."""
        return values.view(self.size, values.shape[0] // self.size, *values.shape[1:])

    def own(self, values: Tensor) -> Tensor:
        """[size * n, ...] -> [n, ...]: this rank's part of gathered values."""
        rows = values.shape[0] // self.size
        return values[self.rank * rows : (self.rank + 1) * rows]

    def _reduce(self, values: Tensor, operation: str) -> Tensor:
        if self.name is None:
            return values
        return self._received(all_reduce(self._in_turn(values.detach()), operation, self.name))

    def _in_turn(self, values: Tensor) -> Tensor:
        """The values, to be sent after the last message has arrived; their gradients in reverse order.

        A compiler may order independent messages differently on each rank, and then they would not match.
        """
        for last in self.last.values():
            values = sequenced_after(values, last)
        return values

    def _received(self, values: Tensor) -> Tensor:
        self.last[values.requires_grad] = values.flatten()[:1]  # one number has to wait for as long as all of them
        return values


class Shards(NamedTuple):
    """The place of the slots."""

    ranks: Ranks  # that hold a part each
    first: int | Tensor  # number of the first slot here
    chunk: int | Tensor  # slots of every rank but the last
    capacity: int | Tensor  # of all

    def numbered(self, slots: Tensor) -> Tensor:
        """The slots of this rank, or -1, as numbers among all."""
        return slots if self.ranks.name is None else torch.where(slots >= 0, slots + self.first, -1)

    def local(self, numbers: Tensor, capacity: int) -> Tensor:
        """The slots among the `capacity` of this rank that have these numbers among all, -1 where it is another's."""
        if self.ranks.name is None:
            return numbers
        slots = numbers - self.first
        return torch.where((numbers >= 0) & (slots >= 0) & (slots < capacity), slots, -1)


ALONE = Ranks(None, 0, 1, {})


def unsharded(capacity: int) -> Shards:
    """All slots are here."""
    return Shards(ALONE, 0, capacity, capacity)


def ranks_of(group: Any) -> Ranks:
    """The ranks of a process group; `ALONE` without one."""
    if group is None:
        return ALONE
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}; expected a torch.distributed process group, such as "
            f"torch.distributed.group.WORLD after init_process_group(...), on a rank that is in it"
        )
    return Ranks(str(group.group_name), group.rank(), group.size(), {})


def fetch_rows(leaves: list[Tensor], slots: Tensor, shards: Shards) -> list[Tensor]:
    """Rows of tensors [C, ...] that are spread over the ranks, from any rank.

    Args:
        leaves: this rank's part of each tensor, on any device.
        slots: [M] int64, numbers of the rows to fetch. Negative ones read some row.
        shards: the place of the slots.

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


def positives_first(gathered: Tensor, positives: int, ranks: Ranks) -> Tensor:
    """Documents of all ranks, [size * N, ...]: first the `positives` of each rank, then the others."""
    of_ranks = ranks.by_rank(gathered)
    if of_ranks.shape[1] == positives:
        return gathered
    return torch.cat([of_ranks[:, :positives].flatten(0, 1), of_ranks[:, positives:].flatten(0, 1)])


def _rows(leaf: Tensor, rows: Tensor) -> Tensor:
    return moved(leaf[moved(rows, leaf.device)], rows.device)
