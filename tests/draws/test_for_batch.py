"""Draws for the batch: their law, their weights, and batches with fewer documents than draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import negcache_fn
from negcache_fn._cache import select
from negcache_fn._scores import masses
from tests.draws.test_sample import varied
from tests.support import strategies
from tests.support.builders import is_close, make_state, unit
from tests.support.checks import for_batch

sample = negcache_fn.sample_gumbel
PLACES = {
    "one block": [0, 1, 2, 3, 4],
    "one group": [0, 70, 130, 1000, 1023],
    "many groups": [5, 1030, 1031, 2047, 2499],
}
SOME = torch.tensor([0.2, 1.0, 0.7])


def sparse(places: list[int], *, ties: bool = False, seed: int = 0) -> Any:
    """A state of 2500 slots whose few documents are in the slots `places`."""
    embedding, live = torch.full((2500, 4), 7.0), torch.zeros(2500, dtype=torch.bool)
    embedding[places] = unit(1 if ties else len(places), 4, 0).expand(len(places), 4)
    live[places] = True
    weights = torch.linspace(-1, 1, 2500) * (not ties)
    return make_state(embedding, live=live, ids=torch.arange(2500), log_weight=weights, seed=seed)


@pytest.mark.parametrize("num_draws", [1, 2, 3])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_law_of_ordered_draws(places: list[int], num_draws: int) -> None:
    """Each ordered draw of M of five documents has the chance of Plackett-Luce, wherever they are in the tree."""
    for_batch.ordered_law(sample, sparse(places), unit(3, 4, 1), num_draws=num_draws, importance=SOME, scale=2.0)


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_ids": torch.tensor([1031, 7])},
        {"exclude_ids": torch.tensor([[5, 1031], [2499, -1], [5, -1]])},
        {"false_negatives": negcache_fn.FalseNegatives(max_score=torch.tensor([0.5, 1.0, -0.2]))},
        {"false_negatives": negcache_fn.FalseNegatives(torch.tensor([[5], [1030], [-1]]), 1.5)},
        {"top_k": 2},
        {"top_k": 2, "exclude_ids": torch.tensor([[5, 1031], [2499, -1], [5, -1]])},
        {"score_transform": torch.sin},
    ],
    ids=lambda options: "+".join(options),
)
def test_law_with_exclusions_and_limits(options: dict[str, Any]) -> None:
    """What is no negative of a query adds nothing to the mass, and what is none of any is not drawn."""
    for_batch.ordered_law(
        sample, sparse(PLACES["many groups"]), unit(3, 4, 1), num_draws=2, importance=SOME, scale=2.0, **options
    )


def test_law_of_ties() -> None:
    """Equal documents: all orders alike."""
    for_batch.ordered_law(sample, sparse([5, 6, 1030, 1095, 2400], ties=True), unit(2, 4, 1), num_draws=3)


@pytest.mark.parametrize("scale", [0.1, 5.0, 20.0])
@pytest.mark.parametrize("capacity", [65, 3000])
def test_joint_law_of_slots_and_perturbed_masses(capacity: int, scale: float) -> None:
    """Slots, perturbed masses and threshold together, where the draws are too many to count."""
    for_batch.race_law(sample, varied(capacity), unit(3, 8, 1), num_draws=4, importance=SOME, scale=scale)


def test_joint_law_restricted_to_the_best() -> None:
    """With `top_k`, and in float64."""
    for_batch.race_law(sample, varied(2500), unit(2, 8, 1), num_draws=4, scale=5.0, top_k=20)
    queries = unit(2, 8, 1, torch.float64)
    for_batch.race_law(sample, varied(200, torch.float64), queries, num_draws=3, scale=5.0)


def test_inclusion_probabilities() -> None:
    """The inverse of the chance to be drawn, given the threshold, is right on average for every document."""
    state = make_state(unit(7, 4, 0), log_weight=torch.linspace(-1, 1, 7))
    for num_draws in (2, 5):
        for_batch.inclusion(sample, state, unit(3, 4, 1), num_draws=num_draws)


@pytest.mark.parametrize("top_k", [None, 9])
def test_more_draws_are_the_same_and_others(top_k: int | None) -> None:
    """The next one is where the threshold was."""
    for state, queries in ((varied(2500), unit(9, 8, 1)), (sparse([3, 1030, 2000]), unit(9, 4, 1))):
        longest = sample(state, queries, num_draws=8, scale=5.0, top_k=top_k)
        ranked = torch.cat([longest.perturbed, longest.threshold], 1)
        for m in range(1, 8):
            draw = sample(state, queries, num_draws=m, scale=5.0, top_k=top_k)
            assert torch.equal(draw.slot, longest.slot[:, :m])
            assert torch.equal(torch.cat([draw.perturbed, draw.threshold], 1), ranked[:, : m + 1])


@given(case=strategies.cases(max_scale=10_000.0))
def test_fields_of_any_draw(case: strategies.Case) -> None:
    """Live, not excluded for all, different; all of them if there are no more than M."""
    tolerance = 1e-13 if case.queries.dtype == torch.float64 else 4e-6
    options = case.sample_options | {"draws_per_query": None, "top_k": None}
    del options["draws_per_query"]
    for num_draws in (case.draws_per_query, 40):
        draw = for_batch.fields(
            sample, case.state, case.queries, tolerance=tolerance, **options | {"num_draws": num_draws}
        )
        assert not any(bool(torch.isnan(value).any()) for value in draw if value.is_floating_point())
    restricted = sample(case.state, case.queries, num_draws=40, **options | {"top_k": case.top_k})
    drawn = [slot for slot in restricted.slot[0].tolist() if slot >= 0]
    assert len(set(drawn)) == len(drawn)


def test_default_is_one_document_for_each_query() -> None:
    """Without either number; with all queries alike important."""
    state, queries = varied(300), unit(9, 8, 1)
    draw = sample(state, queries, scale=3.0)
    again = sample(state, queries, num_draws=9, importance=torch.full((9,), 1.0), scale=3.0)
    assert all(torch.equal(one, other) for one, other in zip(draw, again, strict=True))


def test_fewer_documents_than_draws() -> None:
    """All of them, then -1; without any, -1 alone and a normaliser of -inf."""
    state, queries = sparse([5, 1030]), unit(3, 4, 1)
    draw = sample(state, queries, num_draws=4, exclude_ids=torch.tensor([[-1, -1], [5, -1], [5, 1030]]))
    assert draw.slot.sort().values.tolist() == [[-1, -1, 5, 1030]]
    assert draw.threshold.item() == -math.inf
    assert torch.equal(draw.log_normalizer == -math.inf, torch.tensor([False, False, True]))
    just = sample(state, queries, num_draws=2)
    assert bool((just.slot >= 0).all()) and just.threshold.item() == -math.inf
    one_left = sample(state, queries, num_draws=1)
    assert torch.equal(one_left.threshold, just.perturbed[:, 1:])
    nothing = sample(state, queries, num_draws=2, exclude_ids=torch.tensor([5, 1030]))
    assert nothing.slot.tolist() == [[-1, -1]] and bool((nothing.log_normalizer == -math.inf).all())


def test_queries_that_have_diverged_have_no_say() -> None:
    """NaN in one query: the others draw as if it was not there, and its normaliser is NaN."""
    state, queries = varied(300), unit(4, 8, 1)
    broken = queries.clone()
    broken[2] = math.nan
    draw, right = sample(state, broken, num_draws=5), sample(state, queries[[0, 1, 3]], num_draws=5)
    assert torch.equal(draw.slot, right.slot)
    assert draw.log_normalizer.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("segment", [4096, 8192])
@pytest.mark.parametrize("exclude", [False, True])
def test_segments_do_not_show(segment: int, exclude: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long cache the blocks of the chosen groups are scored again; gradients of the normalisers are the same."""
    state, queries = varied(20_000, torch.float64), unit(30, 8, 1, torch.float64).requires_grad_()
    ids = state["items", "id"][torch.arange(60).view(30, 2) * 311] if exclude else None
    draws = []
    for size in (select._SEGMENT, segment):
        monkeypatch.setattr(select, "_SEGMENT", size)
        draws.append(sample(state, queries, num_draws=50, scale=4.0, exclude_ids=ids))
    whole, parts = draws
    for name, one, other in zip(whole._fields, whole, parts, strict=True):
        assert is_close(one, other, 1e-12) if one.is_floating_point() else torch.equal(one, other), name
    weights = torch.linspace(0, 1, 30)
    gradients = [torch.autograd.grad(weights.double() @ draw.log_normalizer, queries)[0] for draw in draws]
    assert is_close(gradients[1], gradients[0], 1e-12)


@pytest.mark.parametrize(("capacity", "segment"), [(65, select._SEGMENT), (2500, select._SEGMENT), (2500, 1024)])
def test_slabs_do_not_show(capacity: int, segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen blocks, and chosen groups of a cache of several segments, are scored again so many at a time."""
    monkeypatch.setattr(select, "_SEGMENT", segment)
    state, queries = varied(capacity, torch.float64), unit(5, 8, 1, torch.float64)
    whole = sample(state, queries, num_draws=20, scale=4.0)
    monkeypatch.setattr(masses, "_SLAB", 512)
    parts = sample(state, queries, num_draws=20, scale=4.0)
    assert torch.equal(whole.slot, parts.slot) and is_close(parts.score, whole.score, 1e-12)


def test_normalizer_is_differentiable() -> None:
    """In queries and scale, also restricted to the best; documents of other queries are not drawn with a gradient."""
    state = varied(200, torch.float64)
    for top_k in (None, 9):
        queries, scale = unit(3, 8, 1, torch.float64).requires_grad_(), torch.tensor(3.0, dtype=torch.float64)
        scale.requires_grad_()

        def normalizers(queries: Tensor, scale: Tensor, top_k: int | None = top_k) -> Tensor:
            return sample(state, queries, num_draws=2, scale=scale, top_k=top_k).log_normalizer

        assert torch.autograd.gradcheck(normalizers, (queries, scale))
        draw = sample(state, queries, num_draws=2, scale=scale, top_k=top_k)
        assert [name for name, value in zip(draw._fields, draw, strict=True) if value.requires_grad] == [
            "log_normalizer"
        ]


def test_merged_draws_are_draws_of_the_union() -> None:
    """Of two and of three caches of different sizes, one with fewer documents than draws."""
    states = [varied(100, seed=1), varied(3, seed=2), varied(300, seed=3)]
    for some in (states[:2], states):
        for_batch.merged_law(sample, negcache_fn.merge_draws, some, unit(2, 8, 1), num_draws=4, scale=4.0)


def test_merging_is_associative_and_commutative() -> None:
    """Up to the numbers of the sources; the empty draw changes nothing."""
    queries, merge = unit(5, 8, 1), negcache_fn.merge_draws
    a, b, c = (sample(varied(n, seed=n), queries, num_draws=4, scale=4.0) for n in (30, 3, 110))
    for one, other in ((merge(merge(a, b), c), merge(a, merge(b, c))), (merge(a, b), merge(b, a))):
        for name in ("slot", "score", "perturbed", "threshold", "embedding", "id", "log_weight"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert is_close(one.log_normalizer, other.log_normalizer, 1e-6)
    nothing = sample(make_state(unit(5, 8, 0), live=[False] * 5, seed=2), queries, num_draws=4)
    for one in (merge(a, nothing), merge(nothing, a)):
        for name in ("slot", "perturbed", "threshold", "log_normalizer"):
            assert torch.equal(getattr(one, name), getattr(a, name)), name
    assert torch.equal(merge(b, nothing).slot, b.slot)


def test_draws_that_do_not_merge() -> None:
    """One for the batch and one for each query; another number; other exclusions."""
    state, queries = varied(40), unit(4, 8, 1)
    draw = sample(state, queries, num_draws=4)
    for other, says in (
        (sample(state, queries, draws_per_query=1), "b was drawn for each query and a for the batch; expected both"),
        (sample(state, queries, num_draws=3), r"b has embeddings of shape \(1, 3, 8\); expected those of a"),
        (sample(state, queries[:3], num_draws=4), "b is a draw for 3 queries; expected 4"),
        (sample(state, queries, num_draws=4, exclude_ids=torch.ones(4, 2, dtype=torch.int64)), "excluded ids"),
    ):
        with pytest.raises(ValueError, match=says):
            negcache_fn.merge_draws(draw, other)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"num_draws": 0}, ValueError, "num_draws is 0; expected at least 1"),
        ({"num_draws": 2.0}, TypeError, r"num_draws is 2\.0, a float; expected an integer"),
        ({"num_draws": 2, "draws_per_query": 2}, ValueError, "num_draws is 2 with draws_per_query=2; expected one"),
        ({"num_draws": 2, "importance": torch.ones(3)}, ValueError, r"importance has shape \(3,\)"),
        ({"num_draws": 2, "importance": torch.ones(4, dtype=torch.int64)}, TypeError, "importance"),
        ({"draws_per_query": 2, "importance": torch.ones(4)}, ValueError, "importance is given with draws_per_query"),
    ],
    ids=str,
)
def test_errors(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    """What does not fit is said where it is given."""
    with pytest.raises(kind, match=says):
        sample(varied(40), unit(4, 8, 1), **options)
