"""Steps at the edges: empty caches, nothing to draw, non-finite rows, any state, low precision, short documents."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import negcache_fn
from tests.support import strategies
from tests.support.builders import is_close, make_state, unit
from tests.support.checks import steps
from tests.support.checks.steps import Tower, documents, warm
from tests.support.options import step_keywords


def queries_of(rows: int = 3) -> Tensor:
    """Query embeddings that require gradient."""
    return unit(rows, 6, 77).requires_grad_()


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("correction", ["none", "self_normalized"])
@pytest.mark.parametrize("draws", [{"draws_per_query": 2}, {"num_draws": 2}], ids=str)
def test_first_step_on_an_empty_cache(draws: dict[str, int], in_batch: bool, correction: str) -> None:
    """In-batch or zero loss; finite metrics and gradients; only the batch comes in."""
    tower, batch = Tower(), documents(5, 1)
    state, queries = negcache_fn.init_cache(9, 6, batch), queries_of()
    out = negcache_fn.step(
        state,
        queries,
        batch,
        tower,
        options=negcache_fn.StepOptions(in_batch=in_batch, staleness_correction=correction, refresh_stalest=2, **draws),
    )
    expected = steps.oracles.cross_entropy(queries, tower(batch), torch.full((3,), -math.inf), in_batch=in_batch).mean()
    assert is_close(out.loss, expected, 1e-6)
    for gradient in torch.autograd.grad(out.loss, [queries, *tower.parameters()], allow_unused=True):
        assert gradient is None or bool(torch.isfinite(gradient).all())
    assert bool((out.draw.slot == -1).all())
    assert set(out.metrics) == (steps.OF_BATCH if "num_draws" in draws else steps.OF_QUERIES)
    assert all(bool(torch.isfinite(value)) for value in out.metrics.values())
    assert float(out.metrics["occupancy"]) == 0.0
    assert int((out.state["items", "embedded_at"] >= 0).sum()) == 5
    assert is_close(out.state["items", "embedding"][:5], tower(batch), 1e-6)
    assert int(out.state["step"]) == 1


def test_some_queries_can_draw_nothing() -> None:
    """Each excludes its own positive; the cache holds that of the first alone."""
    tower, batch = Tower(), documents(2, 1)
    state = negcache_fn.update(
        negcache_fn.init_cache(4, 6, batch), documents(1, 2), tower(documents(1, 2)), ids=torch.tensor([5])
    )
    out = negcache_fn.step(
        state,
        queries_of(2),
        batch,
        tower,
        ids=torch.tensor([5, 6]),
        options=negcache_fn.StepOptions(draws_per_query=1, in_batch=False),
        cacheable=torch.zeros(2, dtype=torch.bool),
    )
    assert out.draw.slot.flatten().tolist() == [-1, 0]
    assert float(out.draw.log_normalizer[0]) == -math.inf
    assert bool(torch.isfinite(out.loss))
    assert all(bool(torch.isfinite(value)) for value in out.metrics.values())
    assert out.state["items", "embedded_at"].tolist() == [1, -1, -1, -1]
    assert is_close(out.state["items", "embedding"][0], tower(documents(1, 2))[0], 1e-6)


def test_non_finite_rows_are_counted_and_left_out() -> None:
    """A document and a refreshed row that come out of the encoder as NaN: counted, not written, the loss untouched."""
    tower = Tower()
    items = {"words": torch.randint(0, 50, (6, 4)), "extra": {"price": torch.zeros(6)}}
    never = torch.tensor([0.0, 0.0, -math.inf, 0.0, 0.0, 0.0])
    state = make_state(
        tower(items).detach(),
        features=steps.as_tensordict(items),
        log_weight=never,
        embedded_at=torch.tensor([3, 3, 1, 3, 3, 2]),
        inserted_at=torch.tensor([0, 1, 2, 2, 2, 2]),
        step=4,
    )
    batch = documents(3, 1)

    def encode(features: Any) -> Tensor:
        out = tower(features)
        poison = torch.zeros(len(out), 1)
        poison[2] = math.nan
        poison[-2] = math.inf
        return out + poison

    options: dict[str, Any] = {
        "scale": 3.0,
        "in_batch": False,
        "refresh_stalest": 2,
        "evict": "fifo",
        "draws_per_query": 2,
    }
    queries = queries_of(2)
    out = negcache_fn.step(state, queries, batch, encode, **step_keywords(**options))
    clean = negcache_fn.step(state, queries, batch, tower, **step_keywords(**options))
    assert float(out.metrics["non_finite"]) == 2
    assert float(clean.metrics["non_finite"]) == 0
    assert torch.equal(out.loss, clean.loss)
    assert bool(torch.isfinite(out.state["items", "embedding"]).all())
    assert out.state["items", "inserted_at"].tolist() == [4, 4, 2, 2, 2, 2]
    assert int(out.state["items", "embedded_at"][2]) == 1
    assert int(out.state["items", "embedded_at"][5]) == 4


def test_masked_rows_are_not_counted_as_non_finite() -> None:
    """They would not have been written anyway."""
    tower, batch = Tower(), documents(3, 1)
    out = negcache_fn.step(
        warm(tower, 9),
        queries_of(2),
        batch,
        lambda features: tower(features) + torch.tensor([[0.0], [0.0], [math.nan]] + [[0.0]] * 2),
        options=negcache_fn.StepOptions(draws_per_query=1, in_batch=False),
        cacheable=torch.tensor([True, True, False]),
    )
    assert float(out.metrics["non_finite"]) == 0
    assert bool(torch.isfinite(out.loss))


@given(case=strategies.cases(max_scale=1000.0), data=st.data())
def test_step_on_any_state(case: strategies.Case, data: st.DataObject) -> None:
    """Finite loss and metrics, finite gradients, a state that is one, or an error for a batch too large."""
    capacity, dim = case.state["items", "embedding"].shape
    table = unit(997, dim, 5, case.queries.dtype).requires_grad_()
    queries = case.queries.clone().requires_grad_()
    options = case.loss_options | {
        "draws_per_query": case.draws_per_query,
        "top_k": case.top_k,
        "reduction": "mean",
    }
    options |= {
        "refresh_stalest": data.draw(st.integers(0, capacity)),
        "evict": data.draw(st.sampled_from(["lru", "fifo"])),
    }
    options |= {"cacheable": data.draw(st.none() | strategies.masks(len(case.documents)))}
    options |= {"share_draws": data.draw(st.booleans())}
    num_draws = data.draw(st.none() | st.integers(1, 50))
    if num_draws is not None:
        options |= {"draws_per_query": None, "num_draws": num_draws, "share_draws": True}
    options |= {"staleness_correction": data.draw(st.sampled_from(["none", "self_normalized"]))}
    features = {"x": torch.arange(2 * len(case.documents)).view(-1, 2) + 500}

    def encode(rows: Any) -> Tensor:
        return table[rows["x"][:, 0]]

    if len(case.documents) > capacity:
        with pytest.raises(ValueError, match=r"(features|queries).* has"):
            negcache_fn.step(case.state, queries, features, encode, **step_keywords(**options))
        return
    out = negcache_fn.step(case.state, queries, features, encode, **step_keywords(**options))
    assert bool(torch.isfinite(out.loss))
    for gradient in torch.autograd.grad(out.loss, [queries, table], allow_unused=True):
        assert gradient is None or bool(torch.isfinite(gradient).all())
    for key, value in out.metrics.items():
        assert bool(torch.isfinite(value)), key
    assert 0 <= float(out.metrics["positive_probability"]) <= 1 + 1e-6
    items = out.state["items"]
    live = items["embedded_at"] >= 0
    assert torch.equal(live, items["inserted_at"] >= 0)
    assert bool((items["embedded_at"] >= items["inserted_at"]).all())
    names = items["id"][items["id"] >= 0].tolist()
    assert len(names) == len(set(names))
    assert out.state.is_locked == case.state.is_locked


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_step_under_autocast(storage: torch.dtype) -> None:
    """Towers that give bfloat16: scores, loss and gradients are those of the same numbers in float32."""
    tower, batch = Tower(), documents(5, 1)
    state = negcache_fn.init_cache(9, 6, batch, embedding_dtype=storage)
    state = negcache_fn.update(state, documents(6, 2), tower(documents(6, 2)).detach())
    results = []
    for low in (True, False):
        queries = unit(3, 6, 77).bfloat16()
        queries = queries.requires_grad_() if low else queries.float().requires_grad_()

        def encode(features: Any, low: bool = low) -> Tensor:
            return tower(features).bfloat16() if low else tower(features).bfloat16().float()

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            out = negcache_fn.step(
                state, queries, batch, encode, scale=20.0, options=negcache_fn.StepOptions(draws_per_query=2)
            )
        results.append((out, torch.autograd.grad(out.loss, [queries, tower.table])))
    (one, low_gradients), (other, gradients) = results
    assert torch.equal(one.draw.slot, other.draw.slot)
    assert is_close(one.loss, other.loss, 1e-5)
    for a, b in zip(low_gradients, gradients, strict=True):
        assert is_close(a, b, 2e-2)
    for key, value in other.state.items(True, True):
        same = one.state[key]
        assert is_close(same, value, 1e-6) if value.is_floating_point() else torch.equal(same, value), key


def test_shorter_documents_are_padded_before_the_encoder() -> None:
    """Token ids of a short batch and of long cached documents meet in one call."""
    state = negcache_fn.init_cache(4, 6, torch.zeros(1, 4, dtype=torch.int64))
    tower = Tower()
    long = torch.randint(1, 50, (2, 4), generator=torch.Generator().manual_seed(0))
    state = negcache_fn.update(state, long, tower(long))
    out = negcache_fn.step(
        state, queries_of(2), long[:, :2], tower.counted, options=negcache_fn.StepOptions(draws_per_query=1)
    )
    assert tower.calls == [(Tensor, 4)]
    assert out.state["items", "features"][2:].tolist() == [[*row, 0, 0] for row in long[:, :2].tolist()]
