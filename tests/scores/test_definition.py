"""`score`, the readable definition, and `top_negatives`, against float64 loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import negcache_fn
from tests.support import strategies
from tests.support.builders import is_close, make_state, unit
from tests.support.checks import draws


def ranked(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n best by (score descending, slot ascending), missing as (-inf, -1), by sorting in Python."""
    values, slots = [], []
    for row in scores.tolist():
        order = sorted((j for j, s in enumerate(row) if s > -math.inf), key=lambda j: (-row[j], j))[:n]
        values.append([row[j] for j in order] + [-math.inf] * (n - len(order)))
        slots.append(order + [-1] * (n - len(order)))
    return torch.tensor(values, dtype=torch.float64), torch.tensor(slots)


@given(case=strategies.cases())
def test_score_is_its_definition(case: strategies.Case) -> None:
    """transform(scale * q.e) + log_weight, -inf at empty slots."""
    given_scores = negcache_fn.score(case.state, case.queries, scale=case.scale, score_transform=case.transform)
    expected = draws.exact_scores(case.state, case.queries, scale=case.scale, score_transform=case.transform)
    assert given_scores.shape == expected.shape
    assert is_close(given_scores, expected, 1e-12 if case.queries.dtype == torch.float64 else 1e-5)


@given(case=strategies.cases(), n=st.integers(1, 9))
def test_top_negatives_of_any_state(case: strategies.Case, n: int) -> None:
    """Sorted, right scores, and no better document left out (up to rounding)."""
    options = {"scale": case.scale, "score_transform": case.transform, "exclude_ids": case.exclude_ids}
    capacity = len(case.state["items", "id"])
    scores, slots = negcache_fn.top_negatives(case.state, case.queries, min(n, capacity), **options)
    exact = draws.exact_scores(case.state, case.queries, **options)
    expected, _ = ranked(exact, min(n, capacity))
    tolerance = 1e-12 if case.queries.dtype == torch.float64 else 1e-5
    assert is_close(scores, expected, tolerance)
    assert torch.equal(slots < 0, expected == -math.inf)
    for i in range(len(slots)):
        chosen = slots[i][slots[i] >= 0]
        assert len(set(chosen.tolist())) == len(chosen)
        assert is_close(scores[i][slots[i] >= 0], exact[i, chosen], tolerance)


@pytest.mark.parametrize("capacity", [1, 63, 65, 1000, 2500, 5000])
def test_top_negatives_of_large_caches(capacity: int) -> None:
    """Capacities that are no multiple of any chunk, in float64, where order is beyond rounding."""
    slots = torch.arange(capacity)
    state = make_state(
        unit(capacity, 8, 0, torch.float64), live=slots % 5 != 3, log_weight=torch.linspace(-1, 1, capacity), ids=slots
    )
    queries, n = unit(4, 8, 1, torch.float64), min(capacity, 100)
    exclude = torch.randint(0, capacity, (4, 30), generator=torch.Generator().manual_seed(0))
    scores, chosen = negcache_fn.top_negatives(state, queries, n, scale=3.0, exclude_ids=exclude)
    expected, order = ranked(draws.exact_scores(state, queries, scale=3.0, exclude_ids=exclude), n)
    assert torch.equal(chosen, order)
    assert is_close(scores, expected, 1e-12)


@pytest.mark.parametrize("capacity", [5, 130, 5000])
def test_ties_go_to_the_lower_slot(capacity: int) -> None:
    """Small integers score exactly; hundreds tie, across blocks and chunks."""
    generator = torch.Generator().manual_seed(3)
    state = make_state(torch.randint(-1, 2, (capacity, 2), generator=generator).float())
    queries = torch.tensor([[1.0, 0.0], [1.0, -1.0], [0.0, 0.0]])
    n = min(capacity, 60)
    scores, slots = negcache_fn.top_negatives(state, queries, n, scale=2.0)
    expected, order = ranked(draws.exact_scores(state, queries, scale=2.0), n)
    assert torch.equal(slots, order)
    assert torch.equal(scores.double(), expected)


def test_top_negatives_beyond_what_is_cached() -> None:
    """What is missing is (-inf, -1)."""
    state = make_state(unit(6, 4, 0), live=[False, True, False, True, True, False], ids=[-1, 7, -1, 8, -1, -1])
    scores, slots = negcache_fn.top_negatives(state, unit(2, 4, 1), 6, exclude_ids=torch.tensor([8]))
    assert (slots >= 0).sum(-1).tolist() == [2, 2]
    assert bool((scores[:, 2:] == -math.inf).all()) and bool((slots[:, 2:] == -1).all())


def test_score_has_gradient_to_nothing_in_the_state() -> None:
    """Queries may require gradient; the scores of a state are at most a function of them."""
    state, queries = make_state(unit(6, 4, 0)), unit(2, 4, 1).requires_grad_()
    scores, slots = negcache_fn.top_negatives(state, queries, 3)
    assert not scores.requires_grad and not slots.requires_grad
    assert is_close(negcache_fn.score(state, queries), unit(2, 4, 1).double() @ unit(6, 4, 0).double().T, 1e-6)
