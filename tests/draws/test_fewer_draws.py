"""Fewer draws than queries: who draws, the weights, queries that can use no draw, and a step of it."""

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
from negcache_fn._loss.cache_class import estimate_cache_logit, gather_draws
from negcache_fn._ranks.group import ALONE
from negcache_fn._scores.definition import Similarity
from negcache_fn.nn import NegativeCacheLoss
from tests.draws.test_sample import varied
from tests.support import strategies
from tests.support.builders import at_step, is_close, make_state, unit
from tests.support.checks import fewer, losses, steps
from tests.support.checks.problems import Problem, Scenario, scenarios
from tests.support.checks.steps import Tower, documents, warm
from tests.support.options import step_keywords

sample, loss = negcache_fn.sample_gumbel, negcache_fn.loss
CORRECTIONS = ("none", "self_normalized", "unnormalized")
FOUR = Scenario(rows=4, documents=4, capacity=3)
SCENARIOS = {
    **{name: replace(it, draws=1, samples=1) for name, it in scenarios().items()},
    "two of four": replace(FOUR, draws=2),
    "one of four": replace(FOUR, draws=1),
    "all of three": Scenario(rows=3, capacity=3, draws=3),
    "two of four, top_k": replace(FOUR, draws=2, top_k=1, in_batch=False),
    "two of four, nothing for some": replace(
        FOUR, draws=2, ids=(3, 5, 9, 4), cache_ids=(3, -1, 9), live=(True, False, True), in_batch=False
    ),
}
every_scenario = pytest.mark.parametrize("name", SCENARIOS)


@every_scenario
def test_expected_gradient_is_that_of_exact_softmax(name: str) -> None:
    """Over all choices of who draws and all their draws: exact values, and the mean gradient is the exact one."""
    losses.expected_gradient_exact(loss, SCENARIOS[name], share_draws=True, staleness_correction="none")


@every_scenario
def test_self_normalised_value_is_exact_where_fresh(name: str) -> None:
    """Also of queries that can use no draw."""
    losses.values_exact_where_fresh(loss, SCENARIOS[name], share_draws=True)


@every_scenario
@pytest.mark.parametrize("staleness_correction", CORRECTIONS)
def test_every_draw_follows_the_formula(name: str, staleness_correction: str) -> None:
    """Under drift too, value and gradient of each joint draw are those of the formulas."""
    drifted = replace(SCENARIOS[name], drift=0.5)
    losses.follows_formula(loss, drifted, share_draws=True, staleness_correction=staleness_correction)


@pytest.mark.parametrize("few", [{"draws": 1}, {"rows": 4, "documents": 4, "draws": 2}])
def test_unnormalised_is_unbiased_for_the_fresh_partition(few: dict[str, int]) -> None:
    """Where every query can use every draw."""
    scenario = Scenario(in_batch=False, capacity=3, drift=0.7, scale=1.0)
    losses.partition_unbiased(loss, replace(scenario, **few), share_draws=True)


@every_scenario
def test_expected_weights_are_the_probabilities(name: str) -> None:
    """`E[sum over the draws of slot j of w_im] = p_i(j)`, and no weight is above B / M."""
    problem = Problem(SCENARIOS[name])
    queries, encoded = problem.leaves["queries"].detach(), problem.encode().detach()
    similarity = Similarity(torch.float64, problem.leaves["scale"].detach(), problem.scenario.transform)
    mean = torch.zeros_like(problem.stale_scores)
    for slots, chance in problem.outcomes():
        draw, flat = problem.draw(slots), torch.tensor([max(j, 0) for row in slots for j in row])
        pool = gather_draws(encoded[flat], draw, ALONE)
        cache = estimate_cache_logit(
            similarity, queries, encoded[flat], draw, pool, negcache_fn.StepOptions(staleness_correction="none")
        )
        weight = cache.log_importance.exp()
        assert bool((weight <= len(queries) / len(flat) * (1 + 1e-12)).all())
        mean.index_add_(1, flat, chance * weight)
    assert is_close(mean, torch.from_numpy(problem.probability), 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exclude_ids": torch.tensor([1, 5, 200])},
        {"exclude_ids": torch.arange(24)[:, None]},
        {"false_negatives": negcache_fn.FalseNegatives(max_score=torch.linspace(-1, 4, 24))},
        {"top_k": 20},
        {"top_k": 1},
        {"score_transform": torch.sin},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_draws_are_those_of_some_queries(options: dict[str, Any]) -> None:
    """The chosen ones draw what they draw when all do; normalisers, cutoffs and limits are of all."""
    for capacity, num_draws in ((65, 1), (2500, 8), (2500, 24)):
        fewer.those_of_some(sample, varied(capacity), unit(24, 8, 1), num_draws, scale=4.0, **options)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"exclude_ids": torch.tensor([4])}], ids=str)
def test_joint_law(options: dict[str, Any]) -> None:
    """Who draws is uniform, what it draws has the law p_i, and the one does not tell of the other."""
    state = make_state(unit(9, 4, 0), ids=torch.arange(9), log_weight=torch.linspace(-1, 1, 9))
    fewer.joint_law(sample, state, unit(3, 4, 1), scale=2.0, **options)


def test_every_choice_is_as_frequent() -> None:
    """8 subsets of two, two and two queries; 9 of three and three."""
    state = make_state(unit(4, 3, 0))
    fewer.every_choice(sample, state, rows=6, num_draws=3)
    fewer.every_choice(sample, state, rows=6, num_draws=2)


def test_choice_is_a_function_of_seed_step_and_row() -> None:
    """Neither the queries nor how many follow nor the cache change it; seed and step do."""
    small, large = make_state(unit(4, 3, 0)), make_state(unit(300, 3, 1))

    def chosen(state: Any, rows: int = 80, seed: int = 0) -> Tensor:
        return sample(state, unit(rows, 3, seed), num_draws=rows // 4).query

    assert torch.equal(chosen(small), chosen(large, seed=9))
    assert torch.equal(chosen(small, rows=40), chosen(small)[:10])
    assert not torch.equal(chosen(small), chosen(at_step(small, 2)))
    assert not torch.equal(chosen(small), chosen(make_state(unit(4, 3, 0), seed=1)))


@pytest.mark.parametrize("staleness_correction", CORRECTIONS)
def test_as_many_draws_as_queries_are_one_for_each(staleness_correction: str) -> None:
    """The draw, the loss and the step are those without `num_draws`."""
    tower, batch = Tower(), documents(5, 1)
    state, queries = warm(tower, 40, ids=True), unit(3, 6, 77)
    options: dict[str, Any] = {"scale": 9.0, "staleness_correction": staleness_correction}
    without = negcache_fn.step(state, queries, batch, tower, **step_keywords(draws_per_query=1, **options))
    given = negcache_fn.step(state, queries, batch, tower, **step_keywords(num_draws=3, **options))
    for one, other in zip(given.draw, without.draw, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(given.loss, without.loss)
    assert {k: float(v) for k, v in given.metrics.items()} == {k: float(v) for k, v in without.metrics.items()}


def test_encoder_sees_the_draws_alone() -> None:
    """N documents, M drawn and the stalest."""
    seen: list[int] = []
    tower, batch = Tower(), documents(8, 1)

    def encode(features: Any) -> Tensor:
        seen.append(len(features["words"]))
        return tower(features)

    state = warm(tower, 40)
    out = negcache_fn.step(
        state, unit(6, 6, 77), batch, encode, options=negcache_fn.StepOptions(num_draws=2, refresh_stalest=3)
    )
    assert seen == [8 + 2 + 3]
    assert out.draw.slot.shape == (2, 1)
    renewed = state["items", "embedded_at"] != out.state["items", "embedded_at"]
    assert bool(renewed[out.draw.slot.flatten()].all())


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("staleness_correction", CORRECTIONS)
def test_queries_that_can_use_no_draw(in_batch: bool, staleness_correction: str) -> None:
    """With `top_k=1` and different queries: their logit is the log-normaliser, without gradient."""
    state = make_state(torch.eye(6), features=documents(6, 3))
    queries, tower, batch = torch.eye(6, requires_grad=True), Tower(), documents(6, 1)
    options: dict[str, Any] = {"scale": 5.0, "top_k": 1, "in_batch": in_batch}
    out = negcache_fn.step(
        state,
        queries,
        batch,
        tower,
        **step_keywords(num_draws=2, staleness_correction=staleness_correction, reduction="none", **options),
    )
    assert int(out.draw.slot.min()) >= 0
    exact = negcache_fn.exact_loss(state, queries, tower(batch), reduction="none", **options)
    others = torch.ones(6, dtype=torch.bool)
    others[out.draw.query] = False
    assert int(others.sum()) == 4
    assert is_close(out.loss[others], exact[others], 1e-6)
    given = torch.autograd.grad(out.loss[others].sum(), [*tower.parameters(), queries])
    wanted = torch.autograd.grad(exact[others].sum(), list(tower.parameters()))
    assert all(is_close(one, other, 1e-5) for one, other in zip(given, wanted, strict=False))
    assert bool(torch.isfinite(given[-1]).all())
    assert float(out.metrics["effective_sample_size"]) == pytest.approx(2 / 6)


@pytest.mark.parametrize("staleness_correction", CORRECTIONS)
def test_a_query_without_documents_draws_nothing(staleness_correction: str) -> None:
    """Whoever is chosen: in a cache of one document, which is no negative of the first of two queries."""
    tower, batch = Tower(), documents(2, 1)
    state = negcache_fn.init_cache(4, 6, batch)
    state = negcache_fn.update(state, documents(1, 2), tower(documents(1, 2)), ids=torch.tensor([5]))
    chosen = set()
    for step in range(12):
        here, queries = at_step(state, step), unit(2, 6, 77).requires_grad_()
        out = negcache_fn.step(
            here,
            queries,
            batch,
            tower,
            options=negcache_fn.StepOptions(
                num_draws=1, in_batch=False, staleness_correction=staleness_correction, reduction="none"
            ),
            ids=torch.tensor([5, 6]),
            scale=4.0,
        )
        who = int(out.draw.query)
        chosen.add(who)
        assert out.draw.slot.tolist() == [[0 if who == 1 else -1]]
        assert (out.draw.log_normalizer == -math.inf).tolist() == [True, False]
        exact = negcache_fn.exact_loss(
            here, queries, tower(batch), ids=torch.tensor([5, 6]), in_batch=False, reduction="none", scale=4.0
        )
        assert float(out.loss[0].detach()) == 0.0
        shift = {"unnormalized": 2.0}.get(staleness_correction, 1.0) if who == 1 else 1.0  # w = 2 of the one draw
        assert is_close(torch.expm1(out.loss[1]), torch.expm1(exact[1]) * shift, 1e-5)
        for gradient in torch.autograd.grad(out.loss.sum(), [queries, *tower.parameters()]):
            assert bool(torch.isfinite(gradient).all())
        assert all(bool(torch.isfinite(value)) for value in out.metrics.values())
        assert float(out.metrics["effective_sample_size"]) == who
    assert chosen == {0, 1}


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("staleness_correction", CORRECTIONS)
def test_empty_cache(in_batch: bool, staleness_correction: str) -> None:
    """The in-batch or zero loss, finite gradients and metrics."""
    tower, batch = Tower(), documents(5, 1)
    state, queries = negcache_fn.init_cache(9, 6, batch), unit(4, 6, 77).requires_grad_()
    out = negcache_fn.step(
        state,
        queries,
        batch,
        tower,
        options=negcache_fn.StepOptions(
            num_draws=2, in_batch=in_batch, staleness_correction=staleness_correction, refresh_stalest=2
        ),
    )
    expected = steps.oracles.cross_entropy(queries, tower(batch), torch.full((4,), -math.inf), in_batch=in_batch)
    assert is_close(out.loss, expected.mean(), 1e-6)
    assert bool((out.draw.slot == -1).all())
    for gradient in torch.autograd.grad(out.loss, [queries, *tower.parameters()], allow_unused=True):
        assert gradient is None or bool(torch.isfinite(gradient).all())
    assert all(bool(torch.isfinite(value)) for value in out.metrics.values())


@given(case=strategies.cases(), data=st.data())
def test_any_draw(case: strategies.Case, data: st.DataObject) -> None:
    """Nothing stale: the exact loss; "unnormalized" is between that of the batch and that of B caches."""
    rows = len(case.queries)
    num_draws = data.draw(st.sampled_from([m for m in range(1, rows + 1) if rows % m == 0]))
    options = case.sample_options | {"draws_per_query": None, "replacement": True}
    draw = sample(case.state, case.queries, num_draws=num_draws, **options)
    assert not any(bool(torch.isnan(value).any()) for value in draw if value.is_floating_point())
    exact = negcache_fn.exact_loss(case.state, case.queries, case.documents, **case.exact_options)
    negatives = draw.embedding.flatten(0, 1).to(case.queries.dtype)
    tolerance = 1e-12 if case.queries.dtype == torch.float64 else 2e-6
    size = 1 + case.scale

    def value(draw: negcache_fn.Draw, correction: str) -> Tensor:
        given = loss(
            *(case.queries, case.documents, negatives, draw), staleness_correction=correction, **case.loss_options
        )
        assert bool(torch.isfinite(given).all())
        return given

    for correction in ("none", "self_normalized"):
        assert is_close(value(draw, correction), exact, tolerance, size), correction
    given = value(draw, "unnormalized")
    nothing = draw._replace(log_normalizer=torch.full_like(draw.log_normalizer, -math.inf))
    most = draw._replace(log_normalizer=draw.log_normalizer + math.log(rows))
    slack = 10 * tolerance * size
    assert bool((given >= value(nothing, "none") - slack).all())
    assert bool((given <= value(most, "none") + slack).all())


def test_fewer_draws_do_not_merge() -> None:
    """Caches of other seeds choose other queries."""
    queries = unit(4, 8, 1)
    some, whole = (sample(varied(40, seed=n), queries, num_draws=m) for n, m in ((1, 2), (2, 4)))
    for a, b, name in ((some, whole, "a"), (whole, some, "b")):
        with pytest.raises(ValueError, match=rf"^{name} has draws of 2 of 4 queries; expected .* other queries"):
            negcache_fn.merge_draws(a, b)
    merged = negcache_fn.merge_draws(whole, sample(varied(40, seed=3), queries, draws_per_query=1))
    assert merged.slot.shape == (4, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_draws": 3}, "num_draws is 3; expected a divisor of 4, the number of queries"),
        ({"num_draws": 8}, "num_draws is 8; expected a divisor of 4, the number of queries"),
        ({"num_draws": 0}, "num_draws is 0; expected at least 1"),
        ({"num_draws": 2, "draws_per_query": 2}, "num_draws is 2 with draws_per_query=2; expected one of them"),
        ({"num_draws": 2, "replacement": False}, "num_draws is 2 with replacement=False; expected"),
    ],
)
def test_errors(options: dict[str, Any], says: str) -> None:
    """What does not fit is said where it is given."""
    queries, batch, tower = unit(4, 6, 1), documents(5, 1), Tower()
    state = warm(tower, 40)
    with pytest.raises(ValueError, match=says):
        sample(state, queries, **options)
    for function in (negcache_fn.step, negcache_fn.step_):
        with pytest.raises(ValueError, match=says):
            function(state, queries, batch, tower, **step_keywords(**options))


def test_errors_of_types_and_sharing() -> None:
    """A number of draws is an integer, and draws of some are for all."""
    queries, batch, tower = unit(4, 6, 1), documents(5, 1), Tower()
    state = warm(tower, 40)
    with pytest.raises(TypeError, match=r"num_draws is 2\.0, a float; expected an integer"):
        sample(state, queries, num_draws=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_draws is 2 with share_draws=False; expected share_draws=True"):
        negcache_fn.step(state, queries, batch, tower, options=negcache_fn.StepOptions(num_draws=2, share_draws=False))
    draw = sample(state, queries, num_draws=2)
    own = tower(batch).detach()
    with pytest.raises(ValueError, match="share_draws is False, and 2 of 4 queries have drawn; expected"):
        loss(queries, own, draw.embedding[:, 0], draw, share_draws=False)
    with pytest.raises(ValueError, match=r"negatives has shape \(4, 6\); expected \[2, 6\]"):
        loss(queries, own, queries, draw)
    with pytest.raises(ValueError, match=r"queries has shape \(2, 6\); expected \[4, 6\]"):
        loss(queries[:2], own, queries[:2], draw)


def test_option_of_the_module() -> None:
    """It goes by the name that it has in `step`."""
    criterion = NegativeCacheLoss(warm(Tower(), 40), options=negcache_fn.StepOptions(num_draws=1, top_k=5))
    value = criterion(unit(4, 6, 1), documents(5, 1), Tower())
    assert bool(torch.isfinite(value)) and "num_draws=1" in repr(criterion)
