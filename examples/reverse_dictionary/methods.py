"""The ways to find negatives that are compared, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn import functional as F

import negcache_fn
from examples.reverse_dictionary.corpus import Corpus
from examples.reverse_dictionary.encoder import Encoder
from negcache_fn import StepOptions

__all__ = ["ALL_DOCUMENTS", "METHODS", "SCALE", "TINY_METHODS", "Method", "MethodLoss", "loss_of"]

SCALE = 20.0
ALL_DOCUMENTS = -1

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Method:
    """A way to find negatives. In-batch alone if the cache has no slots."""

    name: str
    batch_size: int
    cache_size: int = 0
    """Slots; `ALL_DOCUMENTS`: one for each document of the training split."""
    prefilled: bool = False
    """Whether the cache is filled before the first step, within the time of the run."""
    options: StepOptions | None = StepOptions(draws_per_query=1)
    """Of the step; None: the cached embeddings are themselves negatives, as they are."""

    @property
    def texts_per_step(self) -> int:
        """How many texts a step encodes: queries, documents and draws."""
        draws = self.options.draws_for(self.batch_size) if self.cache_size and self.options else 0
        return 2 * self.batch_size + draws


METHODS = (
    Method("in-batch, B=256", 256),
    Method("in-batch, B=1024", 1024),
    Method("in-batch, B=4096", 4096),
    Method("memory of 65,536 stale embeddings, B=256", 256, cache_size=65_536, options=None),
    Method("cache of 65,536, a draw per query, B=256", 256, cache_size=65_536),
    Method(
        "cache of 65,536, 256 draws for the batch, B=256", 256, cache_size=65_536, options=StepOptions(num_draws=256)
    ),
    Method(
        "cache of all, prefilled, 256 draws for the batch, B=256",
        256,
        cache_size=ALL_DOCUMENTS,
        prefilled=True,
        options=StepOptions(num_draws=256),
    ),
    Method("cache of 65,536, 64 draws for the batch, B=256", 256, cache_size=65_536, options=StepOptions(num_draws=64)),
    Method(
        "cache of 65,536, 1,024 draws for the batch, B=1024",
        1024,
        cache_size=65_536,
        options=StepOptions(num_draws=1024),
    ),
)

TINY_METHODS = (
    Method("in-batch, B=8", 8),
    Method("memory of 64 stale embeddings, B=8", 8, cache_size=64, options=None),
    Method("cache of 64, B=8", 8, cache_size=64),
    Method("cache of all, prefilled, B=8", 8, cache_size=ALL_DOCUMENTS, prefilled=True),
    Method("cache of 64, for the batch, B=8", 8, cache_size=64, options=StepOptions(num_draws=8)),
)


class MethodLoss(Protocol):
    """The loss of a method: rows [B] of the corpus to the loss []. What it keeps stays in the same tensors."""

    def __call__(self, rows: Tensor) -> Tensor:
        """The loss of a batch."""
        ...

    def restart(self, seed: int) -> None:
        """Forgets all batches, and prefills the cache if the method does."""
        ...


def loss_of(method: Method, encoder: Encoder, corpus: Corpus) -> MethodLoss:
    """The loss of a method."""
    if not method.cache_size:
        return _InBatch(encoder, corpus)
    return (_Memory if method.options is None else _Cache)(method, encoder, corpus)


class _InBatch:
    def __init__(self, encoder: Encoder, corpus: Corpus) -> None:
        self.encoder, self.corpus = encoder, corpus

    def __call__(self, rows: Tensor) -> Tensor:
        scores = SCALE * self.encoder(self.corpus.queries[rows]) @ self.encoder(self.corpus.documents[rows]).T
        return F.cross_entropy(scores, torch.arange(len(rows), device=rows.device))

    def restart(self, seed: int) -> None:
        pass


class _Memory:
    """The documents of the batch and of the batches before it, as they were embedded then (Wang et al. 2020)."""

    def __init__(self, method: Method, encoder: Encoder, corpus: Corpus) -> None:
        device, batch = corpus.documents.device, method.batch_size
        self.encoder, self.corpus = encoder, corpus
        self.embeddings = torch.zeros(method.cache_size, encoder.dim, device=device)
        self.rows = torch.full((method.cache_size,), -1, device=device)
        self.places = torch.arange(batch, device=device)
        self.last = torch.zeros(batch, encoder.dim, device=device), torch.full((batch,), -1, device=device)

    def __call__(self, rows: Tensor) -> Tensor:
        self.embeddings[self.places], self.rows[self.places] = self.last
        self.places.add_(len(rows)).remainder_(len(self.rows))
        queries, documents = self.encoder(self.corpus.queries[rows]), self.encoder(self.corpus.documents[rows])
        usable = (self.rows >= 0) & (self.rows != rows[:, None])
        older = (SCALE * queries @ self.embeddings.T).masked_fill(~usable, -torch.inf)
        self.last[0].copy_(documents.detach())
        self.last[1].copy_(rows)
        scores = torch.cat([SCALE * queries @ documents.T, older], dim=1)
        return F.cross_entropy(scores, torch.arange(len(rows), device=rows.device))

    def restart(self, seed: int) -> None:
        self.rows.fill_(-1)
        self.last[1].fill_(-1)


class _Cache:
    def __init__(self, method: Method, encoder: Encoder, corpus: Corpus) -> None:
        assert method.options is not None
        self.method, self.encoder, self.corpus, self.options = method, encoder, corpus, method.options
        self.trained = corpus.rows_of("train")
        self.state = self._empty(0)

    def __call__(self, rows: Tensor) -> Tensor:
        return negcache_fn.step_(
            self.state,
            self.encoder(self.corpus.queries[rows]),
            self.corpus.documents[rows],
            self.encoder,
            options=self.options,
            scale=SCALE,
            ids=rows,
        ).loss

    def restart(self, seed: int) -> None:
        state = self._empty(seed)
        if self.method.prefilled:
            batches = ((self.corpus.documents[rows], rows) for rows in self.trained.split(_ROWS_AT_ONCE))
            state = negcache_fn.prefill(state, batches, self.encoder, options=self.options)
        for key, values in self.state.items(include_nested=True, leaves_only=True):
            values.copy_(state.get(key))

    def _empty(self, seed: int) -> TensorDictBase:
        slots = len(self.trained) if self.method.cache_size == ALL_DOCUMENTS else self.method.cache_size
        documents = self.corpus.documents
        return negcache_fn.init_cache(
            slots, self.encoder.dim, features=documents[:1], seed=seed, device=documents.device
        )
