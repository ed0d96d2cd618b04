"""`step` is the composition of the other functions, encodes once, and measures what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor

import negcache_fn
from tests.support import strategies
from tests.support.builders import assert_same_state, is_close, unit
from tests.support.checks import steps
from tests.support.checks.steps import Tower, documents, warm
from tests.support.options import step_keywords

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "scaled": {"scale": 12.0, "draws_per_query": 3},
    "own draws": {"scale": 12.0, "draws_per_query": 3, "share_draws": False},
    "uncorrected": {"scale": 12.0, "draws_per_query": 2, "staleness_correction": "none"},
    "some draws": {"scale": 12.0, "num_draws": 5},
    "some draws, uncorrected": {"scale": 12.0, "num_draws": 2, "staleness_correction": "none"},
    "each query draws": {"scale": 12.0, "draws_per_query": 1},
    "each query draws, stalest": {"scale": 12.0, "draws_per_query": 1, "in_batch": False, "refresh_stalest": 3},
    "each query draws, ids": {"scale": 12.0, "draws_per_query": 2, "ids": torch.tensor([4, 90, 0, 7, 90])},
    "each query draws, limit": {
        "scale": 12.0,
        "in_batch": False,
        "draws_per_query": 2,
        "ids": torch.tensor([4, 90, 0, 7, 91]),
        "false_negatives": negcache_fn.FalseNegatives(torch.tensor([[1], [2], [3]]), torch.tensor([6.0, 9.0, 4.0])),
    },
    "no in-batch": {"scale": 12.0, "in_batch": False},
    "ids": {"scale": 12.0, "num_draws": 4, "ids": torch.tensor([4, 90, 0, 7, 90])},
    "own ids": {"scale": 12.0, "in_batch": False, "ids": torch.tensor([4, 90, 0, 7, 91])},
    "log-weights": {"scale": 12.0, "log_weights": torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0])},
    "mask": {"scale": 12.0, "cacheable": torch.tensor([True, False, True, False, True])},
    "top_k": {"scale": 12.0, "draws_per_query": 3, "top_k": 4},
    "transform": {"scale": 12.0, "score_transform": strategies.soft_cap},
    "hardness": {
        "scale": 8.0,
        "hardness": 5.0,
        "num_draws": 4,
        "ids": torch.tensor([4, 90, 7, 8, 9]),
        "log_weights": torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0]),
        "false_negatives": negcache_fn.FalseNegatives(max_score=lambda positive: positive + 6.0),
    },
    "hardness, of own": {"scale": 8.0, "hardness": 5.0, "in_batch": False, "draws_per_query": 2},
    "stalest": {"scale": 12.0, "refresh_stalest": 3},
    "fifo": {"scale": 12.0, "evict": "fifo", "refresh_stalest": 2},
    "positives": {
        "scale": 12.0,
        "num_draws": 4,
        "ids": torch.tensor([4, 90, 7, 8, 9]),
        "false_negatives": negcache_fn.FalseNegatives(torch.tensor([[4, 0], [90, 5], [7, -1]])),
    },
    "margin": {
        "scale": 12.0,
        "draws_per_query": 2,
        "false_negatives": negcache_fn.FalseNegatives(max_score=lambda positive: positive + 6.0),
    },
    "limit": {
        "scale": 12.0,
        "in_batch": False,
        "num_draws": 4,
        "ids": torch.tensor([4, 90, 0, 7, 91]),
        "false_negatives": negcache_fn.FalseNegatives(torch.tensor([[1], [2], [3]]), torch.tensor([6.0, 9.0, 4.0])),
    },
    "one draw": {"scale": 12.0, "num_draws": 1, "ids": torch.tensor([4, 90, 0, 7, 90])},
    "one draw of the best": {"scale": 12.0, "num_draws": 1, "top_k": 2, "in_batch": False, "refresh_stalest": 2},
    "one draw within a margin": {
        "scale": 12.0,
        "num_draws": 1,
        "staleness_correction": "none",
        "ids": torch.tensor([4, 90, 7, 8, 9]),
        "false_negatives": negcache_fn.FalseNegatives(
            torch.tensor([[4, 0], [90, 5], [7, -1]]), lambda positive: positive + 6.0
        ),
    },
    "share of the stalest": {"scale": 12.0, "refresh_stalest": 0.2},
    "labels": {"scale": 12.0, "num_draws": 4, "labels": ((3, -1, 8), (3, 8, 8, 3, 1))},
    "labels, of own": {
        "scale": 12.0,
        "in_batch": False,
        "draws_per_query": 2,
        "labels": ((3, 5, 8), (0, 0, 0, 0, 0)),
        "positive_rows": torch.tensor([[3, 0], [-1, -1], [4, 2]]),
    },
    "targets": {"scale": 12.0, "num_draws": 4, "positive_rows": torch.tensor([[0, 3], [4, -1], [2, 1]])},
    "targets, own ids, one without": {
        "scale": 12.0,
        "in_batch": False,
        "draws_per_query": 2,
        "ids": torch.tensor([4, 90, 0, 7, 91]),
        "positive_rows": torch.tensor([[3, 0], [-1, -1], [4, 2]]),
    },
    "targets, one without": {
        "scale": 12.0,
        "num_draws": 3,
        "ids": torch.tensor([4, 90, 7, 8, 9]),
        "log_weights": torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0]),
        "weigh_positives": False,
        "positive_rows": torch.tensor([[0], [-1], [3]]),
        "false_negatives": negcache_fn.FalseNegatives(
            torch.tensor([[4, 0], [90, 5], [7, -1]]), lambda positive: positive + 6.0
        ),
    },
    "weights of negatives": {
        "scale": 12.0,
        "log_weights": torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0]),
        "weigh_positives": False,
    },
    "rows": {"scale": 12.0, "reduction": "none"},
    "sum": {"scale": 12.0, "reduction": "sum"},
}


def with_labels(options: dict[str, Any], capacity: int) -> dict[str, Any]:
    """The options, with labels of a third of the slots where they have some of queries and documents."""
    if "labels" not in options:
        return options
    queries, own = (torch.tensor(labels) for labels in options["labels"])
    cached = torch.tensor([3, -1, 5, 8, 5, -1])[torch.arange(capacity) % 6]
    known = negcache_fn.FalseNegatives(labels=negcache_fn.Labels(queries, own, cached))
    return {name: value for name, value in options.items() if name != "labels"} | {"false_negatives": known}


def queries_of(rows: int = 3) -> Tensor:
    """Query embeddings that require gradient."""
    return unit(rows, 6, 77).requires_grad_()


@pytest.mark.parametrize("capacity", [9, 40])
@pytest.mark.parametrize("name", VARIANTS)
def test_step_is_its_composition(name: str, capacity: int) -> None:
    """Loss, gradients, state, metrics and draw, on a full and on a partly filled cache."""
    tower, batch = Tower(), documents(5, 1)
    state = warm(tower, capacity, ids=True)
    options = with_labels(VARIANTS[name], capacity)
    results = []
    for function in (negcache_fn.step, steps.composed):
        queries = queries_of()
        keywords = options if function is steps.composed else step_keywords(**options)
        loss, after, metrics, draw = function(state, queries, batch, tower, **keywords)
        gradients = torch.autograd.grad(loss.sum(), [queries, *tower.parameters()])
        results.append((loss, after, metrics, draw, gradients))
    given, expected = results
    assert is_close(given[0], expected[0], 1e-6)
    assert given[0].shape == ((3,) if options.get("reduction") == "none" else ())
    for key, value in expected[1].items(True, True):
        same = given[1][key]
        assert is_close(same, value, 1e-6) if value.is_floating_point() else torch.equal(same, value), key
    steps.same_metrics(given[2], expected[2])
    for one, other in zip(given[3], expected[3], strict=True):
        assert is_close(one, other, 1e-5) if one.is_floating_point() else torch.equal(one, other)
    for one, other in zip(given[4], expected[4], strict=True):
        assert is_close(one, other, 1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_step_in_place_is_step(name: str) -> None:
    """`step_` writes what `step` returns, into the state it was given."""
    tower, batch, options = Tower(), documents(5, 1), with_labels(VARIANTS[name], 9)
    state = warm(tower, 9, ids=True)
    twin = state.clone().lock_()
    pure = negcache_fn.step(state, queries_of(), batch, tower, **step_keywords(**options))
    mine = negcache_fn.step_(twin, queries_of(), batch, tower, **step_keywords(**options))
    assert mine.state is twin
    assert twin.is_locked
    assert_same_state(mine.state, pure.state)
    assert torch.equal(mine.loss, pure.loss)
    assert all(torch.equal(a, b) for a, b in zip(mine.draw, pure.draw, strict=True))
    assert all(torch.equal(mine.metrics[key], value) for key, value in pure.metrics.items())
    gradient = torch.autograd.grad(mine.loss.sum(), list(tower.parameters()))
    expected = torch.autograd.grad(pure.loss.sum(), list(tower.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradient, expected, strict=True))


@pytest.mark.parametrize("kind", ["dict", "tensordict", "tensor"])
def test_encoder_is_called_once_with_the_container_given(kind: str) -> None:
    """On N + B*k + refresh_stalest rows, full cache or empty."""
    tower, batch = Tower(), documents(5, 1)
    made: Any = {"dict": batch, "tensordict": steps.as_tensordict(batch), "tensor": batch["words"]}[kind]
    state = negcache_fn.init_cache(9, 6, made)
    for _ in range(3):
        state = negcache_fn.step(
            state,
            queries_of(),
            made,
            tower.counted,
            options=negcache_fn.StepOptions(draws_per_query=2, refresh_stalest=4),
            scale=5.0,
        ).state
    assert [rows for _, rows in tower.calls] == [5 + 3 * 2 + 4] * 3
    _check_containers(tower, kind)


@pytest.mark.parametrize("kind", ["dict", "tensordict", "tensor"])
def test_encoder_is_called_twice_with_draws_for_the_batch(kind: str) -> None:
    """On N rows, then on M + refresh_stalest, full cache or empty."""
    tower, batch = Tower(), documents(5, 1)
    made: Any = {"dict": batch, "tensordict": steps.as_tensordict(batch), "tensor": batch["words"]}[kind]
    options = negcache_fn.StepOptions(num_draws=7, refresh_stalest=4)
    state = negcache_fn.init_cache(9, 6, made)
    for _ in range(3):
        state = negcache_fn.step(state, queries_of(), made, tower.counted, options=options, scale=5.0).state
    assert [rows for _, rows in tower.calls] == [5, 7 + 4] * 3
    _check_containers(tower, kind)


def _check_containers(tower: Tower, kind: str) -> None:
    for container, _ in tower.calls:
        assert issubclass(container, {"dict": dict, "tensordict": TensorDictBase, "tensor": Tensor}[kind])


def test_encoder_sees_nested_dicts_as_dicts() -> None:
    """Dict in, dict out, at every depth."""
    seen: list[Any] = []

    def encode(features: Any) -> Tensor:
        seen.append(features)
        return Tower()(features)

    negcache_fn.step(warm(Tower(), 9), queries_of(), documents(5, 1), encode)
    assert type(seen[0]) is dict
    assert type(seen[0]["extra"]) is dict
    assert set(seen[0]) == {"words", "extra"}


def test_refreshing_the_stalest_has_no_gradient() -> None:
    """The loss and its gradients are those without."""
    tower, batch = Tower(), documents(5, 1)
    state = warm(tower, 12)
    gradients = []
    for count in (0, 5):
        loss = negcache_fn.step(
            state, queries_of(), batch, tower, scale=12.0, options=negcache_fn.StepOptions(refresh_stalest=count)
        ).loss
        gradients.append(torch.autograd.grad(loss, list(tower.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert is_close(one, other, 1e-6)


def test_refreshing_the_stalest_renews_them() -> None:
    """Their embeddings become those of the encoder now, their age nothing."""
    tower, batch = Tower(), documents(1, 1)
    state = warm(tower, 12, ids=True)
    oldest = negcache_fn.stalest(state, 4)
    out = negcache_fn.step(
        state, queries_of(1), batch, tower, options=negcache_fn.StepOptions(refresh_stalest=4, evict="fifo")
    )
    kept = [int(j) for j in oldest if int(out.state["items", "inserted_at"][j]) < int(state["step"])]
    assert len(kept) == 3, "one of the four was evicted"
    fresh = tower(negcache_fn.take(state, torch.tensor(kept)))
    assert is_close(out.state["items", "embedding"][kept], fresh, 1e-6)
    assert out.state["items", "embedded_at"][kept].tolist() == [int(state["step"])] * 3


def test_scale_is_learnable() -> None:
    """Its gradient is that of a finite difference in float64, with the draw held."""
    tower, batch = Tower().double(), documents(5, 1)
    batch["extra"]["price"] = batch["extra"]["price"].double()
    state = negcache_fn.init_cache(12, 6, batch, embedding_dtype=torch.float64)
    state = negcache_fn.update(state, batch, tower(batch).detach() + 0.05)
    queries = unit(3, 6, 77, torch.float64)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    out = negcache_fn.step(
        state,
        queries,
        batch,
        tower,
        scale=scale,
        options=negcache_fn.StepOptions(draws_per_query=2, staleness_correction="none"),
    )
    (gradient,) = torch.autograd.grad(out.loss, [scale])
    negatives = tower(negcache_fn.take(state, out.draw.slot.flatten()))
    slots, embeddings = out.draw.slot.flatten().tolist(), state["items", "embedding"]
    stale = steps.oracles.cache_scores(queries, embeddings, scale=7.0, live=[j < 5 for j in range(12)])
    probability = torch.from_numpy(steps.oracles.probabilities(stale))[:, slots]
    logits = steps.oracles.sampled_cache_logits(
        scale * queries @ negatives.T,
        stale[:, slots],
        probability,
        steps.oracles.log_normalizer(stale),
        2,
        share_draws=True,
        staleness_correction="none",
    )
    loss = steps.oracles.cross_entropy(queries, tower(batch), logits, scale=scale).mean()
    assert is_close(gradient, torch.autograd.grad(loss, [scale])[0], 1e-9)
    assert float(gradient) != 0.0


def test_state_carries_no_graph() -> None:
    """Neither the state, nor the draw, nor a metric requires gradient."""
    tower = Tower()
    out = negcache_fn.step(
        warm(tower, 9), queries_of(), documents(5, 1), tower, options=negcache_fn.StepOptions(refresh_stalest=2)
    )
    tensors = [*out.state.values(True, True), *out.draw, *out.metrics.values()]
    assert not any(value.requires_grad for value in tensors)
    assert out.loss.requires_grad


def test_training_lowers_the_loss() -> None:
    """The typical use: fifty steps on a tiny problem."""
    tower, scale = Tower(seed=1), torch.tensor(5.0, requires_grad=True)
    optimizer = torch.optim.Adam([*tower.parameters(), scale], lr=0.02)
    state = negcache_fn.init_cache(32, 6, documents(1, 0))
    losses = []
    for n in range(60):
        batch = documents(8, n % 4)
        out = negcache_fn.step(state, tower(batch), batch, tower, scale=scale, ids=torch.arange(8) + 8 * (n % 4))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = out.state
        losses.append(float(out.metrics["exact_loss"]))
    assert losses[-1] < 0.8 * losses[4]
    assert float(scale.detach()) > 5.0
