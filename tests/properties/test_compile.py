"""A whole train step compiles into one graph, once, and computes what eager computes."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import compilation_time_metrics

import negcache_fn
from tests.support import strategies
from tests.support.builders import at_step, is_close
from tests.support.checks.steps import Tower, documents
from tests.support.options import step_keywords

pytestmark = pytest.mark.no_cover  # with which compiling takes half as long again
ROWS, TOTAL, CAPACITY, STEPS = 3, 5, 150, 5

VARIANTS: dict[str, dict[str, Any]] = {
    "shared, ids, stalest": {"draws_per_query": 2, "ids": True, "refresh_stalest": 3},
    "top_k, transform, own": {
        "top_k": 20,
        "score_transform": strategies.soft_cap,
        "draws_per_query": 4,
        "share_draws": False,
        "staleness_correction": "none",
        "in_batch": False,
        "ids": True,
        "evict": "fifo",
    },
    "false negatives": {
        "priorities": True,
        "draws_per_query": 2,
        "ids": True,
        "false_negatives": True,
        "refresh_stalest": 0.02,
    },
    "batch, ids, stalest": {"num_draws": 7, "ids": True, "false_negatives": True, "refresh_stalest": 3},
    "batch, top_k": {"num_draws": 4, "top_k": 9, "in_batch": False, "staleness_correction": "none"},
    "batch, transform": {"score_transform": strategies.soft_cap, "ids": True},
    "hardness": {"num_draws": 4, "ids": True, "log_weights": True, "hardness": 2.0},
    "positives": {"num_draws": 4, "ids": True, "positive_rows": True, "log_weights": True, "weigh_positives": False},
    "positives of own": {"draws_per_query": 2, "ids": True, "positive_rows": True, "in_batch": False},
    "labels": {"num_draws": 4, "false_negatives": "labels"},
    "labels, each query": {"draws_per_query": 2, "top_k": 9, "false_negatives": "labels"},
    "weights, mask": {"draws_per_query": 1, "log_weights": True, "cacheable": True},
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """No compiled code from another test; inductor imported, which warns of torch's own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def options_at(n: int, variant: dict[str, Any]) -> dict[str, Any]:
    """The variant's options, per-step tensors made for step n."""
    made = {
        "ids": torch.arange(TOTAL) * 7 % 11 + 5 * n,
        "log_weights": torch.linspace(-1, 1, TOTAL) * n,
        "cacheable": torch.arange(TOTAL) != n,
        "positive_rows": torch.tensor([[0, 3], [4, -1], [-1, -1 if n % 2 else 2]]),
        "priorities": torch.linspace(0, 1, CAPACITY) * n,
        "false_negatives": negcache_fn.FalseNegatives(
            torch.arange(20 * ROWS).view(ROWS, 20) % 7 + 5 * n - 9, lambda positive: positive + 4.0
        ),
    }
    return {key: made.get(key, value) if value is True else value for key, value in variant.items()}


def train(
    function: Callable[..., negcache_fn.StepOutput], variant: dict[str, Any], wrap: Callable[..., Any]
) -> tuple[list[torch.Tensor], TensorDictBase, Tower, list[dict[str, torch.Tensor]]]:
    """Five optimiser steps, with fresh options each; `wrap` compiles the towers, the step and the loss, or nothing."""
    queries_tower, tower, scale = Tower(seed=1), Tower(seed=2), torch.nn.Parameter(torch.tensor(8.0))
    optimizer = torch.optim.SGD([*queries_tower.parameters(), *tower.parameters(), scale], lr=0.05)
    state = negcache_fn.init_cache(CAPACITY, 6, documents(1, 0), seed=4)

    def forward(state: TensorDictBase, questions: Any, batch: Any, options: dict[str, Any]) -> Any:
        return function(state, queries_tower(questions), batch, tower, scale=scale, **options)

    def labels_at(n: int, state: TensorDictBase) -> negcache_fn.FalseNegatives:
        cached = state["items", "features", "words"][:, 0]  # a view of what the step may write
        labels = documents(TOTAL, n)["words"][:, 0]
        return negcache_fn.FalseNegatives(labels=negcache_fn.Labels(labels[:ROWS], labels, cached))

    forward = wrap(forward)
    losses, metrics = [], []
    for n in range(STEPS):
        options = options_at(n, variant)
        if options.get("false_negatives") == "labels":
            options["false_negatives"] = labels_at(n, state)
        out = forward(state, documents(ROWS, 100 + n), documents(TOTAL, n), step_keywords(**options))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = out.state
        losses.append(out.loss.detach())
        metrics.append(out.metrics)
    return losses, state, tower, metrics


CASES = [
    pytest.param("inductor", "shared, ids, stalest", False, id="inductor-step"),
    pytest.param("inductor", "top_k, transform, own", True, id="inductor-step_-top_k"),
    pytest.param("inductor", "false negatives", True, id="inductor-step_-false-negatives"),
    pytest.param("inductor", "batch, ids, stalest", True, id="inductor-step_-batch"),
    pytest.param("inductor", "batch, top_k", False, id="inductor-step-batch-top_k"),
    pytest.param("inductor", "batch, transform", True, id="inductor-step_-batch-transform"),
    pytest.param("aot_eager", "batch, ids, stalest", False, id="aot_eager-step-batch"),
    pytest.param("aot_eager", "batch, top_k", True, id="aot_eager-step_-batch-top_k"),
    pytest.param("aot_eager", "batch, transform", False, id="aot_eager-step-batch-transform"),
    pytest.param("aot_eager", "shared, ids, stalest", True, id="aot_eager-step_"),
    pytest.param("aot_eager", "top_k, transform, own", False, id="aot_eager-step-top_k"),
    pytest.param("inductor", "labels", True, id="inductor-step_-labels"),
    pytest.param("aot_eager", "labels, each query", False, id="aot_eager-step-labels"),
    pytest.param("inductor", "positives", True, id="inductor-step_-positives"),
    pytest.param("aot_eager", "positives of own", False, id="aot_eager-step-positives"),
    pytest.param("aot_eager", "weights, mask", False, id="aot_eager-step-weights"),
]


@pytest.mark.parametrize(("backend", "name", "in_place"), CASES)
def test_train_step_is_one_frame_and_equals_eager(backend: str, name: str, in_place: bool) -> None:
    """`fullgraph=True` over five steps: one compiled frame, no warning, the losses, state and weights of eager."""
    function = negcache_fn.step_ if in_place else negcache_fn.step
    expected = train(function, VARIANTS[name], lambda f: f)
    counter = CompileCounterWithBackend(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = train(function, VARIANTS[name], lambda f: torch.compile(f, fullgraph=True, backend=counter))
    assert counter.frame_count == 1
    for one, other in zip(given[0], expected[0], strict=True):
        assert is_close(one, other, 1e-5)
    left, right = dict(given[1].items(True, True)), dict(expected[1].items(True, True))
    for key, value in right.items():
        assert is_close(left[key], value, 1e-4) if value.is_floating_point() else torch.equal(left[key], value), key
    assert given[1].is_locked
    for one, other in zip(given[2].parameters(), expected[2].parameters(), strict=True):
        assert is_close(one, other, 1e-4)
    for one, other in zip(given[3], expected[3], strict=True):
        assert all(is_close(one[key], other[key], 1e-4) for key in other)


@pytest.mark.parametrize("kind", ["for each query", "for the batch"])
def test_sizes_may_vary_without_a_new_frame(kind: str) -> None:
    """`dynamic=True`: every size, the number of draws and `top_k` among them, may change without a new graph.

    That graph is traced once: an option that is a float by default would be a variable at first, then a constant.
    """
    compilation_time_metrics.clear()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(negcache_fn.step_, fullgraph=True, dynamic=True, backend=counter)
    tower, frames = Tower(), []
    for queries, capacity, samples, top_k in ((3, 150, 2, 20), (5, 400, 3, 30), (4, 230, 4, 25)):
        rows = queries
        options = {"num_draws": samples + 1} if kind == "for the batch" else {"draws_per_query": samples}
        outputs = []
        for function in (step, negcache_fn.step_):
            state = negcache_fn.init_cache(capacity, 6, documents(1, 0), seed=4)
            for n in range(2):
                questions, batch = documents(rows, 100 + n), documents(rows + 2, n)
                out = function(
                    state,
                    tower(questions).detach(),
                    batch,
                    tower,
                    ids=torch.arange(rows + 2),
                    options=negcache_fn.StepOptions(top_k=top_k, **options),
                )
            outputs.append(out)
        assert is_close(outputs[0].loss.detach(), outputs[1].loss.detach(), 1e-5)
        assert torch.equal(outputs[0].draw.slot, outputs[1].draw.slot)
        frames.append(counter.frame_count)
    assert frames[2] == frames[1] == frames[0]
    assert "compile_attempt_0" in compilation_time_metrics
    assert "compile_attempt_1" not in compilation_time_metrics


def test_pieces_compile() -> None:
    """Sampling, mining, exact loss and update, each a full graph, without inductor."""
    state = negcache_fn.init_cache(CAPACITY, 6, documents(1, 0))
    tower = Tower()
    for n in range(3):
        batch = documents(40, n)
        state = negcache_fn.update(state, batch, tower(batch).detach())
    queries, own = tower(documents(ROWS, 9)).detach(), tower(documents(TOTAL, 10)).detach()
    later = at_step(state, 99)
    calls: dict[str, Callable[..., Any]] = {
        "score": lambda s: negcache_fn.score(s, queries, scale=5.0),
        "sample": lambda s: negcache_fn.sample_gumbel(s, queries, scale=5.0, draws_per_query=2),
        "sample for the batch": lambda s: negcache_fn.sample_gumbel(s, queries, scale=5.0, num_draws=7),
        "mine": lambda s: negcache_fn.top_negatives(s, queries, 7, scale=5.0),
        "sample without false negatives": lambda s: negcache_fn.sample_gumbel(
            s, queries, scale=5.0, false_negatives=negcache_fn.FalseNegatives(torch.ones(ROWS, 2).long(), 1.0)
        ),
        "exact with a margin": lambda s: negcache_fn.exact_loss(
            s, queries, own, scale=5.0, false_negatives=negcache_fn.FalseNegatives(max_score=lambda p: p + 1.0)
        ),
        "ages": lambda s: negcache_fn.age_histogram(s, bins=6),
        "exact": lambda s: negcache_fn.exact_loss(s, queries, own, scale=5.0),
        "update": lambda s: negcache_fn.update(s, batch, tower(batch).detach(), evict="fifo"),
        "views": lambda s: (negcache_fn.stalest(s, 5), negcache_fn.occupancy(s), negcache_fn.take(s, torch.arange(4))),
        "merge": lambda s: negcache_fn.merge_draws(
            negcache_fn.sample_gumbel(s, queries, scale=5.0), negcache_fn.sample_gumbel(later, queries, scale=5.0)
        ),
    }
    for name, call in calls.items():
        expected, given = call(state), torch.compile(call, fullgraph=True, backend="eager")(state)
        for one, other in zip(leaves(given), leaves(expected), strict=True):
            assert is_close(one, other, 1e-6) if one.is_floating_point() else torch.equal(one, other), name


def leaves(value: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, TensorDictBase):
        return [item for _, item in sorted(value.items(True, True), key=lambda pair: str(pair[0]))]
    return [leaf for item in value for leaf in leaves(item)]


def test_a_transform_makes_few_parts_of_a_graph() -> None:
    """A part for every 8192 slots, however small the parts are that an eager step reads."""
    operators: list[int] = []
    for capacity in (8192, 3 * 8192):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(negcache_fn.exact_loss, fullgraph=True, backend=counter)
        state = negcache_fn.init_cache(capacity, 6, documents(1, 0))
        embeddings = torch.ones(ROWS, 6)
        compiled(state, embeddings, embeddings, score_transform=strategies.soft_cap, in_batch=False)
        operators.append(counter.op_count)
    assert operators[1] - operators[0] < 40
