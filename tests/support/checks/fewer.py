"""Checks of a sampler of fewer draws than queries: who draws, what is drawn, and that neither tells of the other."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from tests.support import oracles
from tests.support.builders import at_step, is_close, unit
from tests.support.checks.draws import Sampler, exact_scores

OF_QUERIES = ("slot", "score", "perturbed", "threshold", "embedding", "id", "log_weight", "source")
"""Fields that only queries which draw have."""


def those_of_some(
    sample: Sampler, state: TensorDictBase, queries: Tensor, num_draws: int, *, steps: int = 5, **options: Any
) -> None:
    """One of each group, with the draw that it has when all draw; what is known of every query is as it is then."""
    each = len(queries) // num_draws
    for step in range(1, steps + 1):
        here = at_step(state, step)
        draw = sample(here, queries, num_draws=num_draws, **options)
        everyone = sample(here, queries, draws_per_query=1, **options)
        assert draw.query.shape == (num_draws,) and draw.query.dtype == torch.int64
        assert torch.equal(draw.query // each, torch.arange(num_draws))
        for name, given, whole in zip(draw._fields, draw, everyone, strict=True):
            wanted = whole[draw.query] if name in OF_QUERIES else whole
            if name == "score":  # scored with fewer rows, it may be rounded otherwise
                assert is_close(given, wanted, 1e-5)
            elif name != "query":
                assert torch.equal(given, wanted), name


def joint_law(
    sample: Sampler,
    state: TensorDictBase,
    queries: Tensor,
    *,
    steps: int = 40,
    copies: int = 60,
    **options: Any,
) -> None:
    """Who draws and what, of groups of all queries: chi-square over (query, slot) against `p_i(j) / B`.

    Besides, over who draws in one group and in the next, and in one step and in the next; `oracles.FALSE_ALARM` each.
    """
    rows = len(queries)
    exact = oracles.probabilities(exact_scores(state, queries, **options)) / rows
    seen, chosen = np.zeros_like(exact), np.zeros((steps, copies), dtype=int)
    for step in range(steps):
        draw = sample(at_step(state, step), queries.repeat(copies, 1), num_draws=copies, **options)
        chosen[step] = (draw.query % rows).numpy()
        np.add.at(seen, (chosen[step], draw.slot[:, 0].numpy()), 1)
    assert oracles.chi_square_pvalue(seen.ravel(), exact.ravel()) > oracles.FALSE_ALARM
    for one, other in ((chosen[:, :-1], chosen[:, 1:]), (chosen[:-1], chosen[1:])):
        pairs = np.bincount((one * rows + other).ravel(), minlength=rows * rows)
        assert oracles.chi_square_pvalue(pairs.astype(float), np.full(rows**2, rows**-2.0)) > oracles.FALSE_ALARM


def every_choice(sample: Sampler, state: TensorDictBase, *, rows: int, num_draws: int, steps: int = 1500) -> None:
    """All choices of one of each group are as frequent: chi-square over the whole subset, `oracles.FALSE_ALARM`."""
    each, queries = rows // num_draws, unit(rows, state["items", "embedding"].shape[1], 3)
    subsets = itertools.product(*(range(first, first + each) for first in range(0, rows, each)))
    counts = dict.fromkeys(subsets, 0)
    for step in range(steps):
        counts[tuple(sample(at_step(state, step), queries, num_draws=num_draws).query.tolist())] += 1
    seen = np.array(list(counts.values()), dtype=float)
    assert oracles.chi_square_pvalue(seen, np.full(len(seen), 1 / len(seen))) > oracles.FALSE_ALARM
