"""Checks of the sampled loss: every joint draw enumerated in float64, against exact softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.builders import relative_error
from tests.support.checks.problems import Loss, Problem, Scenario

EXACT = 1e-12


def _agree(given: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT) -> None:
    for name, gradient in given.items():
        assert bool(torch.isfinite(gradient).all()), name
        floor = max(float(expected[name].abs().max()), 1.0)
        error = float((gradient - expected[name]).abs().max()) / floor
        assert error < tolerance, f"gradient of {name}: {error:.1e}"


def expected_gradient_exact(loss: Loss, scenario: Scenario, *, share_draws: bool, staleness_correction: str) -> None:
    """Over all joint draws: each value is the exact loss, and the mean gradient is its gradient, to 1e-12."""
    problem = Problem(scenario)
    exact = problem.exact()
    expectation, total = torch.zeros(scenario.rows, dtype=torch.float64), 0.0
    for slots, chance in problem.outcomes():
        given = problem.call(loss, slots, share_draws=share_draws, staleness_correction=staleness_correction)
        assert given.shape == (scenario.rows,)
        assert relative_error(given, exact) < EXACT, f"value at {slots}"
        expectation, total = expectation + chance * given, total + chance
    assert abs(total - 1) < EXACT
    _agree(problem.gradients(expectation), problem.gradients(exact))


def values_exact_where_fresh(loss: Loss, scenario: Scenario, *, share_draws: bool) -> None:
    """`self_normalized` has the exact value for every single draw where nothing is stale."""
    problem = Problem(scenario)
    exact = problem.exact().detach()
    for slots, _ in problem.outcomes():
        given = problem.call(loss, slots, share_draws=share_draws, staleness_correction="self_normalized")
        assert relative_error(given, exact) < EXACT, f"value at {slots}"


def follows_formula(loss: Loss, scenario: Scenario, *, share_draws: bool, staleness_correction: str) -> None:
    """Value and gradient of every single joint draw are those of the design's formulas, stale or not."""
    problem = Problem(scenario)
    options: dict[str, Any] = {"share_draws": share_draws, "staleness_correction": staleness_correction}
    for slots, _ in problem.outcomes():
        given, expected = problem.call(loss, slots, **options), problem.by_formula(slots, **options)
        assert relative_error(given, expected) < 1e-11, f"value at {slots}"
        _agree(problem.gradients(given), problem.gradients(expected), 1e-11)


def bias(loss: Loss, scenario: Scenario, *, share_draws: bool, staleness_correction: str) -> tuple[float, float]:
    """Bias of expected value and gradient against the *fresh* exact loss, relative, by enumeration."""
    problem = Problem(scenario)
    mean = torch.zeros(scenario.rows, dtype=torch.float64)
    for slots, chance in problem.outcomes():
        options = {"share_draws": share_draws, "staleness_correction": staleness_correction}
        mean = mean + chance * problem.call(loss, slots, **options)
    exact = problem.exact()
    value = float(((mean - exact).norm() / exact.norm()).detach())
    given, fresh = (torch.cat([g.flatten() for g in problem.gradients(x).values()]) for x in (mean, exact))
    return value, float((given - fresh).norm() / fresh.norm())


def converges_to_fresh(loss: Loss, *, share_draws: bool) -> None:
    """`self_normalized` under drift: its bias against the fresh softmax, enumerated, falls like 1/k for one query.

    "none" keeps its bias for any k. With shared draws the other query's draws count too, so it falls more slowly.
    """
    rows, ks = (2, (1, 2, 3)) if share_draws else (1, (1, 2, 4))
    values, gradients = [], []
    for k in ks:
        small = Scenario(rows=rows, documents=2, capacity=3, samples=k, drift=0.8, scale=1.5, seed=3)
        value, gradient = bias(loss, small, share_draws=share_draws, staleness_correction="self_normalized")
        values.append(value)
        gradients.append(gradient)
        uncorrected, _ = bias(loss, small, share_draws=share_draws, staleness_correction="none")
        assert uncorrected > 3 * value
    for seen in (values, gradients):
        assert seen[0] > 1e-4, "the problem shows nothing"
        if share_draws:
            assert seen[0] > 1.1 * seen[1] > 1.1 * 1.05 * seen[2]
        else:
            assert 0.4 < seen[1] / seen[0] < 0.6
            assert 0.2 < seen[2] / seen[0] < 0.3


def converges_in_sampling(loss: Loss, staleness_correction: str, *, share_draws: bool, repeats: int = 16) -> None:
    """With k = 100 and 6400 exact draws the error against the fresh loss falls by about sqrt(64) = 8.

    Root mean squares over 2 x 16 errors each have a relative standard error of about 1/8; between 4 and 16 is more than
    5 of them. The mean at k = 6400 is within 6 standard errors plus the 1/k bias.
    """
    problem = Problem(Scenario(capacity=12, documents=3, drift=0.8, scale=1.5, seed=3))
    exact = problem.exact().detach()
    generator = torch.Generator().manual_seed(5)
    chances = torch.from_numpy(problem.probability)
    spread = {}
    for k in (100, 6400):
        errors = []
        for _ in range(repeats):
            slots = torch.multinomial(chances, k, replacement=True, generator=generator)
            options: dict[str, Any] = {"share_draws": share_draws, "staleness_correction": staleness_correction}
            with torch.no_grad():
                errors.append(problem.call(loss, slots.tolist(), **options) - exact)
        error = torch.stack(errors)
        spread[k] = float(error.square().mean().sqrt())
        standard = error.std(0) / repeats**0.5
        assert bool((error.mean(0).abs() < 6 * standard + 2.0 / k).all())
    assert 4 < spread[100] / spread[6400] < 16
