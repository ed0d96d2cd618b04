"""The loss: every joint draw enumerated against exact softmax, and `exact_loss` against the materialised one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import negcache_fn
from tests.support import oracles, strategies
from tests.support.builders import is_close, make_state, unit
from tests.support.checks import exact, losses
from tests.support.checks.problems import Problem, scenarios

SCENARIOS = scenarios()
CORRECTIONS = ("none", "self_normalized")
every_scenario = pytest.mark.parametrize("name", SCENARIOS)
share = pytest.mark.parametrize("share_draws", [True, False], ids=["shared", "own"])


@every_scenario
@share
def test_expected_gradient_is_that_of_exact_softmax(name: str, share_draws: bool) -> None:
    """Nothing stale, no correction: exact value for every draw, exact gradient in expectation."""
    losses.expected_gradient_exact(
        negcache_fn.loss, SCENARIOS[name], share_draws=share_draws, staleness_correction="none"
    )


@every_scenario
def test_expected_gradient_of_own_draws_self_normalised(name: str) -> None:
    """Own weights sum to one already, so normalising keeps value and expected gradient."""
    losses.expected_gradient_exact(
        negcache_fn.loss, SCENARIOS[name], share_draws=False, staleness_correction="self_normalized"
    )


@every_scenario
def test_self_normalised_value_is_exact_where_fresh(name: str) -> None:
    """With shared draws the value stays exact for each draw."""
    losses.values_exact_where_fresh(negcache_fn.loss, SCENARIOS[name], share_draws=True)


@every_scenario
@share
@pytest.mark.parametrize("staleness_correction", CORRECTIONS)
def test_every_draw_follows_the_formula(name: str, share_draws: bool, staleness_correction: str) -> None:
    """Under drift too, value and gradient of each joint draw are those written in the design."""
    drifted = replace(SCENARIOS[name], drift=0.5)
    losses.follows_formula(
        negcache_fn.loss, drifted, share_draws=share_draws, staleness_correction=staleness_correction
    )


@share
def test_self_normalised_bias_falls_with_more_draws(share_draws: bool) -> None:
    """Enumerated exactly, against the softmax over fresh embeddings."""
    losses.converges_to_fresh(negcache_fn.loss, share_draws=share_draws)


@share
@pytest.mark.parametrize("staleness_correction", ["self_normalized"])
def test_error_against_fresh_falls_as_one_over_root_k(share_draws: bool, staleness_correction: str) -> None:
    """Sampled with thousands of draws."""
    losses.converges_in_sampling(negcache_fn.loss, staleness_correction, share_draws=share_draws)


@pytest.mark.parametrize("name", ["plain", "ids", "all at once"])
def test_reductions(name: str) -> None:
    """`mean` and `sum` are those of `none`, 0-d."""
    problem = Problem(SCENARIOS[name])
    slots, _ = next(oracles.joint_outcomes(problem.probability, problem.scenario.samples))
    rows = problem.call(negcache_fn.loss, slots)
    for reduction, expected in (("mean", rows.mean()), ("sum", rows.sum())):
        given_value = problem.call(negcache_fn.loss, slots, reduction=reduction)
        assert given_value.shape == ()
        assert is_close(given_value, expected, 1e-14)
    assert torch.equal(
        problem.call(negcache_fn.loss, slots),
        problem.call(negcache_fn.loss, slots, share_draws=True, staleness_correction="self_normalized"),
    ), "the defaults are shared draws, self-normalised"


@share
@pytest.mark.parametrize("staleness_correction", CORRECTIONS)
@pytest.mark.parametrize("in_batch", [True, False])
def test_empty_cache_gives_in_batch_or_zero_loss(share_draws: bool, staleness_correction: str, in_batch: bool) -> None:
    """Never NaN, in value or in any gradient."""
    state = make_state(torch.full((5, 4), 7.0), live=[False] * 5)
    leaves = [unit(3, 4, 1).requires_grad_(), unit(4, 4, 2).requires_grad_(), unit(6, 4, 3).requires_grad_()]
    scale = torch.tensor(5.0, requires_grad=True)
    draw = negcache_fn.sample_gumbel(state, leaves[0], draws_per_query=2, scale=scale)
    value = negcache_fn.loss(
        *leaves,
        draw,
        scale=scale,
        in_batch=in_batch,
        share_draws=share_draws,
        staleness_correction=staleness_correction,
        reduction="none",
    )
    expected = oracles.cross_entropy(
        leaves[0], leaves[1], torch.full((3,), -math.inf), in_batch=in_batch, scale=5.0
    ).detach()
    assert is_close(value, expected, 1e-6)
    if not in_batch:
        assert torch.equal(value, torch.zeros(3))
    gradients = torch.autograd.grad(value.sum(), [*leaves, scale], allow_unused=True)
    for gradient in gradients:
        assert gradient is None or bool(torch.isfinite(gradient).all())
    assert gradients[2] is None or not bool(gradients[2].any())


@share
@pytest.mark.parametrize("staleness_correction", CORRECTIONS)
@given(data=st.data())
def test_any_state_and_batch_is_finite(data: st.DataObject, share_draws: bool, staleness_correction: str) -> None:
    """Extreme logits, ties, duplicates, empty slots, every storage: finite value and gradients, and not negative."""
    case = data.draw(strategies.cases())
    options = case.loss_options | {"share_draws": share_draws, "staleness_correction": staleness_correction}
    queries = case.queries.clone().requires_grad_()
    documents = case.documents.clone().requires_grad_()
    draw = negcache_fn.sample_gumbel(case.state, queries, **case.sample_options)
    negatives = draw.embedding.flatten(0, 1).to(queries.dtype).detach().nan_to_num().requires_grad_()
    value = negcache_fn.loss(queries, documents, negatives, draw, **options)
    assert value.shape == (len(queries),)
    assert bool(torch.isfinite(value).all())
    for gradient in torch.autograd.grad(value.sum(), [queries, documents, negatives], allow_unused=True):
        assert gradient is None or bool(torch.isfinite(gradient).all())
    expected = negcache_fn.exact_loss(case.state, case.queries, case.documents, **case.exact_options)
    assert bool(torch.isfinite(expected).all())
    if staleness_correction == "none" or (case.top_k is None and staleness_correction == "self_normalized"):
        tolerance = 1e-9 if case.queries.dtype == torch.float64 else 3e-4
        assert is_close(value, expected, tolerance), "nothing is stale: the value is the exact loss"


@pytest.mark.parametrize("correction", ["self_normalized"])
@share
def test_extreme_drift_does_not_overflow(correction: str, share_draws: bool) -> None:
    """At scale 1000 in float32 `exp(f - g)` is far beyond float32; the logit `L + f - g` is not.

    One query, one draw: the weight is one and `c = L + f - g`, whatever the correction.
    """
    state = make_state(unit(1, 4, 0))
    queries, documents, negatives = (unit(1, 4, n).requires_grad_() for n in (1, 2, 3))
    for sign in (1.0, -1.0):
        draw = negcache_fn.sample_gumbel(state, queries, draws_per_query=1, scale=1000.0 * sign)
        options: dict[str, Any] = {"share_draws": share_draws, "staleness_correction": correction}
        value = negcache_fn.loss(queries, documents, negatives, draw, scale=1000.0 * sign, **options)
        fresh = 1000.0 * sign * (queries.double() * negatives.double()).sum(-1)
        expected = oracles.cross_entropy(queries, documents, fresh, scale=1000.0 * sign).mean()
        assert is_close(value, expected, 1e-4)
        leaves = [queries, documents, negatives]
        given_gradient = torch.autograd.grad(value, leaves)
        for mine, right in zip(given_gradient, torch.autograd.grad(expected, leaves), strict=True):
            assert is_close(mine, right, 1e-3)


@every_scenario
def test_exact_loss_against_the_naive_one(name: str) -> None:
    """Value and gradient with respect to queries, documents and scale in float64, stale cache."""
    if SCENARIOS[name].split is None:
        exact.small(negcache_fn.exact_loss, replace(SCENARIOS[name], drift=0.5))


@pytest.mark.parametrize("capacity", [1, 63, 65, 1000, 2500, 5000])
@pytest.mark.parametrize("top_k", [None, 1, 50])
def test_exact_loss_streams_over_large_caches(capacity: int, top_k: int | None) -> None:
    """Capacities that are no multiple of any block or chunk."""
    exact.large(negcache_fn.exact_loss, capacity, None if top_k is None else min(top_k, capacity))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_exact_loss_in_every_storage(dtype: torch.dtype) -> None:
    """Stored bytes are what is scored, accumulated in float32 or wider."""
    exact.large(negcache_fn.exact_loss, 300, None, dtype=dtype)


@pytest.mark.parametrize("in_batch", [True, False])
def test_exact_loss_of_an_empty_cache(in_batch: bool) -> None:
    """In-batch or zero, with finite gradients."""
    state = make_state(torch.full((5, 4), 7.0), live=[False] * 5)
    leaves: list[Tensor] = [unit(3, 4, 1).requires_grad_(), unit(3, 4, 2).requires_grad_()]
    scale = torch.tensor(5.0, requires_grad=True)
    value = negcache_fn.exact_loss(state, *leaves, scale=scale, in_batch=in_batch, reduction="none")
    expected = oracles.cross_entropy(*leaves, torch.full((3,), -math.inf), in_batch=in_batch, scale=5.0)
    assert is_close(value, expected, 1e-6)
    for gradient in torch.autograd.grad(value.sum(), [*leaves, scale], allow_unused=True):
        assert gradient is None or bool(torch.isfinite(gradient).all())
