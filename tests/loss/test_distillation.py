"""What the recipe for a teacher's scores says of sums over draws, against the sum over the whole cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import negcache_fn
from tests.support.builders import at_step, make_state, unit

SCALE, STEPS = 6.0, 600
BOUND = 5.0  # standard errors: a right estimate is beyond them once in 1.7 million


def problem() -> tuple[Any, Tensor, Tensor, Tensor]:
    """A cache with empty slots and log-weights, queries, the teacher's squared errors, and their sum."""
    state = make_state(
        unit(40, 5, 0, torch.float64), live=torch.arange(40) % 5 != 2, log_weight=torch.linspace(-1, 1, 40)
    )
    queries, errors = unit(3, 5, 1, torch.float64), 3 * unit(3, 40, 2, torch.float64).abs()
    everything = (negcache_fn.score(state, queries, scale=SCALE).softmax(1) * errors).sum(1)
    return state, queries, errors, everything


def of_own(draw: negcache_fn.Draw, errors: Tensor) -> Tensor:
    """[B]: the mean over each query's draws."""
    return errors.gather(1, draw.slot).mean(1)


def of_batch(draw: negcache_fn.Draw, queries: Tensor, errors: Tensor) -> Tensor:
    """[B]: weighted by probability and inverse inclusion probability."""
    stale = SCALE * queries @ draw.embedding[0].T + draw.log_weight[0]
    probability = (stale - draw.log_normalizer[:, None]).exp()
    inverse = torch.where(draw.slot[0] >= 0, -1 / torch.expm1(-torch.exp(draw.score[0] - draw.threshold[0])), 0.0)
    return (inverse * probability * errors[:, draw.slot[0].clamp(min=0)]).sum(1)


@pytest.mark.parametrize("number", [{"draws_per_query": 3}, {"num_draws": 6}], ids=str)
def test_sums_over_draws_are_unbiased(number: dict[str, int]) -> None:
    state, queries, errors, everything = problem()
    found = []
    for step in range(STEPS):
        draw = negcache_fn.sample_gumbel(at_step(state, step), queries, scale=SCALE, **number)
        found.append(of_batch(draw, queries, errors) if draw.for_batch else of_own(draw, errors))
    values = torch.stack(found)
    error = values.std(0) / STEPS**0.5
    assert bool(((values.mean(0) - everything).abs() < BOUND * error).all())
    assert bool((error < 0.04 * everything).all()), "the bound shows nothing"


def test_all_documents_drawn_are_the_sum() -> None:
    """Missing draws, of which there are some, have no part."""
    state, queries, errors, everything = problem()
    draw = negcache_fn.sample_gumbel(state, queries, num_draws=40, scale=SCALE)
    assert int((draw.slot < 0).sum()) == 8
    torch.testing.assert_close(of_batch(draw, queries, errors), everything)
