"""Hypothesis strategies: states of any occupancy, batches, masks, ties, duplicates, extreme logits, every storage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn import FalseNegatives
from tests.support.builders import make_state

STORAGES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ID_OFFSETS = (0, 5, 2**62)  # subtracted from small ids: negative ones are ids too
CAPACITIES = (1, 2, 3, 7, 63, 64, 65, 130)


def soft_cap(scores: Tensor) -> Tensor:
    """An elementwise, increasing score transform."""
    return 10 * torch.tanh(scores / 10)


def lift(scores: Tensor) -> Tensor:
    """One with a bend."""
    return torch.nn.functional.leaky_relu(scores, 0.3)


transforms = st.sampled_from([None, None, soft_cap, lift])
storages = st.sampled_from(STORAGES)
seeds = st.integers(0, 2**20)


@st.composite
def masks(draw: st.DrawFn, size: int) -> Tensor:
    """All, none, a prefix, or any subset."""
    kind = draw(st.sampled_from(["all", "all", "none", "prefix", "any"]))
    if kind == "prefix":
        return torch.arange(size) < draw(st.integers(0, size))
    if kind == "any":
        bits = torch.rand(size, generator=torch.Generator().manual_seed(draw(seeds)))
        return bits < draw(st.floats(0, 1))
    return torch.full((size,), kind == "all")


@st.composite
def vectors(draw: st.DrawFn, rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Unit vectors, ties from a small pool, or all zero."""
    generator = torch.Generator().manual_seed(draw(seeds))
    kind = draw(st.sampled_from(["unit", "unit", "ties", "zero"]))
    pool = torch.randn(2 if kind == "ties" else rows, dim, generator=generator, dtype=torch.float64)
    pool = torch.nn.functional.normalize(pool, dim=-1) * (kind != "zero")
    if kind == "ties":
        pool = pool[torch.randint(2, (rows,), generator=generator)]
    return pool.to(dtype)


@st.composite
def unique_ids(draw: st.DrawFn, size: int) -> Tensor:
    """Ids of a cache: each document once, or anonymous."""
    generator = torch.Generator().manual_seed(draw(seeds))
    names = torch.randperm(size + 3, generator=generator)[:size] - draw(st.sampled_from(ID_OFFSETS))
    return torch.where(torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0])), names, -1)


@st.composite
def states(draw: st.DrawFn, dim: int, dtype: torch.dtype | None = None) -> TensorDictBase:
    """A state of any capacity, occupancy, storage, ids and log-weights; empty slots hold garbage."""
    capacity, storage = draw(st.sampled_from(CAPACITIES)), dtype or draw(storages)
    generator = torch.Generator().manual_seed(draw(seeds))
    embedding, live = draw(vectors(capacity, dim, storage)), draw(masks(capacity))
    embedding[~live] = 7.0
    weight = torch.zeros(capacity)
    kind = draw(st.sampled_from(["zero", "zero", "any", "never"]))
    if kind != "zero":
        weight = torch.randn(capacity, generator=generator)
    if kind == "never":
        weight[torch.rand(capacity, generator=generator) < 0.3] = -math.inf
    at = torch.randint(0, 9, (2, capacity), generator=generator)
    return make_state(
        embedding,
        live=live,
        ids=draw(unique_ids(capacity)),
        log_weight=weight,
        embedded_at=at.max(0).values,
        inserted_at=at.min(0).values,
        step=draw(st.integers(9, 12)),
        seed=draw(st.sampled_from([0, 1, 2**31, 2**32, 2**62])),
        lock=draw(st.booleans()),
    )


@dataclass(frozen=True)
class Case:
    """A state with a batch and the options that sampling, loss and exact loss share."""

    state: TensorDictBase
    queries: Tensor
    documents: Tensor
    ids: Tensor | None
    in_batch: bool
    scale: float
    transform: Callable[[Tensor], Tensor] | None
    draws_per_query: int
    top_k: int | None
    log_weights: Tensor | None
    positives: Tensor | None
    max_score: float | None

    @property
    def false_negatives(self) -> FalseNegatives:
        """By id and by score."""
        return FalseNegatives(self.positives, self.max_score)

    @property
    def exclude_ids(self) -> Tensor | None:
        """What `step` excludes: every document with `in_batch`, else each query's own positive."""
        if self.ids is None:
            return None
        return self.ids if self.in_batch else self.ids[: len(self.queries), None]

    @property
    def sample_options(self) -> dict[str, Any]:
        """For `sample_gumbel`."""
        return {
            "draws_per_query": self.draws_per_query,
            "scale": self.scale,
            "score_transform": self.transform,
            "exclude_ids": self.exclude_ids,
            "false_negatives": self.false_negatives,
            "top_k": self.top_k,
        }

    @property
    def loss_options(self) -> dict[str, Any]:
        """For `loss`."""
        return {
            "scale": self.scale,
            "score_transform": self.transform,
            "in_batch": self.in_batch,
            "ids": self.ids,
            "log_weights": self.log_weights,
            "false_negatives": self.false_negatives,
            "reduction": "none",
        }

    @property
    def exact_options(self) -> dict[str, Any]:
        """For `exact_loss`."""
        return self.loss_options | {"top_k": self.top_k}


@st.composite
def cases(draw: st.DrawFn, *, max_scale: float = 100.0) -> Case:
    """Any of the above together."""
    dim, storage = draw(st.integers(1, 6)), draw(storages)
    exact = torch.float64 if storage == torch.float64 else torch.float32
    rows = draw(st.integers(1, 5))
    total = rows + draw(st.sampled_from([0, 0, 1, 4]))
    generator = torch.Generator().manual_seed(draw(seeds))
    names, nobody = -draw(st.sampled_from(ID_OFFSETS)), torch.tensor(-1)
    ids = torch.randint(-1, 9, (total,), generator=generator)
    ids = torch.where(ids >= 0, ids + names, nobody) if draw(st.booleans()) else None
    state = draw(states(dim, storage))
    capacity = len(state["items", "id"])
    return Case(
        state=state,
        queries=draw(vectors(rows, dim, exact)),
        documents=draw(vectors(total, dim, exact)),
        ids=ids,
        in_batch=draw(st.booleans()),
        scale=draw(st.sampled_from([0.01, 1.0, 20.0, max_scale])),
        transform=draw(transforms),
        draws_per_query=draw(st.integers(1, 3)),
        top_k=draw(st.sampled_from([None, None, *(k for k in (1, 2, 40, capacity) if k <= capacity)])),
        log_weights=torch.randn(total, generator=generator) if draw(st.booleans()) else None,
        positives=names + torch.randint(-1, 9, (rows, 2), generator=generator) if draw(st.booleans()) else None,
        max_score=draw(st.sampled_from([None, None, -math.inf, 0.37, 11.3])),
    )
