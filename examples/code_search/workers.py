"""The processes that train together: this one alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from examples.code_search.data import Batch

__all__ = ["ALONE", "Workers", "join_workers"]

TIMEOUT = timedelta(minutes=10)
"""How long the others wait for one that hangs; of one that dies they hear at once."""


@dataclass(frozen=True)
class Workers:
    """The group as one of its processes sees it."""

    group: dist.ProcessGroup | None
    rank: int
    count: int

    @property
    def leads(self) -> bool:
        """Whether this process does what one alone must do: harvest, evaluate, print."""
        return self.rank == 0

    def part(self, batch: Batch) -> Batch:
        """This process' queries, their documents, and its part of the other documents."""
        if self.group is None:
            return batch
        queries = len(batch.queries["tokens"])
        rows = torch.cat([self._rows(0, queries), self._rows(queries, len(batch.ids))])
        asked = self._rows(0, queries)
        return Batch(
            queries={name: values[asked] for name, values in batch.queries.items()},
            documents={name: values[rows] for name, values in batch.documents.items()},
            ids=batch.ids[rows],
        )

    def mean(self, value: Tensor) -> Tensor:
        """Over all processes."""
        return self._sum(value) / self.count

    def any(self, flag: bool) -> bool:
        """Whether it is so on one of them: a decision that all must take together."""
        return bool(self._sum(torch.tensor(int(flag))))

    def wait(self) -> None:
        """Until all are here."""
        if self.group is not None:
            dist.barrier(self.group)

    def _rows(self, start: int, stop: int) -> Tensor:
        rows = torch.arange(start, stop)
        if len(rows) % self.count:
            raise ValueError(f"{len(rows)} rows of a batch cannot be parted among {self.count} processes")
        return rows.view(self.count, -1)[self.rank]

    def _sum(self, value: Tensor) -> Tensor:
        if self.group is None:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self.group)
        return total


ALONE = Workers(None, 0, 1)


@contextmanager
def join_workers() -> Iterator[Workers]:
    """The workers that torchrun started, this process among them; `ALONE` where it did not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE
        return
    environment = os.environ
    rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    # After a restart torchrun's store still has the addresses of those that died: each attempt takes keys of its own.
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False, timeout=TIMEOUT)
    store = dist.PrefixStore(f"attempt-{environment['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    group = dist.group.WORLD
    assert group is not None
    try:
        yield Workers(group, rank, count)
    finally:
        dist.destroy_process_group()
