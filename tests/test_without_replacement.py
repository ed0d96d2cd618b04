"""Draws without replacement: their law, their weights, and what becomes of queries with too few documents."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import negcache_fn
from negcache_fn.estimator import _log_inclusion

from .builders import is_close, make_state, unit
from .checks import distinct, draws
from .checks.problems import Scenario, scenarios
from .test_sampling import varied

sample, loss = negcache_fn.sample_gumbel, negcache_fn.loss
SCENARIOS = scenarios()
share = pytest.mark.parametrize("share_draws", [True, False], ids=["shared", "own"])
CORRECTIONS = ("none", "self_normalized", "unnormalized")


def sparse(places: list[int], capacity: int = 2500, *, ties: bool = False, **options: Any) -> Any:
    """A state whose few documents are in the slots `places`."""
    embedding = torch.full((capacity, 4), 7.0)
    embedding[places] = unit(1 if ties else len(places), 4, 0).expand(len(places), 4)
    live = torch.zeros(capacity, dtype=torch.bool)
    live[places] = True
    return make_state(embedding, live=live, ids=torch.arange(capacity), **options)


@pytest.mark.parametrize("num_samples", [1, 2, 3])
@pytest.mark.parametrize(
    ("places", "ties"),
    [
        ([0, 1, 2, 3, 4], False),  # in one block
        ([0, 70, 130, 1000, 1023], False),  # in one group
        ([5, 1030, 1031, 2047, 2499], False),  # in several groups
        ([5, 6, 1030, 1095, 2400], True),
    ],
)
def test_law_of_ordered_draws(places: list[int], ties: bool, num_samples: int) -> None:
    """Every ordered draw of k of five documents, wherever they are in the tree."""
    state = sparse(places, ties=ties, log_weight=torch.linspace(-1, 1, 2500))
    distinct.ordered_law(sample, state, unit(2, 4, 1), num_samples=num_samples, scale=2.0)
