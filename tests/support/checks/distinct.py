"""Checks of draws without replacement, and of the loss made of them, against the exact law in float64."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn import Draw
from tests.support import oracles
from tests.support.builders import at_step, is_close, make_state
from tests.support.checks.draws import Sampler, exact_scores, repeated
from tests.support.checks.problems import Loss, Problem, Scenario

NODES_APART = {1: 0.2, 2: 0.45}
"""By the number of queries: their quadrature is right to 1e-7 where probabilities are above 0.05."""


def many(
    sample: Sampler,
    state: TensorDictBase,
    queries: Tensor,
    *,
    steps: int,
    copies: int,
    first_step: int = 1,
    **options: Any,
) -> list[Draw]:
    """Draws of `copies` rows of each query at each of some steps."""
    options = repeated(options, copies) | {"replacement": False}
    rows = queries.repeat(copies, 1)
    return [sample(at_step(state, first_step + step), rows, **options) for step in range(steps)]


def ordered_law(
    sample: Sampler,
    state: TensorDictBase,
    queries: Tensor,
    *,
    draws_per_query: int,
    steps: int = 2,
    copies: int = 1200,
    **options: Any,
) -> None:
    """Chi-square over all ordered draws against Plackett-Luce, for each query (`oracles.FALSE_ALARM` each)."""
    exact = oracles.probabilities(exact_scores(state, queries, **options))
    found = many(sample, state, queries, steps=steps, copies=copies, draws_per_query=draws_per_query, **options)
    slots = torch.cat([draw.slot.view(copies, len(queries), -1) for draw in found])
    for i in range(len(queries)):
        law = dict(oracles.ordered_draws(exact[i], draws_per_query))
        seen = dict.fromkeys(law, 0)
        for row in slots[:, i].tolist():
            drawn = tuple(j for j in row if j >= 0)
            assert drawn in seen, f"query {i} drew {drawn}"
            seen[drawn] += 1
        counts, chances = np.array(list(seen.values()), dtype=float), np.array(list(law.values()))
        assert abs(chances.sum() - 1) < 1e-9
        assert oracles.chi_square_pvalue(counts, chances) > oracles.FALSE_ALARM, f"query {i}"


def race(draw: Draw, scores: Tensor) -> np.ndarray:
    """`[B, 2k + 1]` uniforms made of slots, perturbed scores and threshold, independent if their law is the right one.

    `exp(-perturbed)` are the first arrivals of a race in which document j has the rate `exp(s_j)`: each gap between
    arrivals is exponential, its rate that of all who are still to come, and who arrives is independent of it.
    """
    rng = np.random.default_rng(0)
    rates = torch.exp(scores.double()).numpy()
    arrivals = torch.exp(-torch.cat([draw.perturbed, draw.threshold], 1).double()).numpy()
    columns, before = [], np.zeros(len(rates))
    for place in range(arrivals.shape[1]):
        left = rates.sum(1)
        columns.append(np.exp(-(arrivals[:, place] - before) * left))
        before = arrivals[:, place]
        if place < draw.slot.shape[1]:
            slot = draw.slot[:, place].numpy()
            upto = rates.cumsum(1)[np.arange(len(slot)), slot]
            own = rates[np.arange(len(slot)), slot]
            columns.append((upto - own * rng.random(len(slot))) / left)
            rates[np.arange(len(slot)), slot] = 0.0
    return np.stack(columns, 1)


def race_law(
    sample: Sampler,
    state: TensorDictBase,
    queries: Tensor,
    *,
    draws_per_query: int,
    steps: int = 2,
    copies: int = 1000,
    **options: Any,
) -> None:
    """The whole joint law: Kolmogorov-Smirnov of each uniform, chi-square of each pair (`oracles.FALSE_ALARM` each)."""
    scores = exact_scores(state, queries, **options)
    found = many(sample, state, queries, steps=steps, copies=copies, draws_per_query=draws_per_query, **options)
    uniforms = np.concatenate([race(draw, scores.repeat(copies, 1)) for draw in found])
    for column in uniforms.T:
        assert stats.kstest(column, "uniform").pvalue > oracles.FALSE_ALARM
    for a, b in itertools.combinations(uniforms.T, 2):
        cells, _, _ = np.histogram2d(a, b, bins=4, range=((0, 1), (0, 1)))
        assert oracles.chi_square_pvalue(cells.ravel(), np.full(16, 1 / 16)) > oracles.FALSE_ALARM


def nested(sample: Sampler, state: TensorDictBase, queries: Tensor, **options: Any) -> None:
    """More draws are the same ones and others: the next is where the threshold was. The first is that of one sample."""
    longest = sample(state, queries, draws_per_query=6, replacement=False, **options)
    ranked = torch.cat([longest.perturbed, longest.threshold], 1)
    for k in range(1, 6):
        draw = sample(state, queries, draws_per_query=k, replacement=False, **options)
        assert torch.equal(draw.slot, longest.slot[:, :k])
        assert torch.equal(torch.cat([draw.perturbed, draw.threshold], 1), ranked[:, : k + 1])
    assert torch.equal(longest.slot[:, :1], sample(state, queries, draws_per_query=1, **options).slot)


def merged_law(
    sample: Sampler,
    merge: Callable[[Draw, Draw], Draw],
    states: list[TensorDictBase],
    queries: Tensor,
    *,
    draws_per_query: int,
    scale: float,
    copies: int = 1500,
) -> None:
    """A merged draw is the draw of the union: the law of the race over the slots of all caches."""
    start = torch.tensor([0, *(len(state["items", "id"]) for state in states)]).cumsum(0)
    scores = torch.cat([exact_scores(state, queries, scale=scale) for state in states], 1).repeat(copies, 1)
    columns = []
    for step in range(1, 3):
        options = {"steps": 1, "copies": copies, "draws_per_query": draws_per_query, "scale": scale}
        parts = [many(sample, state, queries, first_step=step, **options)[0] for state in states]
        merged = functools.reduce(merge, parts)
        assert is_close(merged.log_normalizer, oracles.log_normalizer(scores), 2e-5)
        columns.append(race(merged._replace(slot=merged.slot + start[merged.source]), scores))
    for column in np.concatenate(columns).T:
        assert stats.kstest(column, "uniform").pvalue > oracles.FALSE_ALARM


def _with_largest(draw: Draw, last: Tensor, threshold: Tensor) -> Draw:
    """A draw without replacement: only the last of its perturbed scores, and the next one, are of use."""
    return draw._replace(perturbed=last[:, None].expand_as(draw.slot), threshold=threshold[:, None])


def expected_gradient_exact(
    loss: Loss, scenario: Scenario, *, share_draws: bool, staleness_correction: str = "none", tolerance: float = 1e-6
) -> None:
    """Over all sets of draws and the law of their thresholds: exact values, and the mean gradient is the exact one."""
    problem = Problem(scenario)
    exact = problem.exact()
    rows, total = scenario.rows, 0.0
    of_queries = [list(oracles.distinct_draws(row, scenario.samples, NODES_APART[rows])) for row in problem.probability]
    mean = {name: torch.zeros_like(leaf) for name, leaf in problem.leaves.items()}
    for outcomes in itertools.product(*of_queries):
        slots = [drawn for drawn, *_ in outcomes]
        grid = np.meshgrid(*(np.arange(len(chance)) for *_, chance in outcomes), indexing="ij")
        nodes = [place.ravel() for place in grid]
        last, threshold = (
            problem.normalizer
            + torch.from_numpy(np.stack([one[n][at] for one, at in zip(outcomes, nodes, strict=True)], 1))
            for n in (1, 2)
        )
        chance = torch.from_numpy(np.prod([one[3][at] for one, at in zip(outcomes, nodes, strict=True)], axis=0))
        draw, flat = problem.draw(slots), torch.tensor(slots).clamp(min=0).flatten()

        def value(last: Tensor, threshold: Tensor, flat: Tensor = flat, draw: Draw = draw) -> Tensor:
            options = {"share_draws": share_draws, "staleness_correction": staleness_correction}
            return problem.call_on(loss, flat, _with_largest(draw, last, threshold), **options)

        losses = torch.func.vmap(value)(last, threshold)
        assert is_close(losses, exact.expand_as(losses), 1e-12), f"value at {slots}"
        for name, gradient in problem.gradients(chance @ losses).items():
            mean[name] += gradient
        total += float(chance.sum())
    assert abs(total - 1) < tolerance
    for name, gradient in problem.gradients(exact).items():
        assert is_close(mean[name], gradient, tolerance), f"gradient of {name}"


def follows_formula(loss: Loss, scenario: Scenario, *, share_draws: bool, staleness_correction: str) -> None:
    """Value and gradient of some draws with any thresholds are those of the design's formulas, stale or not."""
    problem, generator = Problem(scenario), torch.Generator().manual_seed(scenario.seed)
    of_queries = [list(oracles.ordered_draws(row, scenario.samples)) for row in problem.probability]
    for _ in range(12):
        slots, largest = [], []
        for i, outcomes in enumerate(of_queries):
            drawn = list(outcomes[int(torch.randint(len(outcomes), (), generator=generator))][0])
            left = int((problem.probability[i] > 0).sum()) - scenario.samples
            last, gap = (3 * torch.rand(2, generator=generator, dtype=torch.float64)).tolist()
            last = float(problem.normalizer[i]) + last - 3.0 if left >= 0 else -math.inf
            largest.append((last, last - gap if left > 0 else -math.inf))
            slots.append(drawn + [-1] * (scenario.samples - len(drawn)))
        limits = torch.tensor(largest, dtype=torch.float64)
        draw = _with_largest(problem.draw(slots), limits[:, 0], limits[:, 1])
        options: dict[str, Any] = {"share_draws": share_draws, "staleness_correction": staleness_correction}
        given = problem.call_on(loss, torch.tensor(slots).clamp(min=0).flatten(), draw, **options)
        expected = problem.by_formula(slots, largest=largest, **options)
        assert is_close(given, expected, 1e-11), f"value at {slots}"
        right = problem.gradients(expected)
        for name, gradient in problem.gradients(given).items():
            assert is_close(gradient, right[name], 1e-11), f"gradient of {name} at {slots}"


def sampled(sample: Sampler, problem: Problem, copies: int, step: int = 1) -> tuple[Draw, Any]:
    """`copies` joint draws of the problem's queries, [copies, B, ...], and the dimensions to map over."""
    it, rows = problem.scenario, problem.scenario.rows
    state = make_state(problem.stale.detach(), live=it.live, ids=problem.names, log_weight=problem.cache_weight)
    options: dict[str, Any] = {"exclude_ids": None}
    if problem.ids is not None:
        options["exclude_ids"] = problem.ids if it.in_batch else problem.ids[:rows, None]
    limit = None if problem.max_score is None else torch.tensor(problem.max_score, dtype=torch.float64)
    options["false_negatives"] = problem.false_negatives._replace(max_score=limit)
    draw = sample(
        at_step(state, step),
        problem.leaves["queries"].detach().repeat(copies, 1),
        draws_per_query=it.samples,
        replacement=False,
        scale=it.scale,
        score_transform=it.transform,
        top_k=it.top_k,
        **repeated(options, copies),
    )
    draw = draw._replace(query=torch.arange(rows))  # of each joint draw
    dimensions = Draw(*[0] * len(Draw._fields))._replace(query=None)
    if draw.exclude_ids.shape[0] == 1:  # for all
        dimensions = dimensions._replace(exclude_ids=None)
    shaped = [
        values if dimension is None else values.view(copies, rows, *values.shape[1:])
        for values, dimension in zip(draw, dimensions, strict=True)
    ]
    return Draw(*shaped), dimensions


def unbiased(sample: Sampler, loss: Loss, scenario: Scenario, *, share_draws: bool, copies: int = 4000) -> None:
    """Sampled: the mean gradient over many joint draws is the exact one, within 6 standard errors each.

    Of a right estimator whose means are normal, one component fails with probability 2e-9. Own draws need k >= 3: the
    moments of their weights are finite up to order k only.
    """
    problem = Problem(scenario)
    draws, dimensions = sampled(sample, problem, copies)

    def gradient(leaves: dict[str, Tensor], draw: Draw) -> dict[str, Tensor]:
        def value(leaves: dict[str, Tensor]) -> Tensor:
            here = copy.copy(problem)
            here.leaves = leaves
            flat = draw.slot.clamp(min=0).flatten()
            options = {"share_draws": share_draws, "staleness_correction": "none"}
            return (problem.row_weight * here.call_on(loss, flat, draw, **options)).sum()

        return torch.func.grad(value)(leaves)

    leaves = {name: leaf.detach() for name, leaf in problem.leaves.items()}
    given = torch.func.vmap(gradient, in_dims=(None, dimensions))(leaves, draws)
    exact = problem.gradients(problem.exact())
    for name in problem.leaves:
        samples, expected = given[name].reshape(copies, -1), exact[name].flatten()
        error = samples.std(0) / math.sqrt(copies)
        assert bool(((samples.mean(0) - expected).abs() <= 6 * error + 1e-9).all()), f"gradient of {name}"


def exact_where_all_are_drawn(sample: Sampler, loss: Loss, scenario: Scenario, *, share_draws: bool) -> None:
    """Where no query has more than k documents every draw gives the softmax over the fresh scores, to 1e-12.

    "none" gives the exact loss where nothing is stale; the others where everything is.
    """
    for correction, drift in (("none", 0.0), ("self_normalized", 0.7), ("unnormalized", 0.7)):
        problem = Problem(replace(scenario, drift=drift))
        assert int((problem.probability > 0).sum(1).max()) <= scenario.samples
        exact = problem.exact()
        right = problem.gradients(exact)
        for step in (1, 2, 3):
            draws, dimensions = sampled(sample, problem, 1, step)
            pairs = zip(draws, dimensions, strict=True)
            draw = Draw(*(values if dimension is None else values[0] for values, dimension in pairs))
            options: dict[str, Any] = {"share_draws": share_draws, "staleness_correction": correction}
            given = problem.call_on(loss, draw.slot.clamp(min=0).flatten(), draw, **options)
            assert is_close(given, exact, 1e-12), correction
            for name, gradient in problem.gradients(given).items():
                assert is_close(gradient, right[name], 1e-12), f"{correction}, gradient of {name}"
