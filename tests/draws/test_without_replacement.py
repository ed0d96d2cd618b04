"""Draws without replacement: their law, their weights, and queries with fewer documents than draws."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import negcache_fn
from negcache_fn._cache import select
from negcache_fn._draws import gumbel_tree
from negcache_fn._loss import cache_class
from tests.draws.test_sample import varied
from tests.support import strategies
from tests.support.builders import is_close, make_state, unit
from tests.support.checks import distinct, draws, steps
from tests.support.checks.problems import Scenario, scenarios
from tests.support.checks.steps import Tower, documents
from tests.support.options import step_keywords

sample, loss = negcache_fn.sample_gumbel, negcache_fn.loss
SCENARIOS = scenarios()
share = pytest.mark.parametrize("share_draws", [True, False], ids=["shared", "own"])
CORRECTIONS = ("none", "self_normalized", "unnormalized")
PLACES = {
    "one block": [0, 1, 2, 3, 4],
    "one group": [0, 70, 130, 1000, 1023],
    "many groups": [5, 1030, 1031, 2047, 2499],
}


def sparse(places: list[int], *, ties: bool = False, seed: int = 0) -> Any:
    """A state of 2500 slots whose few documents are in the slots `places`."""
    embedding, live = torch.full((2500, 4), 7.0), torch.zeros(2500, dtype=torch.bool)
    embedding[places] = unit(1 if ties else len(places), 4, 0).expand(len(places), 4)
    live[places] = True
    weights = torch.linspace(-1, 1, 2500) * (not ties)
    return make_state(embedding, live=live, ids=torch.arange(2500), log_weight=weights, seed=seed)


@pytest.mark.parametrize("draws_per_query", [1, 2, 3])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_law_of_ordered_draws(places: list[int], draws_per_query: int) -> None:
    """Each ordered draw of k of five documents has the chance of Plackett-Luce, wherever they are in the tree."""
    distinct.ordered_law(sample, sparse(places), unit(2, 4, 1), draws_per_query=draws_per_query, scale=2.0)


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_ids": torch.tensor([1031, 7])},
        {"exclude_ids": torch.tensor([[5, 1031], [2499, -1]])},
        {"false_negatives": negcache_fn.FalseNegatives(max_score=torch.tensor([0.5, 1.0]))},
        {"false_negatives": negcache_fn.FalseNegatives(torch.tensor([[5], [1030]]), 1.5)},
        {"top_k": 3},
        {"top_k": 4, "exclude_ids": torch.tensor([[5, 1031], [2499, -1]])},
        {"score_transform": torch.sin},
    ],
    ids=lambda options: "+".join(options),
)
def test_law_with_exclusions_and_limits(options: dict[str, Any]) -> None:
    """What is no negative is not among them, and the others are as if it was not there."""
    distinct.ordered_law(sample, sparse(PLACES["many groups"]), unit(2, 4, 1), draws_per_query=2, scale=2.0, **options)


def test_law_of_ties() -> None:
    """Equal documents: all orders alike."""
    distinct.ordered_law(sample, sparse([5, 6, 1030, 1095, 2400], ties=True), unit(2, 4, 1), draws_per_query=3)


@pytest.mark.parametrize("scale", [0.1, 5.0, 20.0])
@pytest.mark.parametrize("capacity", [65, 5000])
def test_joint_law_of_slots_and_perturbed_scores(capacity: int, scale: float) -> None:
    """Slots, perturbed scores and threshold together, where the draws are too many to count."""
    distinct.race_law(sample, varied(capacity), unit(2, 8, 1), draws_per_query=4, scale=scale)


def test_joint_law_restricted_to_the_best() -> None:
    """With `top_k`, and in float64."""
    distinct.race_law(sample, varied(2500), unit(2, 8, 1), draws_per_query=4, scale=5.0, top_k=20)
    queries = unit(2, 8, 1, torch.float64)
    distinct.race_law(sample, varied(200, torch.float64), queries, draws_per_query=3, scale=5.0, copies=500)


@pytest.mark.parametrize("top_k", [None, 9])
def test_more_draws_are_the_same_and_others(top_k: int | None) -> None:
    """The next one is where the threshold was; the first is that of one sample with replacement."""
    for state, queries in ((varied(2500), unit(9, 8, 1)), (sparse([3, 1030, 2000]), unit(9, 4, 1))):
        distinct.nested(sample, state, queries, scale=5.0, top_k=top_k)


@given(case=strategies.cases(max_scale=10_000.0))
def test_fields_of_any_draw(case: strategies.Case) -> None:
    """Live, not excluded, different; all of them if there are no more than k."""
    tolerance = 1e-14 if case.queries.dtype == torch.float64 else 2e-6
    options = case.sample_options | {"replacement": False, "top_k": None}
    for draws_per_query in (case.draws_per_query, 40):
        draw = draws.fields(
            sample, case.state, case.queries, tolerance=tolerance, **options | {"draws_per_query": draws_per_query}
        )
        assert not any(bool(torch.isnan(value).any()) for value in draw if value.is_floating_point())
    restricted = sample(case.state, case.queries, **case.sample_options | {"replacement": False})
    for row in restricted.slot.tolist():
        drawn = [slot for slot in row if slot >= 0]
        assert len(set(drawn)) == len(drawn)


def test_fewer_documents_than_draws() -> None:
    """All of them, then -1; without any, -1 alone and a normaliser of -inf."""
    state, queries = sparse([5, 1030]), unit(3, 4, 1)
    excluded = torch.tensor([[-1, -1], [5, -1], [5, 1030]])
    draw = sample(state, queries, draws_per_query=4, replacement=False, exclude_ids=excluded)
    assert draw.slot.sort(dim=1).values.tolist() == [[-1, -1, 5, 1030], [-1, -1, -1, 1030], [-1] * 4]
    assert torch.equal(draw.threshold, torch.full((3, 1), -math.inf))
    assert torch.equal(draw.log_normalizer == -math.inf, torch.tensor([False, False, True]))
    none_left = sample(state, queries, draws_per_query=2, replacement=False)
    assert bool((none_left.slot >= 0).all())
    assert torch.equal(none_left.threshold, torch.full((3, 1), -math.inf))
    one_left = sample(state, queries, draws_per_query=1, replacement=False)
    assert torch.equal(one_left.threshold, none_left.perturbed[:, 1:])


@pytest.mark.parametrize("segment", [4096, 8192])
def test_segments_do_not_show(segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups of a long cache are chosen a segment at a time."""
    state, queries = varied(20_000), unit(30, 8, 1)
    whole = sample(state, queries, draws_per_query=5, replacement=False, scale=4.0)
    monkeypatch.setattr(select, "_SEGMENT", segment)
    parts = sample(state, queries, draws_per_query=5, replacement=False, scale=4.0)
    for name, one, other in zip(whole._fields, whole, parts, strict=True):
        assert is_close(one, other, 1e-6) if name == "log_normalizer" else torch.equal(one, other), name


def test_merged_draws_are_draws_of_the_union() -> None:
    """Of two and of three caches of different sizes, one with fewer documents than draws."""
    states = [varied(100, seed=1), varied(3, seed=2), varied(300, seed=3)]
    for some in (states[:2], states):
        distinct.merged_law(sample, negcache_fn.merge_draws, some, unit(1, 8, 1), draws_per_query=4, scale=4.0)


def test_merging_is_associative_and_commutative() -> None:
    """Up to the numbers of the sources; the empty draw changes nothing."""
    queries, merge = unit(5, 8, 1), negcache_fn.merge_draws
    a, b, c = (
        sample(varied(n, seed=n), queries, draws_per_query=4, replacement=False, scale=4.0) for n in (30, 3, 110)
    )
    for one, other in ((merge(merge(a, b), c), merge(a, merge(b, c))), (merge(a, b), merge(b, a))):
        for name in ("slot", "score", "perturbed", "threshold", "embedding", "id", "log_weight"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    nothing = sample(make_state(unit(5, 8, 0), live=[False] * 5, seed=2), queries, draws_per_query=4, replacement=False)
    for one in (merge(a, nothing), merge(nothing, a)):
        for name in ("slot", "perturbed", "threshold", "log_normalizer"):
            assert torch.equal(getattr(one, name), getattr(a, name)), name
    short = merge(b, nothing)
    assert torch.equal(short.slot, b.slot)
    assert torch.equal(short.threshold, b.threshold)


@pytest.mark.parametrize("replacement", [True, False])
def test_the_two_kinds_do_not_merge(replacement: bool) -> None:
    """Their perturbed scores mean different things."""
    states = (varied(30, seed=1), varied(30, seed=2))
    a, b = (
        sample(state, unit(2, 8, 1), draws_per_query=2, replacement=kind)
        for state, kind in zip(states, (replacement, not replacement), strict=True)
    )
    with pytest.raises(ValueError, match=f"b was drawn with{'out' * replacement} replacement and a with"):
        negcache_fn.merge_draws(a, b)


@share
@pytest.mark.parametrize("staleness_correction", CORRECTIONS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_draw_follows_the_formula(name: str, share_draws: bool, staleness_correction: str) -> None:
    """Under drift too, value and gradient are those written in the design, whatever the thresholds."""
    for samples in (1, 2, 3):
        scenario = replace(SCENARIOS[name], drift=0.5, samples=samples, seed=samples)
        distinct.follows_formula(loss, scenario, share_draws=share_draws, staleness_correction=staleness_correction)


ONE = Scenario(rows=1, documents=1, capacity=4, scale=1.0)
TWO = Scenario(rows=2, documents=2, capacity=3, scale=1.0)
INTEGRATED = {
    "one query": (ONE, None),
    "one query, two draws": (replace(ONE, samples=2), None),
    "one query, log-weights, an empty slot": (
        replace(ONE, capacity=5, cache_log_weight=(0.5, -0.5, 0.0, 0.2, 0.1), live=(True, True, False, True, True)),
        None,
    ),
    "two queries": (TWO, True),
    "two queries, two draws": (replace(TWO, samples=2, scale=0.5), None),
    "two queries, one cannot draw all": (
        replace(TWO, in_batch=False, ids=(3, 5), cache_ids=(5, -1, 9), positives=((9,), (-1,)), samples=2),
        None,
    ),
    "two queries, top_k": (replace(TWO, capacity=4, top_k=3, in_batch=False, samples=2), None),
}


@pytest.mark.parametrize("name", INTEGRATED)
@share
def test_expected_gradient_is_that_of_exact_softmax(name: str, share_draws: bool) -> None:
    """Every set of draws, integrated over the law of the thresholds: the exact value, and in the mean its gradient."""
    scenario, only = INTEGRATED[name]
    if only is None or only == share_draws:
        distinct.expected_gradient_exact(loss, scenario, share_draws=share_draws)


SAMPLED = {
    "plain": Scenario(capacity=7, samples=3),
    "three queries, transform": Scenario(rows=3, capacity=9, samples=4, transform=strategies.soft_cap),
    "uneven": Scenario(
        capacity=7,
        samples=3,
        in_batch=False,
        ids=(3, 5, 9),
        cache_ids=(5, -1, 9, 3, 7, 8, -1),
        positives=((8, 7, -1), (-1, -1, -1)),
        live=(True, True, False, True, True, True, True),
    ),
    "log-weights, duplicates": Scenario(
        documents=5,
        capacity=6,
        samples=3,
        ids=(3, 3, 8, 8, -1),
        cache_ids=(-1, 4, 8, -1, 2, 3),
        cache_log_weight=(1.5, 0.0, -0.75, 0.5, 0.25, 0.0),
    ),
    "top_k": Scenario(capacity=9, samples=3, top_k=5, scale=1.5),
    "margin": Scenario(capacity=9, samples=3, margin=0.6, scale=1.5),
    "sharp": Scenario(capacity=9, samples=3, scale=8.0),
}


@pytest.mark.parametrize("name", SAMPLED)
@share
def test_mean_gradient_of_real_draws(name: str, share_draws: bool) -> None:
    """Sampled from the cache, with thresholds as they come."""
    distinct.unbiased(sample, loss, SAMPLED[name], share_draws=share_draws)


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.split is None])
@share
def test_all_documents_drawn_is_exact_softmax(name: str, share_draws: bool) -> None:
    """k at least the number of documents: no variance, no bias, even where everything is stale."""
    scenario = replace(SCENARIOS[name], samples=SCENARIOS[name].capacity + 1)
    distinct.exact_where_all_are_drawn(sample, loss, scenario, share_draws=share_draws)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_inclusion_probabilities_are_stable(dtype: torch.dtype, tolerance: float) -> None:
    """Logarithms of probabilities from e^-1000 to 1, against series and libm in float64."""
    above = [-1000.0, -300.0, -87.5, -41.0, -40.0, -39.0, -20.0, -5.0, -1.0, 0.0, 0.5, 1.0, 3.0, 5.0, 50.0, math.inf]
    given_value = cache_class._log_inclusion(torch.tensor(above, dtype=dtype), torch.zeros((), dtype=dtype))
    for x, value in zip(above, given_value.tolist(), strict=True):
        if x < -15.0:
            expected = x - math.exp(x) / 2
        elif x < 0.0:
            expected = math.log(-math.expm1(-math.exp(x)))
        else:
            expected = math.log1p(-math.exp(-math.exp(x))) if x < 6.0 else 0.0
        assert abs(value - expected) <= tolerance * max(1.0, abs(expected)), x


@share
def test_weights_are_finite_where_softmaxes_hardly_overlap(share_draws: bool) -> None:
    """Scale 3000 in float32: probabilities of the draws of others are far below what a float can hold."""
    queries = unit(6, 4, 1).requires_grad_()
    draw = sample(make_state(unit(200, 4, 0)), queries, draws_per_query=3, replacement=False, scale=3000.0)
    negatives = draw.embedding.flatten(0, 1).clone().requires_grad_()
    for correction in CORRECTIONS:
        value = loss(
            queries,
            unit(6, 4, 2),
            negatives,
            draw,
            scale=3000.0,
            share_draws=share_draws,
            staleness_correction=correction,
        )
        for gradient in torch.autograd.grad(value, [queries, negatives]):
            assert bool(torch.isfinite(gradient).all())


@share
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_steps_on_a_cache_that_fills(share_draws: bool, correction: str) -> None:
    """From empty, over fewer documents than draws, to more: finite, and the stand-ins have no part in it."""
    tower, queries_tower = Tower(), Tower(seed=1)
    state = negcache_fn.init_cache(40, 6, documents(1, 0))
    for n in range(6):
        batch = documents(3, n)
        options = {"share_draws": share_draws, "staleness_correction": correction, "scale": 5.0, "draws_per_query": 5}
        out = negcache_fn.step(
            state,
            queries_tower(documents(2, 50 + n)),
            batch,
            tower,
            **step_keywords(replacement=False, **options),
        )
        held = int((state["items", "embedded_at"] >= 0).sum())
        assert int((out.draw.slot >= 0).sum()) == 2 * min(held, 5)
        assert all(bool(torch.isfinite(value)) for value in out.metrics.values())
        assert 0.0 <= float(out.metrics["unique_draws"]) <= 1.0
        out.loss.backward()
        for parameter in (*tower.parameters(), *queries_tower.parameters()):
            assert parameter.grad is not None
            assert bool(torch.isfinite(parameter.grad).all())
        state = out.state


def test_what_stands_in_has_no_part() -> None:
    """Encodings of draws that are not there may be anything: the loss and its gradients are the same."""
    state, queries, own = sparse([5, 1030]), unit(3, 4, 1).requires_grad_(), unit(3, 4, 2)
    draw = sample(state, queries, draws_per_query=4, replacement=False)
    clean = draw.embedding.flatten(0, 1)
    missing = draw.slot.flatten() < 0
    for share_draws in (True, False):
        values, gradients = [], []
        for filling in (0.0, math.nan, math.inf):
            negatives = torch.where(missing[:, None], filling, 1.1 * clean)
            values.append(loss(queries, own, negatives, draw, share_draws=share_draws))
            gradients.append(torch.autograd.grad(values[-1], queries)[0])
        assert all(torch.equal(value, values[0]) for value in values)
        assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_effective_sample_size_of_own_draws() -> None:
    """By its definition, with the weights of the formula."""
    tower, batch = Tower(), documents(5, 1)
    state = steps.warm(tower, 9)
    queries = unit(3, 6, 0)
    out = negcache_fn.step(
        state,
        queries,
        batch,
        tower,
        options=negcache_fn.StepOptions(
            draws_per_query=3, replacement=False, share_draws=False, staleness_correction="none"
        ),
    )
    probability = torch.exp(out.draw.score - out.draw.log_normalizer[:, None]).double()
    weights = probability / (1 - torch.exp(-torch.exp((out.draw.score - out.draw.threshold).double())))
    expected = (weights.sum(1) ** 2 / weights.square().sum(1)).mean()
    assert is_close(out.metrics["effective_sample_size"], expected, 1e-5)


def test_several_caches() -> None:
    """What is drawn of each is taken from it and goes back to it; what is not drawn goes nowhere."""
    left, right = sparse([5, 1030], seed=1), sparse([7], seed=2)
    queries = unit(2, 4, 1)
    a, b = (sample(state, queries, draws_per_query=5, replacement=False) for state in (left, right))
    merged = negcache_fn.merge_draws(a, b)
    assert (merged.slot >= 0).sum(1).tolist() == [3, 3]
    found = negcache_fn.take_drawn([left, right], merged)
    for row, (slot, source) in enumerate(zip(merged.slot.flatten(), merged.source.flatten(), strict=True)):
        if int(slot) >= 0:
            assert torch.equal(found[row]["x"], (left, right)[int(source)]["items", "features", "x"][int(slot)])
    for source, (slots, _) in enumerate(negcache_fn.split_refresh(merged, torch.ones(10, 4))):
        wanted = torch.where(merged.source == source, merged.slot, -1).flatten()
        assert torch.equal(slots, wanted)


@pytest.mark.parametrize("fault", ["as they are", "shifted"])
def test_children_that_ignore_their_parent_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check bites: noise that is not made to have the parent's maximum, or is only shifted to have it, fails."""

    def broken(perturbed: Tensor, maximum: Tensor) -> Tensor:
        shift = 0.0 if fault == "as they are" else maximum[..., None] - perturbed.amax(-1, keepdim=True)
        nothing = (perturbed == -math.inf) | (maximum == -math.inf)[..., None]
        return (perturbed + shift).masked_fill(nothing, -math.inf)

    monkeypatch.setattr(gumbel_tree, "_given_maximum", broken)
    with pytest.raises(AssertionError):
        distinct.race_law(sample, varied(5000), unit(2, 8, 1), draws_per_query=2, scale=3.0)
