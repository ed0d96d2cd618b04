"""The ways to find negatives that are compared, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import negcache_fn
from examples.reverse_dictionary.corpus import Corpus
from examples.reverse_dictionary.encoder import Encoder
from negcache_fn import StepOptions

__all__ = ["ALL_DOCUMENTS", "METHODS", "SCALE", "TINY_METHODS", "Loss", "Method", "loss_of"]

SCALE = 20.0
ALL_DOCUMENTS = -1

_ROWS_AT_ONCE = 4096

Loss = Callable[[Tensor], Tensor]
"""From rows [B] of the corpus to the loss []."""


@dataclass(frozen=True)
class Method:
    """A way to find negatives. In-batch alone if the cache has no slots."""

    name: str
    batch_size: int
    cache_size: int = 0
    """Slots; `ALL_DOCUMENTS`: one for each document of the training split."""
    prefilled: bool = False
    """Whether the cache is filled before the first step, within the time of the run."""
    options: StepOptions = StepOptions(draws_per_query=1)

    @property
    def texts_per_step(self) -> int:
        """How many texts a step encodes: queries, documents and draws."""
        draws = self.options.draws_for(self.batch_size)
        return 2 * self.batch_size + (draws if self.cache_size else 0)


METHODS = (
    Method("in-batch, B=256", 256),
    Method("in-batch, B=1024", 1024),
    Method("cache of 65,536, B=256", 256, cache_size=65_536),
    Method("cache of all, prefilled, B=256", 256, cache_size=ALL_DOCUMENTS, prefilled=True),
    Method("cache of 65,536, for the batch, B=256", 256, cache_size=65_536, options=StepOptions(num_draws=256)),
)

TINY_METHODS = (
    Method("in-batch, B=8", 8),
    Method("cache of 64, B=8", 8, cache_size=64),
    Method("cache of all, prefilled, B=8", 8, cache_size=ALL_DOCUMENTS, prefilled=True),
    Method("cache of 64, for the batch, B=8", 8, cache_size=64, options=StepOptions(num_draws=8)),
)


def loss_of(method: Method, encoder: Encoder, corpus: Corpus, seed: int) -> Loss:
    """The loss of a batch; that of a cache has it as its own, and fills it first if it is to be prefilled."""
    return _cached(method, encoder, corpus, seed) if method.cache_size else _in_batch(encoder, corpus)


def _in_batch(encoder: Encoder, corpus: Corpus) -> Loss:
    def loss(rows: Tensor) -> Tensor:
        scores = SCALE * encoder(corpus.queries[rows]) @ encoder(corpus.documents[rows]).T
        return F.cross_entropy(scores, torch.arange(len(rows), device=rows.device))

    return loss


def _cached(method: Method, encoder: Encoder, corpus: Corpus, seed: int) -> Loss:
    trained = corpus.rows_of("train")
    slots = len(trained) if method.cache_size == ALL_DOCUMENTS else method.cache_size
    state = negcache_fn.init_cache(
        slots, encoder.dim, features=corpus.documents[:1], seed=seed, device=corpus.documents.device
    )
    if method.prefilled:
        batches = ((corpus.documents[rows], rows) for rows in trained[:slots].split(_ROWS_AT_ONCE))
        state = negcache_fn.prefill(state, batches, encoder, options=method.options)

    def loss(rows: Tensor) -> Tensor:
        return negcache_fn.step_(
            state,
            encoder(corpus.queries[rows]),
            corpus.documents[rows],
            encoder,
            options=method.options,
            scale=SCALE,
            ids=rows,
        ).loss

    return loss
