"""The losses that are compared. All else is the same code: encoder, optimiser, queries and their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn import functional as F

import negcache_fn
from examples.code_search.features import rows_of
from examples.experiments.encoders import DualEncoder
from examples.experiments.tasks import Batch, Task
from negcache_fn import StepOptions

__all__ = ["CacheLearner", "Learner", "Method", "Outcome", "exhaustive_loss", "in_batch_loss", "learner"]

_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Method:
    """One way to find negatives."""

    name: str
    label: str
    loss: str
    """ "in_batch": the documents of the batch; "memory": besides them cached embeddings as constants; "cache": draws
    from a cache; "exhaustive": all training documents, encoded at every step."""
    batch: int = 16
    random: int = 0
    """Random documents that come with every batch."""
    mined: int = 0
    """Documents that come with every query from those most like it by tf-idf."""
    chunk: int | None = None
    """Encode so many documents at a time, and once more for the backward pass."""
    capacity: int | None = None
    """Slots of the cache; None: as many as there are training documents."""
    prefill: bool = True
    """Whether all slots are filled before the first step."""
    options: StepOptions = StepOptions()
    """Of the steps of "cache"; "memory" takes `in_batch` and `evict` from it, "in_batch" `in_batch` alone."""


class Outcome(NamedTuple):
    """Of one step."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Learner:
    """A method with its state, and a count of the documents that it had encoded."""

    def __init__(self, method: Method, model: DualEncoder, task: Task) -> None:
        self.method, self.model, self.task = method, model, task
        self.documents_encoded = 0

    def batch(self, seed: int, step: int, *, others: int = 0) -> Batch:
        """The step's batch, with the documents that the method wants besides."""
        method = self.method
        return self.task.batch(seed, step, method.batch, random=method.random, mined=method.mined, others=others)

    def __call__(self, batch: Batch) -> Outcome:
        """Loss of the batch; advances the state."""
        raise NotImplementedError

    def encode(self, features: Any) -> Tensor:
        """[N, D], counted."""
        self.documents_encoded += features["tokens"].shape[0]
        return self.model.encode_documents(features)


def learner(method: Method, model: DualEncoder, task: Task, seed: int) -> Learner:
    """What trains the model by the method.

    Raises:
        ValueError: an unknown loss.
    """
    if method.loss in ("memory", "cache"):
        return CacheLearner(method, model, task, seed)
    kinds = {"in_batch": _InBatch, "exhaustive": _Exhaustive}
    if method.loss not in kinds:
        raise ValueError(f"loss of {method.name} is {method.loss!r}; expected one of {[*kinds, 'memory', 'cache']}")
    return kinds[method.loss](method, model, task)


class _InBatch(Learner):
    def __call__(self, batch: Batch) -> Outcome:
        encode = self.encode
        if self.method.chunk is not None:
            encode = negcache_fn.chunked(encode, self.method.chunk)
        queries, documents = self.model.encode_queries(batch.queries), encode(batch.documents)
        loss = in_batch_loss(queries, documents, batch, self.model.scale, in_batch=self.method.options.in_batch)
        return Outcome(loss, {})


class _Exhaustive(Learner):
    def __call__(self, batch: Batch) -> Outcome:
        documents = self.encode(rows_of(self.task.documents, self.task.train_documents))
        return Outcome(exhaustive_loss(self.model, batch, documents, self.task), {})


class CacheLearner(Learner):
    """One that has a cache, its ``state``."""

    def __init__(self, method: Method, model: DualEncoder, task: Task, seed: int) -> None:
        super().__init__(method, model, task)
        self.state = self._first_state(seed)

    def _first_state(self, seed: int) -> TensorDictBase:
        task = self.task
        example = rows_of(task.documents, slice(0, 1))
        capacity = min(self.method.capacity or len(task.train_documents), len(task.train_documents))
        state = negcache_fn.init_cache(capacity, self.model.body.dim, example, seed=seed)
        if not self.method.prefill:
            return state
        rows = np.random.default_rng((seed, 0)).permutation(task.train_documents)[:capacity]
        parts = [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)]
        batches = ((rows_of(task.documents, part), torch.from_numpy(part)) for part in parts)
        return negcache_fn.prefill(state, batches, self.encode, options=self.method.options)

    def __call__(self, batch: Batch) -> Outcome:
        queries = self.model.encode_queries(batch.queries)
        step = self._memory_step if self.method.loss == "memory" else self._cache_step
        return step(queries, batch, negcache_fn.FalseNegatives(ids=batch.positives))

    def _memory_step(self, queries: Tensor, batch: Batch, answers: negcache_fn.FalseNegatives) -> Outcome:
        documents = self.encode(batch.documents)
        loss = negcache_fn.exact_loss(
            self.state,
            queries,
            documents,
            scale=self.model.scale,
            in_batch=self.method.options.in_batch,
            ids=batch.ids,
            false_negatives=answers,
        )
        # Not in place: the backward pass of the loss reads the cache again.
        self.state = negcache_fn.update(
            self.state, batch.documents, documents.detach(), ids=batch.ids, evict=self.method.options.evict
        )
        return Outcome(loss, {})

    def _cache_step(self, queries: Tensor, batch: Batch, answers: negcache_fn.FalseNegatives) -> Outcome:
        output = negcache_fn.step_(
            self.state,
            queries,
            batch.documents,
            self.encode,
            options=self.method.options,
            scale=self.model.scale,
            ids=batch.ids,
            false_negatives=answers,
        )
        return Outcome(output.loss, output.metrics)


def in_batch_loss(queries: Tensor, documents: Tensor, batch: Batch, scale: Tensor, *, in_batch: bool) -> Tensor:
    """Cross entropy of query i against the N documents, its own in row i; a document that comes twice is one class."""
    rows = len(queries)
    own = torch.arange(len(documents)) == torch.arange(rows)[:, None]
    none = (batch.ids[None] == batch.ids[:, None]).triu(1).any(0)
    none = none | (batch.ids[None, :, None] == batch.positives[:, None, :]).any(-1)
    if not in_batch:
        none[:, :rows] = True
    scores = (scale * queries @ documents.T).masked_fill(none & ~own, -torch.inf)
    return F.cross_entropy(scores, torch.arange(rows))


def exhaustive_loss(model: DualEncoder, batch: Batch, documents: Tensor, task: Task) -> Tensor:
    """Cross entropy of the batch against all training documents [N, D]."""
    place = torch.full((len(task.documents["tokens"]),), -1)
    place[torch.from_numpy(task.train_documents)] = torch.arange(len(task.train_documents))
    rows = torch.arange(len(batch.positives))
    scores = model.scale * model.encode_queries(batch.queries) @ documents.T
    own = place[batch.ids[rows]]
    others = torch.where(batch.positives >= 0, place[batch.positives], own[:, None])
    none = torch.zeros_like(scores, dtype=torch.bool).scatter(1, others, True)
    none[rows, own] = False
    return F.cross_entropy(scores.masked_fill(none, -torch.inf), own)
