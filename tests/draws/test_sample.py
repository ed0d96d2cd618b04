"""Draws against the exact float64 softmax, by chi-square; merging; every field of a `Draw`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import negcache_fn
from tests.support import oracles, strategies
from tests.support.builders import at_step, is_close, make_state, snapshot, unit
from tests.support.checks import draws

sample = negcache_fn.sample_gumbel
CAPACITIES = (1, 63, 64, 65, 1000, 2500, 5000)


def varied(capacity: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A state with every third id, log-weights and a fifth of the slots empty."""
    slots = torch.arange(capacity)
    return make_state(
        unit(capacity, 8, seed, dtype),
        live=(slots % 5 != 3) | (capacity == 1),
        ids=torch.where(slots % 3 == 0, slots, -1),
        log_weight=torch.linspace(-1, 1, capacity),
        seed=seed,
    )


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_distribution_at_every_capacity(capacity: int) -> None:
    """Empty slots and log-weights; capacities that are no multiple of block, group or chunk."""
    draws.distribution(sample, varied(capacity), unit(3, 8, 9), scale=5.0)


def test_distribution_closely() -> None:
    """Eight times the draws: relative errors of 5 % in the probabilities would be seen."""
    draws.distribution(sample, varied(130), unit(1, 8, 9), scale=3.0, copies=256)


def test_distribution_of_a_large_cache() -> None:
    """Seventy thousand slots: many chunks, the last one partial."""
    draws.distribution(sample, varied(70_001), unit(2, 8, 9), scale=6.0, copies=16)


@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0, 100.0])
def test_distribution_at_every_scale(scale: float) -> None:
    """From flat to nearly one-hot."""
    draws.distribution(sample, varied(333), unit(3, 8, 9), scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_distribution_in_every_storage(dtype: torch.dtype) -> None:
    """What is stored is what is scored."""
    queries = unit(3, 8, 9, torch.float64 if dtype == torch.float64 else torch.float32)
    draws.distribution(sample, varied(200, dtype), queries, scale=10.0)


@pytest.mark.parametrize("top_k", [1, 2, 10, 63, 150])
def test_distribution_restricted_to_the_best(top_k: int) -> None:
    """`top_k` is the exact softmax over each query's k highest scores."""
    draws.distribution(sample, varied(150), unit(3, 8, 9), scale=5.0, top_k=top_k)
    draws.cutoff_separates(sample, varied(150), unit(3, 8, 9), top_k, scale=5.0)


def test_distribution_restricted_to_the_best_of_many() -> None:
    """The best are spread over chunks."""
    draws.distribution(sample, varied(5000), unit(2, 8, 9), scale=5.0, top_k=100)
    draws.cutoff_separates(sample, varied(5000), unit(8, 8, 9), 100, scale=5.0)


@pytest.mark.parametrize("capacity", [65, 2500])
@pytest.mark.parametrize("top_k", [None, 12])
def test_distribution_with_exclusions(capacity: int, top_k: int | None) -> None:
    """For all queries, for each its own, with repeats and -1, which excludes nothing."""
    state, queries = varied(capacity), unit(3, 8, 9)
    best = negcache_fn.score(state, queries, scale=5.0).argsort(dim=-1, descending=True)[:, :40]
    names = torch.sort(state["items", "id"][best], dim=-1, descending=True).values[:, :12]
    draws.distribution(sample, state, queries, scale=5.0, exclude_ids=names, top_k=top_k)
    draws.distribution(sample, state, queries, scale=5.0, exclude_ids=names.flatten(), top_k=top_k)
    draws.distribution(sample, state, queries, scale=5.0, exclude_ids=torch.tensor([-1, 10**9, -1]), top_k=top_k)
    draws.distribution(sample, state, queries, scale=5.0, exclude_ids=torch.empty(0, dtype=torch.int64), top_k=top_k)


@pytest.mark.parametrize("capacity", [65, 2500])
@pytest.mark.parametrize("top_k", [None, 12])
def test_distribution_without_false_negatives(capacity: int, top_k: int | None) -> None:
    """By id beside what is excluded for all or for each, and by a limit on the score without its log-weight."""
    state, queries = varied(capacity), unit(3, 8, 9)
    scores = negcache_fn.score(state, queries, scale=5.0) - state["items", "log_weight"]
    best = scores.argsort(dim=-1, descending=True)[:, :40]
    names = torch.sort(state["items", "id"][best], dim=-1, descending=True).values[:, :12]
    limit = torch.tensor([float(scores[0].max()) - 1.0, 0.3, math.inf])
    for known in (
        negcache_fn.FalseNegatives(ids=names[:, :5]),
        negcache_fn.FalseNegatives(max_score=1.0),
        negcache_fn.FalseNegatives(names[:, :5], limit),
    ):
        for exclude_ids in (None, names[0], names[:, 5:]):
            options = {"false_negatives": known, "exclude_ids": exclude_ids, "top_k": top_k, "scale": 5.0}
            draws.distribution(sample, state, queries, **options)


def test_a_limit_shuts_a_query_out_of_a_cache() -> None:
    """-inf for some queries, +inf for others: caches for some queries only."""
    state, queries = varied(200), unit(2, 8, 9)
    known = negcache_fn.FalseNegatives(max_score=torch.tensor([-math.inf, math.inf]))
    draw = sample(state, queries, draws_per_query=3, false_negatives=known)
    assert draw.slot[0].tolist() == [-1] * 3
    assert float(draw.log_normalizer[0]) == -math.inf
    assert torch.equal(draw.slot[1], sample(state, queries, draws_per_query=3).slot[1])


def test_distribution_with_a_transform() -> None:
    """The transform comes before the log-weight; it may well be no monotone."""
    for transform in (strategies.soft_cap, strategies.lift, torch.sin):
        draws.distribution(sample, varied(333), unit(3, 8, 9), scale=8.0, score_transform=transform)
    draws.distribution(sample, varied(333), unit(3, 8, 9), scale=8.0, score_transform=torch.sin, top_k=20)


def test_a_learnable_scale_samples_the_same() -> None:
    """A 0-d tensor that requires gradient, or a float."""
    state, queries = varied(333), unit(3, 8, 9)
    scale = torch.tensor(5.0, requires_grad=True)
    one, other = (sample(state, queries, draws_per_query=4, scale=given) for given in (scale, 5.0))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_one_draw_a_step() -> None:
    """The noise moves with `state["step"]`."""
    draws.many_steps(sample, varied(37), unit(1, 8, 9)[0], scale=3.0)


def test_draws_are_jointly_independent() -> None:
    """Over rows and samples."""
    draws.joint_independence(sample)


@pytest.mark.parametrize("capacity", [3, 65, 2500])
def test_perturbed_values_are_maxima(capacity: int) -> None:
    """A Gumbel around the log-normaliser: what makes draws mergeable."""
    draws.perturbed_values(sample, varied(capacity), unit(8, 8, 9), scale=5.0)


def test_seeds_and_steps_differ_and_repeat() -> None:
    """Same (seed, step): same draw, bit for bit. Another: another."""
    queries, options = unit(4, 8, 9), {"draws_per_query": 16, "scale": 3.0}
    first = sample(varied(500), queries, **options)
    for a, b in zip(first, sample(varied(500), queries, **options), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.slot, sample(at_step(varied(500), 2), queries, **options).slot)
    other = varied(500).clone()
    other["seed"] = torch.tensor(1)
    assert not torch.equal(first.slot, sample(other.lock_(), queries, **options).slot)


def test_rows_are_counted_from_the_first() -> None:
    """A query draws the same whatever rows follow it."""
    state, queries = varied(2500), unit(7, 8, 9)
    whole = sample(state, queries, draws_per_query=3, scale=5.0)
    part = sample(state, queries[:4], draws_per_query=3, scale=5.0)
    assert torch.equal(whole.slot[:4], part.slot)


@given(case=strategies.cases(max_scale=10_000.0))
def test_fields_of_any_draw(case: strategies.Case) -> None:
    """Live, not excluded, in the top k; score, embedding, id, log-weight are those of the slot."""
    exact = case.queries.dtype == torch.float64
    before = snapshot(case.state, case.queries)
    draws_top_k = case.top_k is None or not _ties(case)
    if draws_top_k:
        draws.fields(sample, case.state, case.queries, tolerance=1e-14 if exact else 2e-6, **case.sample_options)
    draw = sample(case.state, case.queries, **case.sample_options)
    assert bool((draw.slot >= -1).all()) and bool((draw.slot < len(case.state["items", "id"])).all())
    assert not bool(torch.isnan(draw.perturbed).any())
    assert not bool(torch.isnan(draw.log_normalizer).any())
    assert before[0] == snapshot(case.state, case.queries)[0]


def _ties(case: strategies.Case) -> bool:
    """Whether two candidates score nearly the same, so that the k-th best is a matter of rounding."""
    options = case.sample_options | {"top_k": None}
    del options["draws_per_query"]
    scores = draws.exact_scores(case.state, case.queries, **options).sort(dim=-1).values
    gaps = (scores[:, 1:] - scores[:, :-1]) / (1 + scores[:, 1:].abs())
    return bool((gaps < 1e-5).any())


def test_ties_are_drawn_alike() -> None:
    """Equal scores, equal chances, within one block and across."""
    state = make_state(unit(1, 8, 0).expand(200, 8))
    draws.distribution(sample, state, unit(2, 8, 9), scale=20.0)


def test_ties_at_the_cutoff_draw_nothing_below() -> None:
    """Which of the tied are in is open; every better one is, and no worse one."""
    state = make_state(torch.tensor([[1.0], [2.0], [2.0], [2.0], [3.0], [0.0]]).repeat(30, 1)[:100])
    values = state["items", "embedding"][:, 0]
    for top_k, floor in ((5, 3.0), (20, 2.0), (len(values), 0.0)):
        for step in range(5):
            draw = sample(at_step(state, step), torch.ones(4, 1), draws_per_query=50, top_k=top_k, scale=0.1)
            assert float(values[draw.slot].min()) >= floor


def test_nothing_to_draw() -> None:
    """Empty, or everything excluded for one query: slot -1 and a normaliser of -inf there, no NaN."""
    empty = sample(make_state(unit(70, 4, 0), live=[False] * 70), unit(3, 4, 1), draws_per_query=2)
    assert torch.equal(empty.slot, torch.full((3, 2), -1))
    assert torch.equal(empty.log_normalizer, torch.full((3,), -math.inf))
    state = make_state(unit(3, 4, 0), ids=[1, 2, 3])
    some = sample(state, unit(2, 4, 1), draws_per_query=5, exclude_ids=torch.tensor([[1, 2, 3], [1, 2, -1]]))
    assert torch.equal(some.slot, torch.tensor([[-1] * 5, [2] * 5]))
    assert float(some.log_normalizer[0]) == -math.inf
    assert not any(bool(torch.isnan(value).any()) for value in (*empty, *some) if value.is_floating_point())


@pytest.mark.parametrize(
    "options",
    [{}, {"exclude_ids": torch.tensor([0, 3, 6, 9, 300])}, {"top_k": 7}],
    ids=["plain", "exclusions", "top_k"],
)
def test_merged_draws_are_draws_of_the_union(options: dict[str, Any]) -> None:
    """Of two and of three caches of different sizes, in distribution."""
    queries = unit(2, 8, 9)
    states = [varied(100, seed=1), varied(33, seed=2), varied(300, seed=3)]
    draws.merged_distribution(sample, negcache_fn.merge_draws, states[:2], queries, scale=4.0, **options)
    draws.merged_distribution(sample, negcache_fn.merge_draws, states, queries, scale=4.0, **options)


def test_merging_is_associative_and_commutative() -> None:
    """Up to the numbers of the sources."""
    queries, merge = unit(3, 8, 9), negcache_fn.merge_draws
    a, b, c = (sample(varied(n, seed=n), queries, draws_per_query=40, scale=4.0, top_k=9) for n in (30, 70, 110))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    for name, one, other in zip(left._fields, left, right, strict=True):
        assert is_close(one, other, 1e-6) if name == "log_normalizer" else torch.equal(one, other), name
    assert set(left.source.flatten().tolist()) == {0, 1, 2}
    one, other = merge(a, b), merge(b, a)
    for name in ("slot", "score", "perturbed", "embedding", "id", "log_weight", "log_normalizer"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.source, 1 - other.source)
    assert torch.equal(one.cutoff, other.cutoff.flip(-1))


def test_merging_with_an_empty_cache_changes_nothing() -> None:
    """The empty draw is the neutral element."""
    queries = unit(3, 8, 9)
    full = sample(varied(30, seed=1), queries, draws_per_query=4)
    empty = sample(make_state(unit(5, 8, 0), live=[False] * 5, seed=2), queries, draws_per_query=4)
    for merged, source in ((negcache_fn.merge_draws(full, empty), 0), (negcache_fn.merge_draws(empty, full), 1)):
        for name in ("slot", "score", "perturbed", "embedding", "id", "log_weight", "log_normalizer"):
            assert torch.equal(getattr(merged, name), getattr(full, name)), name
        assert torch.equal(merged.source, torch.full_like(merged.source, source))
    nothing = negcache_fn.merge_draws(empty, empty._replace(noise=empty.noise + 1))
    assert torch.equal(nothing.slot, torch.full((3, 4), -1))
    assert torch.equal(nothing.log_normalizer, torch.full((3,), -math.inf))


@given(data=st.data())
def test_log_normalizer_is_exact(data: st.DataObject) -> None:
    """Against float64, whatever is excluded."""
    case = data.draw(strategies.cases())
    options = case.sample_options | {"top_k": None}
    draw = sample(case.state, case.queries, **options)
    del options["draws_per_query"]
    exact = oracles.log_normalizer(draws.exact_scores(case.state, case.queries, **options))
    assert is_close(draw.log_normalizer, exact, 1e-12 if case.queries.dtype == torch.float64 else 1e-5)
