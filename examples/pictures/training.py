"""What the pictures are taken of: a small search problem, and a training that can be looked at after every step.

4096 documents lie around 64 topics, and every one is asked for by a noisy copy of itself, so that the hard negatives of
a query are the documents of its topic. Everything is a function of the seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F

import negcache_fn
from negcache_fn import StepOptions

__all__ = ["BATCH", "DIM", "SCALE", "Corpus", "Run", "Tower", "make_corpus", "train"]

DIM, BATCH, SCALE = 16, 16, 20.0
_TOPICS = 64


class Corpus(NamedTuple):
    documents: Tensor  # [N, DIM]
    questions: Tensor  # [N, DIM]: row i asks for document i


class Tower(nn.Module):
    """One of the two encoders, to unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(DIM, 64), nn.GELU(), nn.Linear(64, DIM))

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.layers(features), dim=1)


class Run(NamedTuple):
    """A training as it is after some step. The state is written in place by the next one."""

    corpus: Corpus
    queries: Tower
    documents: Tower
    state: TensorDictBase


def make_corpus(size: int = 4096, *, seed: int = 0) -> Corpus:
    generator = torch.Generator().manual_seed(seed)
    topics = F.normalize(torch.randn(_TOPICS, DIM, generator=generator), dim=1)
    of_topic = torch.randint(_TOPICS, (size,), generator=generator)
    documents = topics[of_topic] + 0.2 * torch.randn(size, DIM, generator=generator)
    return Corpus(documents, documents + 0.1 * torch.randn(size, DIM, generator=generator))


def train(
    steps: int,
    *,
    capacity: int,
    batch: int = BATCH,
    options: StepOptions = StepOptions(),
    rate: float = 3e-3,
    look: Callable[[int, Run, negcache_fn.StepOutput], None] | None = None,
) -> Run:
    """Trains from the beginning, and shows `look` the number of each step, the run after it and what it gave back."""
    corpus = make_corpus()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        queries, documents = Tower(), Tower()
    optimizer = torch.optim.Adam([*queries.parameters(), *documents.parameters()], rate)
    run = Run(corpus, queries, documents, negcache_fn.init_cache(capacity, DIM, features=corpus.documents[:1]))
    for step, rows in enumerate(_batches(len(corpus.documents), batch, steps)):
        out = negcache_fn.step_(
            run.state,
            queries(corpus.questions[rows]),
            corpus.documents[rows],
            documents,
            options=options,
            scale=SCALE,
            ids=rows,
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if look is not None:
            look(step, run, out)
    return run


def _batches(size: int, batch: int, steps: int) -> Sequence[Tensor]:
    """Rows of each step: the corpus in a new order as often as it takes."""
    generator = torch.Generator().manual_seed(2)
    epochs = -(-steps * batch // size)
    rows = torch.cat([torch.randperm(size, generator=generator) for _ in range(epochs)])
    return rows[: steps * batch].split(batch)
