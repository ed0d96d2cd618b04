"""Documents of a row's label in every CPU kernel, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.cpu import call as cpu
from negcache_fn._kernels.dispatch import Problem
from negcache_fn._scores import hardest
from negcache_fn._scores.definition import ScoreMatrix
from tests.kernels.test_cpu import (
    PRODUCTS,
    STORAGES,
    check_masses,
    configured,
    exact_scores,
    largest_error,
    limited_problem,
    needs_kernels,
    shapes,
)
from tests.kernels.test_sums import exact_mean, mean_of


def labelled(arguments: tuple[Tensor, ...], scores: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Labels of the rows and of the slots, some of them on one side only, and the scores left by them."""
    generator = torch.Generator().manual_seed(len(arguments[1]))
    rows = torch.randint(-1, 4, (len(arguments[0]),), generator=generator, dtype=torch.int32)
    rows[rows == -1] = -2
    slots = torch.randint(-1, 3, (len(arguments[1]),), generator=generator, dtype=torch.int32)
    left = scores.clone()
    for row, label in enumerate(rows.tolist()):
        for slot, other in enumerate(slots.tolist()):
            if label == other:
                left[row, slot] = -math.inf
    return (rows, slots), left


@needs_kernels
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("products", PRODUCTS)
@given(shape=shapes, limited=st.booleans())
@example(shape=(17, 65, 32, 1, 1), limited=False)
@example(shape=(40, 300, 33, 2, 2), limited=True)
def test_labels_in_every_kernel(
    products: str, storage: torch.dtype, shape: tuple[int, int, int, int, int], limited: bool
) -> None:
    """Of products that are exact; with limits and exclusions, and past the end of the last block."""
    rows, capacity, dim, exclusions, seed = shape
    arguments, limit = limited_problem(rows, capacity, dim, storage, exclusions, seed)
    scores = exact_scores(*arguments)
    if limited:
        alone = arguments[0].double() @ arguments[1].double().T
        scores = scores.masked_fill(alone > limit[:, None], -math.inf)
    labels, scores = labelled(arguments, scores)
    problem = Problem(*arguments, limit if limited else None, *labels)
    blocks = torch.nn.functional.pad(scores, (0, -capacity % BLOCK), value=-math.inf).view(rows, -1, BLOCK)
    weight, n = torch.linspace(-2, 2, rows), min(capacity, 9)
    with configured("highest", products=products):
        assert largest_error(cpu.block_logsumexp(problem), blocks.logsumexp(-1)) <= 1e-4
        best, slots = cpu.hardest(problem, n)
        log_scale = blocks.logsumexp((0, 2)).float()
        masses = cpu.slot_masses(problem, weight, log_scale)
        mean = mean_of(problem)[1]
    assert largest_error(best, scores.topk(n).values) <= 1e-4
    assert torch.equal(slots < 0, best == -math.inf)
    found, where = hardest._hardest(ScoreMatrix.of(problem), n)
    assert largest_error(found, scores.topk(n).values) <= 1e-4
    assert torch.equal(where < 0, found == -math.inf)
    expected = (scores + weight[:, None].double()).logsumexp(0)
    check_masses(masses[:capacity], expected, log_scale, rows)
    error = float((mean - exact_mean(scores, arguments[1])).abs().max())
    assert error <= 2 * (1e-3 + 2.0**-6 * (storage == torch.bfloat16))
    chosen = blocks.amax(-1).argmax(-1, keepdim=True)
    something = (scores > -math.inf).any(
        1, keepdim=True
    )  # of nothing, `score_blocks` leaves the lowest score under a limit
    again = cpu.score_blocks(problem, chosen)[:, 0]
    of_block = blocks.gather(1, chosen[..., None].expand(-1, -1, BLOCK))[:, 0]
    assert largest_error(torch.where(something, again, 0.0), torch.where(something, of_block, 0.0)) <= 1e-4


@needs_kernels
def test_labels_of_more_rows_than_are_searched_at_once() -> None:
    rows, capacity, n = 20_000, 1100, 1024
    slots = torch.arange(capacity, dtype=torch.int32) % 12
    labels = torch.arange(rows, dtype=torch.int32) // 1500
    arguments = torch.ones(rows, 1), torch.ones(capacity, 1), torch.zeros(capacity), torch.empty(rows, 0).long()
    found = cpu.hardest(Problem(*arguments, None, labels, slots), n)[1]
    for row in (0, 8000, 16_400, rows - 1):
        left = torch.nonzero(slots != labels[row]).flatten()[:n]
        assert torch.equal(found[row, : len(left)], left)
