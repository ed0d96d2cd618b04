"""Checks of `exact_loss`: the materialised loss over a stale cache, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tests.support import oracles
from tests.support.builders import is_close, make_state, unit
from tests.support.checks.problems import Problem, Scenario

ExactLoss = Callable[..., Tensor]


def small(exact_loss: ExactLoss, scenario: Scenario) -> None:
    """Values and gradients of a small stale problem to 1e-12, for each reduction."""
    problem = Problem(scenario)
    leaves = problem.leaves
    state = make_state(problem.stale, live=scenario.live, ids=problem.names, log_weight=problem.cache_weight)
    options = {
        "scale": leaves["scale"],
        "score_transform": scenario.transform,
        "in_batch": scenario.in_batch,
        "ids": problem.ids,
        "log_weights": problem.weights,
        "top_k": scenario.top_k,
        **problem.of_positives,
        **problem.of_negatives,
    }
    if scenario.positives is not None or scenario.margin is not None or scenario.labels is not None:
        options["false_negatives"] = problem.false_negatives
    given = exact_loss(state, leaves["queries"], leaves["documents"], **options, reduction="none")
    logits = oracles.log_normalizer(problem.scores(problem.stale))
    expected = oracles.cross_entropy(
        leaves["queries"],
        leaves["documents"],
        logits,
        ids=scenario.ids,
        log_weights=problem.weights,
        in_batch=scenario.in_batch,
        scale=leaves["scale"],
        transform=scenario.transform,
        hardness=scenario.hardness,
        positives=scenario.positives,
        max_score=problem.max_score,
        targets=scenario.targets,
        weigh_positives=scenario.weigh_positives,
        labels=None if scenario.labels is None else scenario.labels[:2],
    )
    assert is_close(given, expected, 1e-12)
    right, gradients = problem.gradients(expected), problem.gradients(given)
    for name, gradient in right.items():
        assert is_close(gradients[name], gradient, 1e-11), name
    wanted = scenario.targets or [(i,) for i in range(scenario.rows)]
    mean = expected.sum() / max(sum(max(row) >= 0 for row in wanted), 1)
    for reduction, value in (("mean", mean), ("sum", expected.sum())):
        reduced = exact_loss(state, leaves["queries"], leaves["documents"], **options, reduction=reduction)
        assert reduced.shape == ()
        assert is_close(reduced, value, 1e-12)


def large(exact_loss: ExactLoss, capacity: int, top_k: int | None, *, dtype: torch.dtype = torch.float32) -> None:
    """Values and gradients of a large cache with empty slots, log-weights and ids; float32 arithmetic to 1e-5."""
    exactly = torch.float64 if dtype == torch.float64 else torch.float32
    live = torch.arange(capacity) % 5 != 3
    names = torch.where(torch.arange(capacity) % 3 == 0, torch.arange(capacity), -1)
    weight = torch.linspace(-1, 1, capacity)
    state = make_state(unit(capacity, 8, 0, dtype), live=live, ids=names, log_weight=weight)
    queries = unit(4, 8, 1, exactly).requires_grad_()
    documents = unit(6, 8, 2, exactly).requires_grad_()
    scale = torch.tensor(20.0, dtype=exactly, requires_grad=True)
    ids = torch.tensor([0, 3, 7, -1, 60, 0])
    given = exact_loss(state, queries, documents, scale=scale, ids=ids, top_k=top_k, reduction="none")
    twin = [x.detach().double().requires_grad_() for x in (queries, documents, scale)]
    scores = oracles.cache_scores(
        twin[0],
        state["items", "embedding"],
        live=live.tolist(),
        log_weight=weight,
        ids=state["items", "id"].tolist(),
        exclude=oracles.excluded_ids(ids.tolist(), 4, in_batch=True),
        scale=twin[2],
        top_k=top_k,
    )
    expected = oracles.cross_entropy(twin[0], twin[1], oracles.log_normalizer(scores), ids=ids.tolist(), scale=twin[2])
    tolerance = 1e-12 if exactly == torch.float64 else 2e-5
    assert is_close(given, expected, tolerance)
    gradients = torch.autograd.grad(given.sum(), [queries, documents, scale])
    for mine, theirs in zip(gradients, torch.autograd.grad(expected.sum(), twin), strict=True):
        assert is_close(mine, theirs, 10 * tolerance)


def counts_every_class(exact_loss: ExactLoss) -> None:
    """The variants of `small` that a fault is most likely to miss."""
    base = Scenario(documents=4, capacity=5, drift=0.5)
    for change in (
        {},
        {"in_batch": False},
        {"ids": (3, 3, 8, -1), "cache_ids": (8, 3, -1, 6, 7)},
        {"log_weights": (0.5, 0.0, 1.0, -1.0), "cache_log_weight": (1.0, 0.0, -1.0, 0.5, 0.25)},
        {"top_k": 2},
        {"live": (True, False, True, True, False)},
    ):
        small(exact_loss, replace(base, **change))
