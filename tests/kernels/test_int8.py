"""The CPU kernels on int8 rows with scales, against float64 of the rows that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from negcache_fn._kernels.cpu import call as cpu
from negcache_fn._kernels.dispatch import Problem
from negcache_fn._scores import masses as sums
from tests.kernels.test_cpu import (
    ERRORS,
    PRECISIONS,
    PRODUCTS,
    check_masses,
    configured,
    exact_scores,
    largest_error,
    needs_kernels,
    problem,
    shapes,
)
from tests.kernels.test_sums import exact_mean, mean_of

pytestmark = needs_kernels


def int8_problem(shape: tuple[int, int, int, int, int]) -> tuple[Problem, Tensor]:
    """With scales that differ by a factor of 20 and are 0 here and there; and the rows that they make, float64."""
    rows, capacity, dim, exclusions, seed = shape
    queries, embeddings, bias, excluded = problem(rows, capacity, dim, torch.float32, exclusions, seed)
    generator = torch.Generator().manual_seed(seed)
    integers = (embeddings / embeddings.abs().amax(1, keepdim=True).clamp(min=1e-9) * 127).round().to(torch.int8)
    scale = torch.rand(capacity, generator=generator).add(0.05) / 127
    scale[torch.rand(capacity, generator=generator) < 0.05] = 0.0
    return Problem(queries, integers, bias, excluded, None, row_scale=scale), integers.double() * scale.double()[
        :, None
    ]


def in_blocks(scores: Tensor) -> Tensor:
    return torch.nn.functional.pad(scores, (0, -scores.shape[1] % 64), value=-math.inf).view(len(scores), -1, 64)


def bound_of(given_problem: Problem, rows: Tensor, precision: str) -> float:
    """Of scores; the pass makes two parts do."""
    norms = float(given_problem.queries.norm(dim=1).max() * rows.norm(dim=1).max())
    return ERRORS["medium" if precision == "medium" else "high"] * norms + 1e-5


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("products", PRODUCTS)
@given(shape=shapes)
@example(shape=(1, 1, 1, 0, 0))
@example(shape=(17, 64, 32, 1, 1))
@example(shape=(33, 127, 49, 0, 3))
def test_passes(products: str, precision: str, shape: tuple[int, int, int, int, int]) -> None:
    given_problem, rows = int8_problem(shape)
    scores = exact_scores(given_problem.queries, rows, given_problem.bias, given_problem.excluded)
    bound = bound_of(given_problem, rows, precision)
    with configured(precision, products=products):
        blocks = cpu.block_logsumexp(given_problem)
        same_blocks, mean = mean_of(given_problem)
    assert torch.equal(blocks, same_blocks)
    assert largest_error(blocks, in_blocks(scores).logsumexp(-1)) <= bound
    # Weights are rounded to 2^-16 of the largest in a block.
    error = float((mean - exact_mean(scores, rows)).abs().max())
    assert error <= float(rows.abs().max()) * (2 * bound + 2.0**-9 + 1e-6)


@pytest.mark.parametrize("products", PRODUCTS)
@given(shape=shapes)
def test_what_is_scored_again_has_full_precision(products: str, shape: tuple[int, int, int, int, int]) -> None:
    given_problem, rows = int8_problem(shape)
    scores = exact_scores(given_problem.queries, rows, given_problem.bias, given_problem.excluded)
    bound = ERRORS["highest"] * float(given_problem.queries.norm(dim=1).max() * rows.norm(dim=1).max()) + 1e-5
    n = min(5, len(rows))
    blocks = in_blocks(scores).amax(-1).argmax(1, keepdim=True)
    weight = given_problem.queries[:, 0].contiguous()
    with configured("highest", products=products):
        best, slots = cpu.hardest(given_problem, n)
        found = cpu.score_blocks(given_problem, blocks)[:, 0]
        log_scale = in_blocks(scores).logsumexp((0, 2)).float()
        masses = cpu.slot_masses(given_problem, weight, log_scale)
    assert largest_error(found, in_blocks(scores).gather(1, blocks[..., None].expand(-1, -1, 64))[:, 0]) <= bound
    assert largest_error(best, scores.topk(n).values) <= bound
    there = slots >= 0
    assert torch.equal(there, best > -math.inf)
    where = torch.where(there, scores.gather(1, slots.clamp(min=0)), -math.inf)
    assert largest_error(best, where) <= bound
    exact = sums.sum_of_rows(in_blocks(scores).flatten(1), weight.double())
    check_masses(masses, exact, log_scale, len(weight), bound + 1e-5)


@pytest.mark.parametrize("products", ["vectors", "narrow"])
def test_the_hardest_are_found_by_queries_of_16_bits(products: str) -> None:
    """At any precision: 8 bits would miss some of them."""
    given_problem, _ = int8_problem((40, 3000, 96, 0, 0))
    with configured("high", products=products):
        expected = cpu.hardest(given_problem, 20)
    with configured("medium", products=products):
        found = cpu.hardest(given_problem, 20)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("products", PRODUCTS)
def test_the_largest_numbers_do_not_overflow(products: str, precision: str) -> None:
    """All at their bounds, over more dimensions than 32 bits hold the sum of; more queries than a panel has."""
    rows, dim = (1100, 2000) if products != "emulated" else (40, 2000)  # which is slow
    queries, integers = torch.full((rows, dim), 3.0), torch.full((130, dim), 127, dtype=torch.int8)
    queries[1::2] *= -1
    scale = torch.full((130,), 2.0**-20)
    nothing = torch.empty(rows, 0, dtype=torch.int64)
    given_problem = Problem(queries, integers, torch.zeros(130), nothing, None, row_scale=scale)
    with configured(precision, products=products):
        found = cpu.block_logsumexp(given_problem)
    expected = in_blocks(queries.double() @ (integers.double() * 2.0**-20).T).logsumexp(-1)
    assert largest_error(found, expected) <= 1e-4


@pytest.mark.parametrize("products", ["vectors", "narrow"])
@given(shape=shapes)
@example(shape=(33, 127, 515, 0, 3))  # more dimensions than are summed at a time
def test_queries_of_8_bits_are_exact_at_medium(products: str, shape: tuple[int, int, int, int, int]) -> None:
    """Integers of any sign, the largest of which is 127, times a factor."""
    given_problem, rows = int8_problem(shape)
    generator = torch.Generator().manual_seed(shape[-1])
    queries = torch.randint(-127, 128, given_problem.queries.shape, generator=generator).float()
    queries[:, 0] = 127.0
    factor = torch.rand(len(queries), 1, generator=generator).mul(8).exp2() / 127 / shape[2]
    given_problem = given_problem._replace(queries=queries * factor)
    scores = exact_scores(given_problem.queries, rows, given_problem.bias, given_problem.excluded)
    with configured("medium", products=products):
        found = cpu.block_logsumexp(given_problem)
    assert largest_error(found, in_blocks(scores).logsumexp(-1)) <= 2e-3


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_queries_that_are_not_finite_are_seen(products: str, wrong: float) -> None:
    given_problem, _ = int8_problem((20, 200, 40, 0, 0))
    given_problem.queries[3, 7] = wrong
    given_problem.queries[5] = 0.0
    given_problem.queries[6] = 1e-42  # the factor of a 16-bit integer would be 0
    with configured("highest", products=products):
        found = cpu.block_logsumexp(given_problem)
    assert not bool(found[3].isfinite().any())
    assert bool(found[[0, 5, 6, 19]].isfinite().all())
    assert torch.allclose(found[5], found[6])
