"""The CPU kernels' weighted sums of embeddings, the gradient of the pass, against float64."""

from __future__ import annotations

import ctypes
import math
import platform

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from negcache_fn._kernels.cpu import call as cpu
from negcache_fn._kernels.dispatch import Problem
from tests.kernels.test_cpu import (
    PRECISIONS,
    PRODUCTS,
    STORAGES,
    bound_of_pass,
    configured,
    exact_scores,
    largest_error,
    limited_problem,
    needs_kernels,
    problem,
    shapes,
)

# Largest error of the weights of a block, relative to their sum: in float32, and as 16-bit integers.
EXACT, ROUNDED = 2.0**-20, 2.0**-10
_DENORMAL = 2 | 16  # an operand is denormal, or a result

pytestmark = needs_kernels


def mean_of(given_problem: Problem) -> tuple[Tensor, Tensor]:
    """The blocks, and the mean under each row's softmax; 0 where it is empty."""
    blocks, total, log_scale = cpu.blocks_and_sums(given_problem)
    log_normalizer = blocks.double().logsumexp(1)
    empty = log_normalizer == -math.inf
    assert bool((log_scale[empty] == -math.inf).all())
    return blocks, total.double() * (log_scale - log_normalizer).masked_fill(empty, 0.0).exp()[:, None]


def exact_mean(scores: Tensor, embeddings: Tensor) -> Tensor:
    return scores.softmax(1).nan_to_num() @ embeddings.double()


def check(
    arguments: tuple[Tensor, ...], scores: Tensor, of_scores: float, limit: Tensor | None = None, rounds: bool = False
) -> None:
    rows, capacity = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -capacity % 64), value=-math.inf).view(rows, -1, 64)
    blocks, mean = mean_of(Problem(*arguments, limit))
    assert largest_error(blocks, padded.logsumexp(-1)) <= of_scores
    largest = float(arguments[1].float().abs().max())
    error = float((mean - exact_mean(scores, arguments[1])).abs().max())
    of_weights = ROUNDED if rounds or arguments[1].dtype == torch.bfloat16 else EXACT
    assert error <= largest * (2 * of_scores + 2 * of_weights + 1e-6)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("products", PRODUCTS)
@given(shape=shapes)
@example(shape=(1, 1, 1, 0, 0))
@example(shape=(17, 64, 32, 1, 1))
@example(shape=(16, 65, 33, 2, 2))
@example(shape=(33, 127, 49, 0, 3))
def test_mean_is_exact(
    products: str, precision: str, storage: torch.dtype, shape: tuple[int, int, int, int, int]
) -> None:
    rows, capacity, dim, exclusions, seed = shape
    arguments = problem(rows, capacity, dim, storage, exclusions, seed)
    with configured(precision, products=products):
        bound, rounds = bound_of_pass(arguments, precision, products), products == "vectors" and precision != "highest"
        check(arguments, exact_scores(*arguments), bound, rounds=rounds)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("products", PRODUCTS)
@given(shape=shapes)
def test_limits_on_the_score(products: str, storage: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    arguments, limit = limited_problem(*shape[:3], storage, *shape[3:])
    scores = exact_scores(*arguments)
    scores = scores.masked_fill(arguments[0].double() @ arguments[1].double().T > limit[:, None], -math.inf)
    with configured("highest", products=products):
        check(arguments, scores, 1e-4, limit)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("products", PRODUCTS)
def test_many_rows_and_threads(products: str, storage: torch.dtype) -> None:
    """More queries than one panel holds; sums of several threads."""
    rows, capacity = (1100, 3000) if products != "emulated" else (70, 800)  # which is slow
    arguments = problem(rows, capacity, 768, storage, 1, 0)
    with configured("highest", products=products):
        check(arguments, exact_scores(*arguments), 1e-3)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("products", PRODUCTS)
def test_rows_without_documents_and_with_nan(products: str, storage: torch.dtype) -> None:
    queries, embeddings, bias, _ = problem(20, 700, 33, storage, 0, 0)
    bias[:320] = -math.inf
    bias[330:] = -math.inf
    bias[325] = 1.0
    excluded = torch.full((20, 10), -1)
    excluded[4] = torch.arange(320, 330)
    queries[7, 3] = math.nan
    with configured("highest", products=products):
        blocks, mean = mean_of(Problem(queries, embeddings, bias, excluded, None))
    assert mean.isnan().any(1).nonzero().flatten().tolist() == [7]
    assert torch.equal(mean[4], torch.zeros(33, dtype=torch.float64))
    assert bool((blocks[4] == -math.inf).all())
    with configured("highest", products=products):
        nothing = cpu.blocks_and_sums(Problem(queries[:2], embeddings, bias - math.inf, excluded[:2], None))
    assert torch.equal(nothing[1], torch.zeros(2, 33))


@pytest.mark.parametrize("descending", [True, False], ids=["descending", "ascending"])
def test_scores_of_any_size(descending: bool) -> None:
    """From -4,000 to 4,000: the sums are rescaled as scores rise."""
    queries, embeddings, _, excluded = problem(20, 9000, 16, torch.float32, 1, 0)
    bias = torch.linspace(-4e3, 4e3, 9000) * (-1 if descending else 1)
    arguments = (queries, embeddings, bias, excluded)
    check(arguments, exact_scores(*arguments), 3e-3)


def skipping(depth: float, value: float) -> float:
    """The mean of a coordinate that is 0 in one block, and `value` in 4,000 others of exp(-depth) times its mass."""
    blocks = 4001
    embeddings = torch.zeros(64 * blocks, 2)
    embeddings[64:, 1] = value
    bias = torch.full((64 * blocks,), -depth)
    bias[:64] = 0.0
    nothing = torch.empty(1, 0, dtype=torch.int64)
    # One thread sees all blocks: another one has no larger block to compare with.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    mean = mean_of(Problem(torch.tensor([[1.0, 0.0]]), embeddings, bias, nothing, None))[1]
    torch.set_num_threads(threads)
    return float(mean[0, 1])


def test_mass_spread_over_many_blocks_is_not_skipped() -> None:
    """Each is below the rounding of the largest, all together are not."""
    mass = 4000 * math.exp(-17.0)
    assert skipping(17.0, 1.0) == pytest.approx(mass / (1 + mass), rel=1e-4)


def test_blocks_below_rounding_are_skipped() -> None:
    """Together as well; nothing else could keep such a coordinate from the mean."""
    assert skipping(30.0, 1e30) == 0.0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag is one of x86")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("spread", [30.0, 88.0, 130.0])
def test_no_number_is_at_the_end_of_the_range(storage: torch.dtype, spread: float) -> None:
    """Where scores differ by 88 and more, a weight, or its product, takes a hundred times as long if it is denormal.

    The CPU notes that it has met such a number. One thread: each has flags of its own.
    """
    queries, embeddings, bias, excluded = problem(20, 1000, 33, storage, 1, 0)
    bias = bias.clone().uniform_(-spread, 0, generator=torch.Generator().manual_seed(1))
    arguments = (queries, embeddings, bias, excluded)
    library, threads = ctypes.CDLL(None), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        library.feclearexcept(_DENORMAL)
        cpu.blocks_and_sums(Problem(*arguments, None))
        assert library.fetestexcept(_DENORMAL) == 0
    finally:
        torch.set_num_threads(threads)
    check(arguments, exact_scores(*arguments), bound_of_pass(arguments, "highest", "vectors"))
