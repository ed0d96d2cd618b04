"""Checks of draws for the batch, and of the loss made of them, against the exact law and softmax in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn import Draw
from tests.support import oracles
from tests.support.builders import at_step, is_close
from tests.support.checks.draws import Sampler, exact_scores
from tests.support.checks.problems import Loss, Problem, Scenario


def many(
    sample: Sampler, state: TensorDictBase, queries: Tensor, *, steps: int, first_step: int = 1, **options: Any
) -> Draw:
    """A draw at each of some steps, as rows."""
    found = [sample(at_step(state, first_step + step), queries, **options) for step in range(steps)]
    kept = ("slot", "score", "perturbed", "threshold", "source")
    return found[0]._replace(**{name: torch.cat([getattr(draw, name) for draw in found]) for name in kept})


def mass_of(state: TensorDictBase, queries: Tensor, importance: Tensor | None, **options: Any) -> np.ndarray:
    """`[C]` masses of a state, from its stored bytes."""
    importance = torch.ones(len(queries)) if importance is None else importance
    return oracles.masses(exact_scores(state, queries, **options), importance)


def ordered_law(
    sample: Sampler,
    state: TensorDictBase,
    queries: Tensor,
    *,
    num_draws: int,
    importance: Tensor | None = None,
    steps: int = 1500,
    **options: Any,
) -> None:
    """Chi-square over all ordered draws against Plackett-Luce (`oracles.FALSE_ALARM`)."""
    law = dict(oracles.ordered_draws(mass_of(state, queries, importance, **options), num_draws))
    found = many(sample, state, queries, steps=steps, num_draws=num_draws, importance=importance, **options)
    seen = dict.fromkeys(law, 0)
    for row in found.slot.tolist():
        drawn = tuple(j for j in row if j >= 0)
        assert drawn in seen, f"drew {drawn}"
        seen[drawn] += 1
    counts, chances = np.array(list(seen.values()), dtype=float), np.array(list(law.values()))
    assert abs(chances.sum() - 1) < 1e-9
    assert oracles.chi_square_pvalue(counts, chances) > oracles.FALSE_ALARM


def race(draws: Draw, mass: np.ndarray) -> np.ndarray:
    """`[n, 2 M + 1]` uniforms made of slots, perturbed masses and threshold, independent if their law is the right one.

    `exp(-perturbed)` are the first arrivals of a race in which document j has the rate `a_j`: each gap between arrivals
    is exponential, its rate that of all who are still to come, and who arrives is independent of it.
    """
    rng = np.random.default_rng(0)
    rates = np.repeat(mass[None], len(draws.slot), 0)
    arrivals = torch.exp(-torch.cat([draws.perturbed, draws.threshold], 1).double()).numpy()
    columns, before, rows = [], np.zeros(len(rates)), np.arange(len(rates))
    for place in range(arrivals.shape[1]):
        left = rates.sum(1)
        columns.append(np.exp(-(arrivals[:, place] - before) * left))
        before = arrivals[:, place]
        if place < draws.slot.shape[1]:
            slot = draws.slot[:, place].numpy()
            own = rates[rows, slot]
            columns.append((rates.cumsum(1)[rows, slot] - own * rng.random(len(slot))) / left)
            rates[rows, slot] = 0.0
    return np.stack(columns, 1)


def race_law(
    sample: Sampler,
    state: TensorDictBase,
    queries: Tensor,
    *,
    num_draws: int,
    importance: Tensor | None = None,
    steps: int = 800,
    **options: Any,
) -> None:
    """The whole joint law: Kolmogorov-Smirnov of each uniform, chi-square of each pair (`oracles.FALSE_ALARM` each)."""
    found = many(sample, state, queries, steps=steps, num_draws=num_draws, importance=importance, **options)
    follows_race(found, mass_of(state, queries, importance, **options))


def follows_race(found: Draw, mass: np.ndarray) -> None:
    """`race` of the draws is uniform and independent."""
    uniforms = race(found, mass)
    for column in uniforms.T:
        assert stats.kstest(column, "uniform").pvalue > oracles.FALSE_ALARM
    for a, b in itertools.combinations(uniforms.T, 2):
        cells, _, _ = np.histogram2d(a, b, bins=4, range=((0, 1), (0, 1)))
        assert oracles.chi_square_pvalue(cells.ravel(), np.full(16, 1 / 16)) > oracles.FALSE_ALARM


def inclusion(sample: Sampler, state: TensorDictBase, queries: Tensor, *, num_draws: int, steps: int = 1500) -> None:
    """`E[sum of r_m over draws of document j] = 1` for every document, within 6 standard errors."""
    found = many(sample, state, queries, steps=steps, num_draws=num_draws)
    inverse = -1 / torch.expm1(-torch.exp(found.score.double() - found.threshold.double()))
    each = torch.zeros(steps, len(state["items", "id"]), dtype=torch.float64).scatter(1, found.slot, inverse)
    error = each.std(0) / steps**0.5
    assert bool(((each.mean(0) - 1).abs() <= 6 * error + 1e-9).all())


def fields(sample: Sampler, state: TensorDictBase, queries: Tensor, *, tolerance: float = 2e-5, **options: Any) -> Draw:
    """Each field says what the drawn slot is; all documents if there are no more than M."""
    draw = sample(state, queries, **options)
    num_draws, importance = options.pop("num_draws"), options.pop("importance", None)
    scores = exact_scores(state, queries, **options)
    mass = mass_of(state, queries, importance, **options)
    size, items = 1 + float(options.get("scale", 1.0)), state["items"]
    assert draw.for_batch and draw.slot.shape == (1, num_draws) and draw.slot.dtype == torch.int64
    assert is_close(draw.log_normalizer, oracles.log_normalizer(scores), tolerance, size)
    ranked = torch.cat([draw.perturbed, draw.threshold], 1)[0]
    possible = int((scores > -torch.inf).any(0).sum())
    assert torch.equal(ranked > -torch.inf, torch.arange(num_draws + 1) < possible)
    assert torch.equal(draw.slot[0] >= 0, torch.arange(num_draws) < possible)
    assert bool((ranked[1:] <= ranked[:-1]).all())
    drawn = [slot for slot in draw.slot[0].tolist() if slot >= 0]
    assert len(set(drawn)) == len(drawn)
    for m, slot in enumerate(drawn):
        assert bool((scores[:, slot] > -torch.inf).any()), "an impossible slot was drawn"
        if mass[slot] > 0:
            assert is_close(draw.score[0, m], torch.tensor(np.log(mass[slot])), tolerance, size)
        assert torch.equal(draw.embedding[0, m], items["embedding"][slot])
        assert int(draw.id[0, m]) == int(items["id"][slot])
        assert float(draw.log_weight[0, m]) == float(items["log_weight"][slot])
    assert draw.cutoff.shape == draw.max_score.shape == (len(queries), 1)
    return draw


def merged_law(
    sample: Sampler,
    merge: Callable[[Draw, Draw], Draw],
    states: Sequence[TensorDictBase],
    queries: Tensor,
    *,
    num_draws: int,
    steps: int = 800,
    **options: Any,
) -> None:
    """A merged draw is the draw of the union, each cache having the importance of its share: the law of the race."""
    start = torch.tensor([0, *(len(state["items", "id"]) for state in states)]).cumsum(0)
    scores = [exact_scores(state, queries, **options) for state in states]
    whole = oracles.log_normalizer(torch.cat(scores, 1))
    shares = [(oracles.log_normalizer(part) - whole).exp() for part in scores]
    found = []
    for step in range(1, steps + 1):
        parts = [
            sample(at_step(state, step), queries, num_draws=num_draws, importance=share, **options)
            for state, share in zip(states, shares, strict=True)
        ]
        merged = functools.reduce(merge, parts)
        found.append(merged._replace(slot=merged.slot + start[merged.source]))
    assert is_close(found[0].log_normalizer, whole, 2e-5)
    kept = ("slot", "perturbed", "threshold")
    rows = found[0]._replace(**{name: torch.cat([getattr(draw, name) for draw in found]) for name in kept})
    follows_race(rows, oracles.masses(torch.cat(scores, 1), torch.ones(len(queries))))


def _agree(problem: Problem, given: Tensor, expected: Tensor, tolerance: float, names: Sequence[str] = ()) -> None:
    assert is_close(given, expected, tolerance), "value"
    right = problem.gradients(expected)
    for name, gradient in problem.gradients(given).items():
        if not names or name in names:
            assert is_close(gradient, right[name], tolerance), f"gradient of {name}"


def _drawn(draw: Draw, problem: Problem) -> Tensor:
    """Which documents of the problem, whose parts a merged draw counts separately."""
    start = torch.tensor([first for first, _ in problem.parts])
    return torch.where(draw.slot >= 0, draw.slot + start[draw.source], 0).flatten()


def exact_where_fresh(sample: Sampler, loss: Loss, scenario: Scenario, *, draws: Sequence[int] = (1, 2, 3)) -> None:
    """Every draw: value and the gradients to queries, documents of the batch and scale are those of exact softmax."""
    for num_draws in draws:
        for step in (1, 2, 3):
            for correction in ("none", "self_normalized"):
                problem = Problem(replace(scenario, drift=0.0))
                draw = problem.sampled_for_batch(sample, num_draws, step=step)
                given = problem.call_on(loss, _drawn(draw, problem), draw, staleness_correction=correction)
                _agree(problem, given, problem.exact(), 1e-12, ("queries", "documents", "scale"))


def exact_where_all_are_drawn(sample: Sampler, loss: Loss, scenario: Scenario) -> None:
    """At least as many draws as documents: the softmax over the *fresh* scores, in value and all gradients."""
    for extra in (0, 3):
        problem = Problem(replace(scenario, drift=0.7))
        draw = problem.sampled_for_batch(sample, scenario.capacity + extra)
        given = problem.call_on(loss, _drawn(draw, problem), draw, staleness_correction="self_normalized")
        _agree(problem, given, problem.exact(), 1e-12)


def follows_formula(loss: Loss, scenario: Scenario, *, staleness_correction: str) -> None:
    """Value and gradients of every set of draws, at several thresholds, are those of the formulas, stale or not."""
    problem = Problem(replace(scenario, drift=0.5))
    support = [j for j in range(scenario.capacity) if problem.mass[j] > 0]
    for count in (1, 2):
        for slots in itertools.permutations(support, min(count, len(support))):
            for threshold in (-0.7, 1.3):
                options = {"staleness_correction": staleness_correction}
                expected = problem.by_formula_of_batch(slots, threshold, **options)
                missing = [-1] * (count - len(slots))
                draw, flat = (
                    problem.draw_of_batch([*slots, *missing], threshold),
                    torch.tensor([*slots, *(0 for _ in missing)]),
                )
                _agree(problem, problem.call_on(loss, flat, draw, **options), expected, 1e-11)


def expectation(loss: Loss, problem: Problem, draws: int, correction: str) -> tuple[Tensor, float]:
    """`[B]` the expected loss over all sets of draws and the law of the threshold, and the total probability."""
    mean, total = torch.zeros(problem.scenario.rows, dtype=torch.float64), 0.0
    for slots, thresholds, weights in oracles.sets_of_draws(problem.mass, draws):
        missing = [-1] * (draws - len(slots))
        draw, flat = problem.draw_of_batch([*slots, *missing], 0.0), torch.tensor([*slots, *(0 for _ in missing)])

        def value(threshold: Tensor, flat: Tensor = flat, draw: Draw = draw) -> Tensor:
            here = draw._replace(threshold=threshold.view(1, 1))
            return problem.call_on(loss, flat, here, staleness_correction=correction)

        losses = torch.func.vmap(value)(torch.from_numpy(thresholds))
        mean, total = mean + torch.from_numpy(weights) @ losses, total + float(weights.sum())
    return mean, total


def expected_gradient_exact(loss: Loss, scenario: Scenario) -> None:
    """ "none", nothing stale: the mean over all draws has the exact value and gradients, documents' included."""
    for draws in (1, 2):
        problem = Problem(replace(scenario, drift=0.0))
        mean, total = expectation(loss, problem, draws, "none")
        assert abs(total - 1) < 1e-12
        _agree(problem, mean, problem.exact(), 1e-12)


def converges(loss: Loss) -> None:
    """ "self_normalized", stale: value and gradients approach those of the fresh softmax as M grows, enumerated."""
    problem = Problem(Scenario(rows=2, documents=2, capacity=6, drift=0.8, scale=1.5, seed=3))
    exact = problem.exact()
    right = torch.cat([gradient.flatten() for gradient in problem.gradients(exact).values()])
    errors = []
    for draws in (1, 2, 3, 4, 5, 6):
        mean, total = expectation(loss, problem, draws, "self_normalized")
        assert abs(total - 1) < 1e-12
        given = torch.cat([gradient.flatten() for gradient in problem.gradients(mean).values()])
        errors.append((float((mean - exact).abs().max().detach()), float((given - right).norm() / right.norm())))
    for of_kind in zip(*errors, strict=True):
        assert of_kind[0] > 1e-3, "the problem shows nothing"
        assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(of_kind)), of_kind
        assert of_kind[-1] < 1e-12
