"""What merged draws hold, field by field, where values tie and where there is nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import negcache_fn
from tests.draws.test_sample import varied
from tests.support import oracles
from tests.support.builders import at_step, is_close, make_state, unit
from tests.support.checks.draws import exact_scores

sample, merge = negcache_fn.sample_gumbel, negcache_fn.merge_draws
OF_DOCUMENTS = ("slot", "score", "perturbed", "embedding", "id", "log_weight")


@pytest.mark.parametrize("options", [{"draws_per_query": 3}, {"num_draws": 3}], ids=str)
def test_of_equal_values_those_of_the_first_win(options: dict[str, int]) -> None:
    """Of each sample, and of a draw for the batch as far as there is room."""
    one, other = (sample(varied(40, seed=seed), unit(2, 8, 9), **options) for seed in (1, 2))
    other = other._replace(perturbed=one.perturbed)
    merged = merge(one, other)
    if one.for_batch:
        # Of each pair of equal values the first one's comes first: a0 b0 a1 | b1 a2 b2.
        assert merged.source.tolist() == [[0, 1, 0]]
        assert merged.slot.tolist() == [[int(one.slot[0, 0]), int(other.slot[0, 0]), int(one.slot[0, 1])]]
        assert torch.equal(merged.threshold, one.perturbed[:, 1:2])
    else:
        assert not bool(merged.source.any())
        for name in OF_DOCUMENTS:
            assert torch.equal(getattr(merged, name), getattr(one, name)), name


@pytest.mark.parametrize("options", [{"draws_per_query": 2}, {"num_draws": 5}], ids=str)
def test_fields_of_merged_draws(options: dict[str, int]) -> None:
    """Each by its cache: slots, ids and log-weights; exclusions, limits and cutoffs side by side; exact normalisers."""
    states = [varied(capacity, seed=seed) for seed, capacity in enumerate((50, 70, 20))]
    queries = unit(3, 8, 9)
    limits = [torch.tensor([0.4, math.inf, 1.0]), torch.tensor([0.3, 0.2, 0.1]), torch.tensor([2.0, -math.inf, 3.0])]
    draws = [
        sample(state, queries, scale=3.0, false_negatives=negcache_fn.FalseNegatives(max_score=limit), **options)
        for state, limit in zip(states, limits, strict=True)
    ]
    merged = merge(draws[0], merge(draws[1], draws[2]))
    assert torch.equal(merged.max_score, torch.stack(limits, 1))
    assert merged.cutoff.shape == (3, 3)
    scores = [
        exact_scores(state, queries, scale=3.0, false_negatives=negcache_fn.FalseNegatives(max_score=limit))
        for state, limit in zip(states, limits, strict=True)
    ]
    assert is_close(merged.log_normalizer, oracles.log_normalizer(torch.cat(scores, 1)), 1e-5)
    for m in range(merged.slot.numel()):
        slot, source = int(merged.slot.flatten()[m]), int(merged.source.flatten()[m])
        items = states[source]["items"]
        assert int(merged.id.flatten()[m]) == int(items["id"][slot])
        assert float(merged.log_weight.flatten()[m]) == float(items["log_weight"][slot])
        assert torch.equal(merged.embedding.flatten(0, 1)[m], items["embedding"][slot])


def test_the_threshold_is_the_next_largest_of_all() -> None:
    """Also where all winners are of one cache, whose own next one is above all of the other's."""
    states, queries, hidden = [varied(60, seed=seed) for seed in (1, 2)], unit(3, 8, 9), 0
    for shift in (-3.0, 0.0, 3.0):
        for step in range(6):
            longest, draws = (
                [sample(at_step(state, step), queries, num_draws=num_draws) for state in states] for num_draws in (8, 3)
            )
            draws[1] = draws[1]._replace(perturbed=draws[1].perturbed + shift, threshold=draws[1].threshold + shift)
            ranked = torch.cat([longest[0].perturbed, longest[1].perturbed + shift], 1).sort(descending=True).values
            merged = merge(*draws)
            assert torch.equal(merged.perturbed, ranked[:, :3])
            assert torch.equal(merged.threshold, ranked[:, 3:4])
            hidden += float(ranked[0, 3]) in [float(draw.threshold) for draw in draws]
    assert hidden > 3, "the draws show nothing"


def missing(options: dict[str, Any]) -> negcache_fn.Draw:
    """A draw some of whose places have no document; slot 0, which stands in for them, has an id and a log-weight."""
    state = make_state(
        unit(3, 4, 0), live=[True, True, False], ids=[7, 8, -1], log_weight=torch.tensor([0.5, 0.25, 2.0])
    )
    queries, excluded = unit(2, 4, 1), torch.tensor([[7, 8], [8, 8]])
    return sample(state, queries, exclude_ids=excluded, **options)


@pytest.mark.parametrize("options", [{"draws_per_query": 2}, {"num_draws": 3}, {"num_draws": 3, "top_k": 2}], ids=str)
def test_places_without_a_document_hold_nothing(options: dict[str, Any]) -> None:
    """Slot and id -1, log-weight 0, score and perturbed value -inf."""
    draw = missing(options)
    nothing = draw.slot < 0
    assert 0 < int(nothing.sum()) < nothing.numel()
    assert bool((draw.id[nothing] == -1).all())
    assert not bool(draw.log_weight[nothing].any())
    assert bool((draw.score[nothing] == -math.inf).all())
    assert bool((draw.perturbed[nothing] == -math.inf).all())
    assert draw.id[~nothing].unique().tolist() == [7]
    assert draw.log_weight[~nothing].unique().tolist() == [0.5]
