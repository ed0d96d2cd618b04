"""The loss with draws for the batch, against exact softmax and the formulas, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import negcache_fn
from tests.support.builders import at_step, is_close, make_state, unit
from tests.support.checks import for_batch
from tests.support.checks.problems import Problem, Scenario, scenarios

sample, loss = negcache_fn.sample_gumbel, negcache_fn.loss
SCENARIOS = scenarios()
ONE_CACHE = {name: it for name, it in SCENARIOS.items() if it.split is None}
every_scenario = pytest.mark.parametrize("name", SCENARIOS)
of_one_cache = pytest.mark.parametrize("name", ONE_CACHE)
corrections = pytest.mark.parametrize("staleness_correction", ["none", "self_normalized"])


@of_one_cache
def test_every_draw_is_exact_where_fresh(name: str) -> None:
    """Value, and gradients to queries, documents of the batch and scale, to 1e-12."""
    for_batch.exact_where_fresh(sample, loss, SCENARIOS[name])


@of_one_cache
def test_all_documents_drawn_are_the_fresh_softmax(name: str) -> None:
    """In value and every gradient, although everything is stale."""
    if SCENARIOS[name].top_k is None and SCENARIOS[name].margin is None:  # those select by stale scores
        for_batch.exact_where_all_are_drawn(sample, loss, SCENARIOS[name])


@every_scenario
@corrections
def test_every_draw_follows_the_formula(name: str, staleness_correction: str) -> None:
    """Under drift too, value and gradient of each set of draws are those of the formulas."""
    for_batch.follows_formula(loss, SCENARIOS[name], staleness_correction=staleness_correction)


@every_scenario
def test_expected_gradient_is_that_of_exact_softmax(name: str) -> None:
    """ "none": over all sets of draws and the law of their threshold, documents' gradients included."""
    for_batch.expected_gradient_exact(loss, SCENARIOS[name])


def test_converges_to_the_fresh_softmax() -> None:
    """ "self_normalized", stale: the enumerated bias falls as M grows."""
    for_batch.converges(loss)


@pytest.mark.parametrize("name", ["plain", "log-weights", "transform", "ids, own positives only", "margin"])
def test_gradcheck(name: str) -> None:
    """In queries, documents, fresh embeddings and scale, the draw held fixed; everything stale."""
    problem = Problem(Scenario(**{**SCENARIOS[name].__dict__, "drift": 0.6}))
    slots = [j for j in range(problem.scenario.capacity) if problem.mass[j] > 0][:2]

    def value(*leaves: Tensor) -> Tensor:
        problem.leaves = dict(zip(("queries", "documents", "encoder", "scale"), leaves, strict=True))
        draw = problem.draw_of_batch(slots, 0.4)
        return problem.call_on(loss, torch.tensor(slots), draw, staleness_correction="self_normalized")

    assert torch.autograd.gradcheck(value, tuple(problem.leaves.values()))


def drifted(rows: int, capacity: int, drift: float, *, scale: float) -> dict[str, Any]:
    """Queries of a few topics, and a cache whose embeddings have drifted by that share of their length."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    unit_length = torch.nn.functional.normalize
    topics = normal(8, 12)
    fresh = unit_length(topics[torch.arange(capacity) % 8] + 0.7 * normal(capacity, 12), dim=1)
    stale = unit_length(fresh + drift * unit_length(normal(capacity, 12), dim=1), dim=1)
    return {
        "queries": unit_length(topics[torch.arange(rows) % 8] + 0.7 * normal(rows, 12), dim=1),
        "documents": unit_length(topics[torch.arange(rows) % 8] + 0.7 * normal(rows, 12), dim=1),
        "fresh": fresh,
        "stale": stale,
        "scale": scale,
    }


def gradients(it: dict[str, Any], num_draws: int, step: int) -> tuple[Tensor, Tensor]:
    """Of the sampled loss: in the queries, and in the fresh embeddings of all documents."""
    queries, fresh = it["queries"].clone().requires_grad_(), it["fresh"].clone().requires_grad_()
    state = at_step(make_state(it["stale"]), step)
    draw = sample(state, queries, num_draws=num_draws, scale=it["scale"])
    value = loss(queries, it["documents"], fresh[draw.slot[0]], draw, scale=it["scale"])
    of_queries, of_fresh = torch.autograd.grad(value, [queries, fresh])
    return of_queries, of_fresh


def exact_gradients(it: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of the softmax over batch and fresh documents."""
    queries, fresh = it["queries"].clone().requires_grad_(), it["fresh"].clone().requires_grad_()
    scores = it["scale"] * torch.cat([queries @ it["documents"].T, queries @ fresh.T], 1)
    of_queries, of_fresh = torch.autograd.grad((scores.logsumexp(1) - scores.diagonal()).mean(), [queries, fresh])
    return of_queries, of_fresh


def test_bias_of_a_stale_cache() -> None:
    """Drift .2, M=64: the mean gradient is the fresh one but for 1 % in the queries, 3 % in documents of a topic."""
    it = drifted(16, 1500, 0.2, scale=8.0)
    right, repeats = exact_gradients(it), 400
    drawn = [gradients(it, 64, step) for step in range(repeats)]
    topics = torch.nn.functional.one_hot(torch.arange(1500) % 8).double().T
    for n, most, parts in ((0, 0.01, torch.eye(16).double()), (1, 0.03, topics)):
        mean, exact = parts @ torch.stack([both[n] for both in drawn]).mean(0), parts @ right[n]
        assert float((mean - exact).norm() / exact.norm()) < most


@pytest.mark.parametrize(("rows", "num_draws", "scale"), [(64, 8, 20.0), (64, 3, 60.0), (8, 2, 20.0)])
def test_few_draws_many_topics_large_scale(rows: int, num_draws: int, scale: float) -> None:
    """Nothing stale, far fewer draws than topics: queries exact for every draw."""
    it = drifted(rows, 600, 0.0, scale=scale)
    right = exact_gradients(it)
    for step in range(100):
        of_queries, of_fresh = gradients(it, num_draws, step)
        assert is_close(of_queries, right[0], 1e-12)
        assert bool(torch.isfinite(of_fresh).all())


@corrections
def test_queries_that_can_use_no_draw(staleness_correction: str) -> None:
    """Their logit is the log-normaliser, with its gradient."""
    state = make_state(torch.eye(6, dtype=torch.float64))
    queries, documents = torch.eye(6, dtype=torch.float64).requires_grad_(), unit(6, 6, 2, torch.float64)
    draw = sample(state, queries, num_draws=2, top_k=1, scale=5.0)
    fresh = draw.embedding[0] + 0.3
    given = loss(
        queries, documents, fresh, draw, scale=5.0, staleness_correction=staleness_correction, reduction="none"
    )
    exact = negcache_fn.exact_loss(state, queries, documents, top_k=1, scale=5.0, reduction="none")
    others = torch.ones(6, dtype=torch.bool)
    others[draw.slot[0]] = False
    assert int(others.sum()) == 4 and not is_close(given[~others], exact[~others], 1e-3)
    assert is_close(given[others], exact[others], 1e-12)
    both = [torch.autograd.grad(value[others].sum(), queries, retain_graph=True)[0] for value in (given, exact)]
    assert is_close(both[0], both[1], 1e-12)


@corrections
@pytest.mark.parametrize("in_batch", [True, False])
def test_empty_cache(staleness_correction: str, in_batch: bool) -> None:
    """The in-batch or zero loss, with finite gradients, whatever was encoded in place of a draw."""
    state, queries, documents = make_state(unit(5, 4, 0), live=[False] * 5), unit(3, 4, 1), unit(3, 4, 2)
    queries.requires_grad_()
    fresh = torch.full((2, 4), math.nan, requires_grad=True)
    draw = sample(state, queries, num_draws=2)
    options: dict[str, Any] = {"in_batch": in_batch, "reduction": "none"}
    given = loss(queries, documents, fresh, draw, staleness_correction=staleness_correction, **options)
    assert is_close(given, negcache_fn.exact_loss(state, queries, documents, **options), 1e-6)
    for gradient in torch.autograd.grad(given.sum(), [queries, fresh]):
        assert bool(torch.isfinite(gradient).all())


def test_own_draws_need_draws_of_each_query() -> None:
    """What is drawn for the batch is shared."""
    state, queries = make_state(unit(5, 4, 0)), unit(3, 4, 1)
    draw = sample(state, queries, num_draws=2)
    with pytest.raises(ValueError, match="share_draws is False without draws_per_query; expected draws_per_query=k"):
        loss(queries, unit(3, 4, 2), draw.embedding[0], draw, share_draws=False)


def test_a_draw_whose_gradient_was_cut_is_refused() -> None:
    """Else the queries would silently learn nothing from the cache."""
    state, queries = make_state(unit(70, 4, seed=0)), unit(3, 4, seed=1).requires_grad_()
    with torch.no_grad():
        draw = sample(state, queries, num_draws=5)
    with pytest.raises(ValueError, match=r"draw.log_normalizer has no gradient; expected that of the queries"):
        loss(queries, unit(3, 4, seed=2), draw.embedding[0], draw)
    assert loss(queries.detach(), unit(3, 4, seed=2), draw.embedding[0], draw).isfinite()
