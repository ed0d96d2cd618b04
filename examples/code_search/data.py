"""The training data as tensors, and the batch of every step.

A batch is a function of (seed, step) alone, so that an interrupted run goes on with the batches it would have had, and
every method sees the same queries in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.code_search.corpus import Corpus
from examples.code_search.features import (
    DOCUMENT_WIDTH,
    QUERY_WIDTH,
    inverse_document_frequency,
    padded,
    rows_of,
)

__all__ = ["Batch", "Data"]


@dataclass(frozen=True)
class Batch:
    """B queries, and N >= B documents of which row i < B is what query i describes."""

    queries: dict[str, Tensor]
    documents: dict[str, Tensor]
    ids: Tensor
    """[N] int64, the documents' rows in the corpus."""


class Data:
    """A corpus as the encoder takes it."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.train_documents = corpus.documents_of("train")
        self.train_queries = corpus.queries_of("train")
        self.idf = inverse_document_frequency(corpus.documents, self.train_documents)
        self.documents = padded(corpus.documents, self.idf, DOCUMENT_WIDTH)
        self.queries = padded(corpus.queries, self.idf, QUERY_WIDTH)

    def batch(self, seed: int, step: int, *, batch_size: int, random_documents: int) -> Batch:
        """Queries of training modules, what they describe, and random documents of training modules besides."""
        generator = np.random.default_rng((seed, step))
        queries = generator.choice(self.train_queries, batch_size, replace=False)
        others = generator.choice(self.train_documents, random_documents, replace=False)
        documents = np.concatenate([self.corpus.query_document[queries], others])
        return Batch(
            queries=rows_of(self.queries, queries),
            documents=rows_of(self.documents, documents),
            ids=torch.from_numpy(documents),
        )

    def held_out(self, split: str, *, at_most: int | None = None) -> tuple[dict[str, Tensor], NDArray[np.int64]]:
        """The split's queries, or a fixed sample of them, and the id of the document that each describes."""
        rows = self.corpus.queries_of(split)
        if at_most is not None and len(rows) > at_most:
            rows = np.random.default_rng(0).choice(rows, at_most, replace=False)
        return rows_of(self.queries, rows), self.corpus.query_document[rows]
