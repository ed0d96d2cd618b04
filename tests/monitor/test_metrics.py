"""The metrics of a step where draws are missing, queries have nothing to draw, and vectors are of any length."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor

import negcache_fn
from tests.support.builders import make_state, unit
from tests.support.checks import steps
from tests.support.options import step_keywords

TABLE = 0.3 + 1.5 * torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
LIVE = torch.tensor([False, False, True, False, False, True, True, False, True])
FEW = torch.tensor([False, False, True, False, False, False, True, False, False])


def encode(features: dict[str, Tensor]) -> Tensor:
    """Vectors of many lengths."""
    return TABLE[features["words"]].mean(1)


def documents(rows: int, seed: int) -> dict[str, Tensor]:
    return {"words": torch.randint(0, 60, (rows, 2), generator=torch.Generator().manual_seed(seed))}


def holed(live: Tensor, storage: torch.dtype) -> TensorDictBase:
    """A few drifted documents, embedded again since they came in; empty slots hold what scores high."""
    features = documents(9, 2)
    embedding = 1.3 * encode(features) + 0.3 * unit(9, 4, 3)
    return make_state(
        torch.where(live[:, None], embedding, 50.0 * unit(4, 4, 4)[2]).to(storage),
        live=live,
        ids=torch.tensor([-1, -1, 4, -1, -1, 8, -1, -1, 6]),
        log_weight=torch.linspace(-0.5, 0.5, 9),
        embedded_at=torch.tensor([0, 0, 3, 0, 0, 5, 4, 0, 1]),
        inserted_at=torch.tensor([0, 0, 1, 0, 0, 2, 0, 0, 1]),
        features=features,
        step=7,
    )


LIMIT = torch.tensor([math.inf, -math.inf, 0.8, math.inf])  # the second query has nothing to draw
VARIANTS: dict[str, dict[str, Any]] = {
    "for the batch": {"num_draws": 6},
    "for the batch, few": {"num_draws": 2, "staleness_correction": "none"},
    "each query": {"draws_per_query": 2},
    "each query, own": {"draws_per_query": 3, "share_draws": False},
    "each query, uncorrected": {"draws_per_query": 2, "staleness_correction": "none"},
}
NAMES: dict[str, dict[str, Any]] = {
    "own positives": {"in_batch": False, "ids": torch.tensor([4, 90, 8, 91, 6])},
    "in batch": {"ids": torch.tensor([4, 90, 80, 91, 92]), "log_weights": torch.tensor([0.5, -1.0, 0.0, 1.0, 0.3])},
    "anonymous": {},
}


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("live", [LIVE, FEW, LIVE & False], ids=["four", "two", "none"])
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("name", VARIANTS)
def test_metrics_where_draws_are_missing(name: str, names: str, live: Tensor, storage: torch.dtype) -> None:
    """Means are over what exists, and every number is the naive one."""
    state, queries, batch = holed(live, storage), unit(4, 4, 4), documents(5, 5)
    known = negcache_fn.FalseNegatives(torch.tensor([[6, -1], [-1, -1], [4, -1], [4, 6]]), LIMIT)
    options = VARIANTS[name] | NAMES[names] | {"scale": 2.0, "false_negatives": known}
    out = negcache_fn.step(state, queries, batch, encode, **step_keywords(**options))
    slots = out.draw.slot.flatten()
    assert bool((slots < 0).any()) or name == "for the batch, few"
    negatives = encode(negcache_fn.take(state, slots))
    expected = steps.naive_metrics(state, queries, encode(batch), negatives, out.draw, **options)
    steps.same_metrics(out.metrics, expected)


def test_what_is_encoded_in_place_of_a_draw_is_not_counted() -> None:
    """NaN there is neither written nor missed."""
    state, batch = holed(FEW, torch.float32), documents(4, 5)

    def poisoned(features: dict[str, Tensor]) -> Tensor:
        return encode(features).index_fill(0, torch.arange(6, len(features["words"])), math.nan)

    options = negcache_fn.StepOptions(draws_per_query=2, in_batch=False, refresh_stalest=9)
    known = negcache_fn.FalseNegatives(max_score=torch.tensor([math.inf, -math.inf, -math.inf, -math.inf]))
    out = negcache_fn.step(
        state, unit(4, 4, 4), batch, poisoned, options=options, false_negatives=known, cacheable=torch.ones(4) > 0
    )
    assert (out.draw.slot >= 0).tolist() == [[True, True], [False] * 2, [False] * 2, [False] * 2]
    # Of the rows from the seventh on only the two stalest ones, which are there, were to be written.
    assert float(out.metrics["non_finite"]) == 2
    assert all(bool(torch.isfinite(value)) for value in out.metrics.values())
    assert bool(torch.isfinite(out.loss))


def test_what_overflows_in_storage_is_counted() -> None:
    """Finite as encoded, infinite in float16: a document and a draw."""
    state, batch = holed(LIVE, torch.float16), documents(4, 5)

    def large(features: dict[str, Tensor]) -> Tensor:
        return encode(features).index_fill(0, torch.tensor([1, 4]), 1e6)

    options = negcache_fn.StepOptions(draws_per_query=1)
    out = negcache_fn.step(state, unit(4, 4, 4), batch, large, options=options)
    assert float(out.metrics["non_finite"]) == 2
    assert bool(out.state["items", "embedding"].isfinite().all())


def test_the_histogram_goes_by_the_embedding_not_the_insertion() -> None:
    ages = {"embedded_at": torch.tensor([5, 2, 5, 3]), "inserted_at": torch.tensor([0, 2, 1, 3])}
    counts, edges = negcache_fn.age_histogram(make_state(unit(4, 2, 0), step=6, **ages), bins=5)
    assert edges.tolist() == [0, 1, 2, 3, 4, 5]
    assert counts.tolist() == [0, 2, 0, 1, 1]
