"""The training data as tensors, and the batch of every step.

A batch is a function of (seed, step) alone, so that an interrupted run goes on with the batches it would have had. An
epoch is a permutation of the queries; what does not fill its last batch waits for another epoch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from examples.msmarco.formats import Collection, read_judgements
from examples.msmarco.texts import Texts, tokenized
from examples.msmarco.triples import indexed_triples

__all__ = ["Batch", "Data", "Judgements", "TrainingSet"]


@dataclass(frozen=True)
class Batch:
    """B queries, and N >= B passages of which row i < B answers query i."""

    queries: Tensor
    """[B, width] int32 token ids, as wide as the longest."""
    passages: dict[str, Tensor]
    """``input_ids`` [N, width] int32, as wide as the cache stores them."""
    ids: Tensor
    """[N] int64, the passages' rows in the collection."""
    positives: Tensor
    """[B, P] int64: all passages that answer each query, -1 where there are fewer."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        passages = {name: value.to(device) for name, value in self.passages.items()}
        return Batch(self.queries.to(device), passages, self.ids.to(device), self.positives.to(device))


@dataclass(frozen=True)
class Judgements:
    """J pairs of a query and a passage, sorted by query and then by passage."""

    queries: NDArray[np.int64]
    """[J] rows of the split's queries."""
    passages: NDArray[np.int64]
    """[J] rows of the collection."""
    grades: NDArray[np.int64]
    """[J] above 0: relevant."""

    def relevant(self, least: int = 1) -> Judgements:
        """Those of at least this grade."""
        return self._where(self.grades >= least)

    def of(self, queries: NDArray[np.int64]) -> Judgements:
        """Those of some queries."""
        return self._where(np.isin(self.queries, queries))

    def _where(self, kept: NDArray[np.bool_]) -> Judgements:
        return Judgements(self.queries[kept], self.passages[kept], self.grades[kept])


class Data:
    """A collection, tokenised."""

    def __init__(
        self,
        collection: Collection,
        tokenizer: PreTrainedTokenizerBase,
        *,
        query_tokens: int,
        passage_tokens: int,
        store: Path,
    ) -> None:
        self.collection = collection
        self.padding: int = tokenizer.pad_token_id
        self.query_tokens, self.passage_tokens = query_tokens, passage_tokens
        self.store = store
        self._tokenizer = tokenizer
        self.passages = tokenized(collection.passages, tokenizer, passage_tokens, store)

    def queries(self, split: str) -> Texts:
        """The split's queries, and perhaps others."""
        return tokenized(self.collection.queries(split), self._tokenizer, self.query_tokens, self.store)

    def judgements(self, split: str, queries: Texts) -> Judgements:
        """Which passages answer which queries.

        Raises:
            ValueError: a judgement of a query or passage that there is not, or of a pair judged before; with its line.
        """
        file = self.collection.judgements(split)
        read = list(read_judgements(file))
        found = Judgements(
            queries.rows_of([judgement.query for judgement in read]),
            self.passages.rows_of([judgement.passage for judgement in read]),
            np.array([judgement.grade for judgement in read], np.int64),
        )
        for kind, rows, source in (
            ("query", found.queries, self.collection.queries(split)),
            ("passage", found.passages, self.collection.passages),
        ):
            if (missing := np.flatnonzero(rows < 0)).size:
                judgement = read[missing[0]]
                name = judgement.query if kind == "query" else judgement.passage
                raise ValueError(f"{file}:{judgement.line}: there is no {kind} {name!r} in {source.name}")
        order = np.lexsort((found.passages, found.queries))
        ordered = Judgements(found.queries[order], found.passages[order], found.grades[order])
        again = np.flatnonzero((np.diff(ordered.queries) == 0) & (np.diff(ordered.passages) == 0))
        if again.size:
            judgement = read[order[again[0] + 1]]
            pair = f"query {judgement.query!r} and passage {judgement.passage!r}"
            raise ValueError(
                f"{file}:{judgement.line}: {pair} have been judged before; expected one line for each pair"
            )
        if not (found.grades > 0).any():
            raise ValueError(f"{file} has no passage of a grade above 0; expected some that answer a query")
        return ordered

    def features(self, passages: NDArray[np.int64]) -> dict[str, Tensor]:
        """What the passage encoder takes, and the cache stores."""
        return {"input_ids": self.passages.padded(passages, self.padding, self.passage_tokens)}


class TrainingSet:
    """The queries to train on, what answers them, and the batches of both."""

    def __init__(
        self, data: Data, *, batch_size: int, random_passages: int, seed: int, triples: Path | None = None
    ) -> None:
        self.data = data
        self.batch_size, self.random_passages, self.seed = batch_size, random_passages, seed
        self.texts = data.queries("train")
        judged = data.judgements("train", self.texts).relevant()
        self._queries, starts = np.unique(judged.queries, return_index=True)
        self._starts = np.append(starts, len(judged.queries))
        self._passages = judged.passages
        needed = batch_size * (1 if triples is None else 2) + random_passages
        if len(self._queries) < batch_size or len(data.passages) < needed:
            raise ValueError(
                f"there are {len(self._queries)} queries with an answer and {len(data.passages)} passages; a step "
                f"takes {batch_size} and {needed}: give a smaller --batch-size or --random-passages"
            )
        self._triples = None if triples is None else indexed_triples(triples, self.texts, data.passages, data.store)
        judgements = np.stack([judged.queries, judged.passages])
        self.key = hashlib.blake2b(judgements.tobytes(), digest_size=8).hexdigest()
        """Changes with what answers what."""
        self._epoch = -1
        self._shuffled = np.zeros(0, np.int64)

    def batch(self, step: int) -> Batch:
        """The batch of a step: a random positive of each query, then random passages of the collection.

        With triples: query and positive of random triples, and their negatives before the random passages.
        """
        generator = np.random.default_rng((self.seed, 1, step))
        if self._triples is None:
            chosen = self._shuffled_queries(step)
            counts = self._starts[chosen + 1] - self._starts[chosen]
            queries, own = self._queries[chosen], self._passages[self._starts[chosen] + generator.integers(counts)]
            mined = own[:0]
        else:
            triples = self._triples[generator.integers(len(self._triples), size=self.batch_size)]
            queries, own, mined = triples.astype(np.int64).T
        others = generator.integers(len(self.data.passages), size=self.random_passages)
        ids = np.concatenate([own, mined, others])
        return Batch(
            queries=self.texts.padded(queries, self.data.padding),
            passages=self.data.features(ids),
            ids=torch.from_numpy(ids),
            positives=torch.from_numpy(self._positives(queries)),
        )

    def _positives(self, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B, P] the passages that answer each of some queries, -1 where there are fewer."""
        place = np.searchsorted(self._queries, queries).clip(max=len(self._queries) - 1)
        counts = np.where(self._queries[place] == queries, self._starts[place + 1] - self._starts[place], 0)
        column = np.arange(counts.max())
        at = np.minimum(self._starts[place][:, None] + column, len(self._passages) - 1)
        return np.where(column < counts[:, None], self._passages[at], -1)

    def _shuffled_queries(self, step: int) -> NDArray[np.int64]:
        """[B] places in the list of queries."""
        epoch, place = divmod(step, len(self._queries) // self.batch_size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._shuffled = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self._queries))
        return self._shuffled[place * self.batch_size : (place + 1) * self.batch_size]
