"""The functions of the standard library and the sentences that describe them, as Lightning takes them."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from examples.code_search.corpus import load_or_harvest
from examples.code_search.data import Data

__all__ = ["Batch", "CodeSearchData", "loader", "standard_library"]

Batch = dict[str, "Tensor | dict[str, Tensor]"]


class CodeSearchData(Dataset[Batch]):
    """Item n is the batch of step n, a function of the seed and n alone."""

    def __init__(self, roots: list[Path], file: Path, *, batch_size: int, seed: int = 0) -> None:
        self.data = Data(load_or_harvest(roots, file))
        self.batch_size = batch_size
        self.seed = seed

    def __getitem__(self, step: int) -> Batch:
        # As many random functions as positives, so that the cache also gets what nobody asks for.
        batch = self.data.batch(self.seed, step, batch_size=self.batch_size, random_documents=self.batch_size)
        return {"queries": batch.queries, "documents": batch.documents, "ids": batch.ids}


class StepsOfEpoch(Sampler[int]):
    """The numbers of an epoch's steps, counted from the start of the run."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which Lightning calls, in a resumed run after it asked for the iterator and before the first step."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[int]:
        yield from range(self.epoch * self.steps, (self.epoch + 1) * self.steps)


def loader(dataset: CodeSearchData, *, steps_per_epoch: int) -> DataLoader[Batch]:
    """Batches in the order of their steps; a resumed run goes on with those that come next."""
    return DataLoader(dataset, batch_size=None, sampler=StepsOfEpoch(steps_per_epoch))


def standard_library() -> list[Path]:
    """Of the running interpreter."""
    return [Path(sysconfig.get_paths()["stdlib"]).resolve()]
