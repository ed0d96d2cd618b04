"""Hard negatives that are mined with the model in training: a dataset that changes, and what changes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.util import semantic_search
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState

from examples.reverse_dictionary.data import Pair

__all__ = ["Mined", "in_order"]

_HARDEST = 10  # documents of a query, apart from its own, one of which becomes its negative


class Mined(TrainerCallback):
    """Mines before the first step and again in the middle, each time for the queries that come next.

    The idea is that of ANCE (Xiong et al., ICLR 2021): negatives from the whole corpus, searched with a recent model.
    """

    def __init__(
        self, model: SentenceTransformer, entries: Sequence[Pair], batch_size: int, steps: int, seed: int
    ) -> None:
        """Entries are those that train; they come in an order of their own, each once."""
        self.model, self.batch_size, self.half = model, batch_size, steps // 2 * batch_size
        self.definitions = [entry.definition for entry in entries]
        self.documents = [entry.document for entry in entries]
        self.order = np.random.default_rng(seed).permutation(len(entries))[: steps * batch_size]
        self.negative = np.zeros(len(entries), dtype=np.int64)

    @property
    def dataset(self) -> Dataset:
        """Definition, entry, and the negative that is mined by then."""

        def rows(batch: dict[str, list[int]]) -> dict[str, list[str]]:
            return {
                "definition": [self.definitions[row] for row in batch["row"]],
                "entry": [self.documents[row] for row in batch["row"]],
                "negative": [self.documents[self.negative[row]] for row in batch["row"]],
            }

        return Dataset.from_dict({"row": self.order.tolist()}).with_transform(rows)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mines with the model before training."""
        self._mine(self.order[: self.half])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mines in the middle."""
        if state.global_step * self.batch_size == self.half:
            self._mine(self.order[self.half :])

    def _mine(self, rows: np.ndarray) -> None:
        training = self.model.training
        documents = self.model.encode(self.documents, convert_to_tensor=True, batch_size=256, show_progress_bar=False)
        queries = self.model.encode(
            [self.definitions[row] for row in rows], convert_to_tensor=True, batch_size=256, show_progress_bar=False
        )
        chance = np.random.default_rng(len(rows))
        for row, hits in zip(rows, semantic_search(queries, documents, top_k=_HARDEST + 1), strict=True):
            others = [int(hit["corpus_id"]) for hit in hits if hit["corpus_id"] != row]
            self.negative[row] = chance.choice(others[:_HARDEST])
        self.model.train(training)


def in_order(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> DefaultBatchSampler:
    """Batches of the rows as they come."""
    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)
