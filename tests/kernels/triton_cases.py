"""The Triton kernel against float64: run by `test_triton.py` in a process of its own.

Triton decides once for a process, when it is first imported, whether it compiles kernels or interprets them.
"""

import math
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

import negcache_fn
from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.cpu import call as cpu
from negcache_fn._kernels.dispatch import Problem
from negcache_fn._kernels.triton import block_logsumexp as block_logsumexp_module
from negcache_fn._kernels.triton import call as cuda
from negcache_fn._kernels.triton import gumbel as gumbel_module
from negcache_fn._scores import masses as sums
from negcache_fn._scores import stream
from negcache_fn._scores.definition import ScoreMatrix
from tests.kernels.test_cpu import exact_scores, largest_error, limited_problem, masses, masses_problem, problem
from tests.kernels.test_int8 import int8_problem
from tests.kernels.test_labels import labelled
from tests.support.builders import unit

# The interpreter's numpy warns of log(0) and NaN, and of the interpreter's own calls.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Largest error relative to |q| |e|.
ERRORS = {
    torch.float32: {"highest": 2.0**-21, "high": 2.0**-19, "medium": 2.0**-9},
    torch.bfloat16: {"highest": 2.0**-16, "high": 2.0**-16, "medium": 2.0**-8},
    torch.float16: {"highest": 2.0**-20, "high": 2.0**-20, "medium": 2.0**-11},
}
# Of a weight, rounded before and after it is scaled.
WEIGHTS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ERRORS[torch.int8], WEIGHTS[torch.int8] = ERRORS[torch.bfloat16], WEIGHTS[torch.bfloat16]  # as which it is multiplied
ROUNDING = 2e-5  # of a log-sum-exp of scores of about 50, in float32

shapes = st.tuples(st.integers(1, 140), st.integers(1, 300), st.integers(1, 80), st.integers(0, 3), st.integers(0, 999))


@pytest.fixture(autouse=True)
def _precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # On a GPU every shape would be tuned: the tiles have a test of their own.
    monkeypatch.setattr(block_logsumexp_module, "are_deterministic_algorithms_enabled", lambda: True)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def block_logsumexp(*arguments: Tensor, limit: Tensor | None = None) -> Tensor:
    limit = None if limit is None else limit.to(DEVICE)
    return cuda.block_logsumexp(Problem(*(argument.to(DEVICE) for argument in arguments), limit)).cpu()


def blocks_and_mean(given_problem: Problem) -> tuple[Tensor, Tensor]:
    """The blocks, and the mean under each row's softmax."""
    blocks, total, log_scale = cuda.blocks_and_sums(given_problem)
    log_normalizer = blocks.logsumexp(1)
    assert torch.equal(log_scale == -math.inf, log_normalizer == -math.inf)
    return blocks, total * (log_scale - log_normalizer).masked_fill(log_scale == -math.inf, 0.0).exp()[:, None]


def exact_blocks(queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor) -> Tensor:
    scores = exact_scores(queries, embeddings, bias, excluded)
    return pad(scores, (0, -scores.shape[1] % 64), value=-math.inf).view(len(queries), -1, 64).logsumexp(-1)


def norms(queries: Tensor, embeddings: Tensor) -> float:
    return float(queries.norm(dim=1).max() * embeddings.float().norm(dim=1).max())


@pytest.mark.parametrize("storage", cuda._STORAGE)
@given(shape=shapes, precision=st.sampled_from(["highest", "high", "medium"]))
@example(shape=(1, 1, 1, 0, 0), precision="highest")
@example(shape=(64, 128, 32, 1, 1), precision="high")
@example(shape=(65, 129, 33, 2, 2), precision="medium")
@example(shape=(1100, 200, 3, 1, 3), precision="highest")  # two groups of tiles, the second narrower
def test_block_logsumexp_is_exact(storage: torch.dtype, shape: tuple[int, int, int, int, int], precision: str) -> None:
    """Any shape; empty, excluded and missing slots; every precision within its error."""
    rows, capacity, dim, exclusions, seed = shape
    arguments = problem(rows, capacity, dim, storage, exclusions, seed)
    torch.set_float32_matmul_precision(precision)
    bound = ERRORS[storage][precision] * norms(*arguments[:2]) + ROUNDING
    assert largest_error(block_logsumexp(*arguments), exact_blocks(*arguments)) <= bound


def exact_mean(scores: Tensor, embeddings: Tensor) -> Tensor:
    """Under the softmax of each row, 0 where it is empty."""
    return scores.softmax(1).nan_to_num() @ embeddings.double()


@pytest.mark.parametrize("storage", cuda._STORAGE)
@given(shape=shapes, precision=st.sampled_from(["highest", "high", "medium"]), chunk=st.sampled_from([2**25, 2**13]))
@example(shape=(65, 129, 33, 2, 2), precision="highest", chunk=2**13)
@example(shape=(3, 300, 8, 0, 5), precision="high", chunk=1)
def test_mean_is_exact(storage: torch.dtype, shape: tuple[int, int, int, int, int], precision: str, chunk: int) -> None:
    """At any number of slots at a time; weights are rounded as the storage is."""
    rows, capacity, dim, exclusions, seed = shape
    arguments = problem(rows, capacity, dim, storage, exclusions, seed)
    arguments[2][: capacity // 2] -= 30.0  # where a later chunk has all the mass
    torch.set_float32_matmul_precision(precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_WEIGHTS_BYTES", chunk)
        blocks, mean = blocks_and_mean(Problem(*(argument.to(DEVICE) for argument in arguments), None))
    scores = exact_scores(*arguments)
    of_scores = ERRORS[storage][precision] * norms(*arguments[:2]) + ROUNDING
    assert largest_error(blocks.cpu(), exact_blocks(*arguments)) <= of_scores
    of_weights = WEIGHTS[storage]
    if storage == torch.float32 and precision != "highest" and DEVICE == "cuda":
        of_weights = 2.0**-10  # cuBLAS multiplies in TF32
    largest = float(arguments[1].float().abs().max())
    error = (mean.cpu().double() - exact_mean(scores, arguments[1])).abs().max()
    assert float(error) <= largest * (2 * of_scores + 2 * of_weights)


@pytest.mark.parametrize("storage", cuda._STORAGE)
def test_mean_of_rows_without_documents_and_with_nan(storage: torch.dtype) -> None:
    queries, embeddings, bias, _ = problem(4, 300, 5, storage, 0, 0)
    bias[:128], bias[130:] = -math.inf, -math.inf
    bias[128:130] = 1.0
    excluded = torch.tensor([[-1, -1], [128, 129], [-1, -1], [128, -1]])
    queries[2, 1] = math.nan
    given_problem = Problem(*(argument.to(DEVICE) for argument in (queries, embeddings, bias, excluded)), None)
    mean = blocks_and_mean(given_problem)[1].cpu()
    assert mean.isnan().all(1).tolist() == [False, False, True, False]
    assert torch.equal(mean[1], torch.zeros(5))
    torch.testing.assert_close(mean[3], embeddings[129].float(), atol=1e-6, rtol=2.0**-7)


@pytest.mark.parametrize("storage", cuda._STORAGE)
def test_mass_spread_over_many_blocks_is_not_lost(storage: torch.dtype) -> None:
    """One document has half of it, and 4,096 others, each below a rounding of the half, share the rest."""
    capacity = 1 + 4096
    embeddings = torch.ones(capacity, 1).to(storage)
    embeddings[0] = 0.0
    bias = torch.zeros(capacity)
    bias[0] = math.log(4096)
    bias[1:] -= 1.0
    arguments = (torch.ones(1, 1), embeddings, bias, torch.empty(1, 0, dtype=torch.int64))
    mean = blocks_and_mean(Problem(*(argument.to(DEVICE) for argument in arguments), None))[1]
    torch.testing.assert_close(mean.cpu(), torch.tensor([[0.5]]), atol=2.0**-9, rtol=0)


@pytest.mark.parametrize("storage", cuda._STORAGE)
@given(shape=shapes)
def test_limits_on_the_score(storage: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    """Products of small integers are exact, and limits between integers leave nothing to rounding."""
    arguments, limit = limited_problem(*shape[:3], storage, *shape[3:])
    scores = exact_scores(*arguments)
    scores = scores.masked_fill(arguments[0].double() @ arguments[1].double().T > limit[:, None], -math.inf)
    expected = pad(scores, (0, -scores.shape[1] % 64), value=-math.inf).view(len(limit), -1, 64).logsumexp(-1)
    assert largest_error(block_logsumexp(*arguments, limit=limit), expected) <= 1e-4


@masses
def test_masses_of_slots(rows: int, capacity: int, storage: torch.dtype, limited: bool) -> None:
    given_problem, weight, expected = masses_problem(rows, capacity, storage, limited)
    on_device = Problem(*(None if value is None else value.to(DEVICE) for value in given_problem))
    found = cuda.slot_masses(on_device, weight.to(DEVICE)).cpu()
    assert torch.equal(found > -math.inf, expected > -math.inf)
    # Half parts of queries of up to 4 times embeddings of up to 4, 16 products.
    atol = 1e-4 + ERRORS[storage]["highest"] * norms(given_problem.queries.nan_to_num(), given_problem.embeddings)
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)


def test_masses_with_nan_are_seen() -> None:
    given_problem, weight, _ = masses_problem(70, 130, torch.float32, False)
    given_problem.queries[66, 0] = math.nan
    found = cuda.slot_masses(Problem(*(None if v is None else v.to(DEVICE) for v in given_problem)), weight.to(DEVICE))
    assert bool(found[:130].isnan().any())


@pytest.mark.parametrize("storage", cuda._STORAGE)
@pytest.mark.parametrize("chunk", [2**25, 2**13])
def test_labels(storage: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of the row's label have the score -inf, in every block and in the mean, also in the second stretch."""
    monkeypatch.setattr(cuda, "_WEIGHTS_BYTES", chunk)
    rows, capacity = 70, 2 * BLOCK + 33
    arguments = problem(rows, capacity, 24, storage, 1, 3)
    labels, scores = labelled(arguments, exact_scores(*arguments))
    given = Problem(*(argument.to(DEVICE) for argument in arguments), None, *(values.to(DEVICE) for values in labels))
    expected = pad(scores, (0, -capacity % BLOCK), value=-math.inf).view(rows, -1, BLOCK).logsumexp(-1)
    of_scores = ERRORS[storage]["highest"] * norms(*arguments[:2]) + ROUNDING
    assert largest_error(cuda.block_logsumexp(given).cpu(), expected) <= of_scores
    blocks, mean = blocks_and_mean(given)
    assert largest_error(blocks.cpu(), expected) <= of_scores
    error = (mean.cpu().double() - exact_mean(scores, arguments[1])).abs().max()
    largest = float(arguments[1].float().abs().max())
    assert float(error) <= largest * (2 * of_scores + 2 * (WEIGHTS[storage] + 2e-6))
    masses = cuda.slot_masses(given, torch.zeros(rows, device=DEVICE)).cpu()[:capacity]
    assert largest_error(masses, scores.logsumexp(0)) <= of_scores


@pytest.mark.parametrize("storage", cuda._STORAGE)
def test_blocks_without_documents_are_empty(storage: torch.dtype) -> None:
    queries, embeddings, bias, _ = problem(3, 200, 5, storage, 0, 0)
    bias[64:128] = -math.inf
    excluded = torch.full((3, 65), -1)
    excluded[1, :64] = torch.arange(64)
    excluded[2, 64] = 199
    empty = block_logsumexp(queries, embeddings, bias, excluded) == -math.inf
    assert empty.tolist() == [[False, True, False, False], [True, True, False, False], [False, True, False, False]]


@pytest.mark.parametrize("storage", cuda._STORAGE)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e7])
def test_queries_of_any_size(storage: torch.dtype, size: float) -> None:
    """float16 ends at 65504 and float32's square at 1e38: neither is met."""
    queries, embeddings, _, excluded = problem(7, 100, 40, storage, 0, 0)
    bias = torch.zeros(100)
    queries = queries * size * torch.tensor([0.0, 1e-3, 1.0, 1.0, 1.0, 1.0, 1.0])[:, None]
    bound = ERRORS[storage]["highest"] * norms(queries, embeddings) + ROUNDING
    expected = exact_blocks(queries, embeddings, bias, excluded)
    assert largest_error(block_logsumexp(queries, embeddings, bias, excluded), expected) <= bound


@pytest.mark.parametrize("storage", cuda._STORAGE)
def test_nan_is_seen(storage: torch.dtype) -> None:
    """Also past exclusions: a maximum passes over NaN, so that only -inf remains."""
    queries, embeddings, bias, excluded = problem(20, 200, 40, storage, 63, 0)
    queries[3, 7] = math.nan
    excluded[3] = torch.arange(63)
    found = block_logsumexp(queries, embeddings, bias, excluded).isnan()
    assert bool(found[3].all())
    assert not bool(found[[0, 2, 4, 19]].any())


@given(
    shape=shapes,
    precision=st.sampled_from(["highest", "medium"]),
    limited=st.booleans(),
    chunk=st.sampled_from([2**25, 2**13]),
)
@example(shape=(65, 129, 33, 2, 2), precision="highest", limited=True, chunk=2**25)
@example(shape=(3, 300, 8, 0, 5), precision="highest", limited=False, chunk=1)
def test_rows_with_scales(shape: tuple[int, int, int, int, int], precision: str, limited: bool, chunk: int) -> None:
    """Int8, in all three passes and at any number of slots at a time, against float64 of the decoded rows."""
    given_problem, rows = int8_problem(shape)
    queries, _, bias, excluded = given_problem[:4]
    scores, products = exact_scores(queries, rows, bias, excluded), queries.double() @ rows.T
    if limited:
        # Between two products, where rounding decides nothing.
        ordered = products.flatten().sort().values
        place = int(ordered.diff().argmax()) if len(ordered) > 1 else 0
        limit = (ordered[place] + ordered[min(place + 1, len(ordered) - 1)]).float() / 2 + (len(ordered) == 1)
        given_problem = given_problem._replace(max_score=limit.expand(len(queries)).contiguous())
        scores = scores.masked_fill(products > limit, -math.inf)
    torch.set_float32_matmul_precision(precision)
    on_device = Problem(*(None if value is None else value.to(DEVICE) for value in given_problem))
    bound = ERRORS[torch.int8][precision] * norms(queries, rows) + ROUNDING
    padded = pad(scores, (0, -scores.shape[1] % 64), value=-math.inf)
    expected = padded.view(len(scores), -1, 64).logsumexp(-1)
    assume(not limited or len(ordered) == 1 or float(ordered.diff().max()) > 2 * bound)
    assert largest_error(cuda.block_logsumexp(on_device).cpu(), expected) <= bound
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_WEIGHTS_BYTES", chunk)
        blocks, mean = blocks_and_mean(on_device)
    assert largest_error(blocks.cpu(), expected) <= bound
    error = (mean.cpu().double() - exact_mean(scores, rows)).abs().max()
    assert float(error) <= float(rows.abs().max()) * (2 * bound + 2 * WEIGHTS[torch.int8])
    weight = queries[:, 0].contiguous()
    masses_found = cuda.slot_masses(on_device, weight.to(DEVICE)).cpu()
    assert largest_error(masses_found, sums.sum_of_rows(padded, weight.double())) <= bound + ROUNDING


@pytest.mark.parametrize("storage", cuda._STORAGE)
def test_the_passes_take_the_kernel(storage: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the operators: the same block values, gradient and draws as in plain torch."""
    matrix = ScoreMatrix(*(argument.to(DEVICE) for argument in problem(5, 2100, 24, storage, 2, 1)), None, None)
    state = negcache_fn.init_cache(500, 8, torch.zeros(1, 2), embedding_dtype=storage)
    state = negcache_fn.update(state, torch.zeros(500, 2), unit(500, 8, seed=0)).to(DEVICE)
    queries = unit(6, 8, seed=1).to(DEVICE)

    def everything() -> list[Tensor]:
        leaf = matrix.queries.clone().requires_grad_()
        total = stream.summarize(matrix._replace(queries=leaf)).log_normalizer
        total.sum().backward()
        assert leaf.grad is not None
        draw = negcache_fn.sample_gumbel(state, queries, scale=10.0, draws_per_query=3)
        return [stream.reduce_blocks(matrix, "logsumexp"), total.detach(), leaf.grad, draw.slot, draw.log_normalizer]

    monkeypatch.setattr(cpu, "supports", lambda *_: False)
    monkeypatch.setattr(cuda, "supports", lambda *_: False)
    expected = everything()
    monkeypatch.setattr(cuda, "supports", lambda *_: True)
    found = everything()
    torch.testing.assert_close(
        found.pop(2), expected.pop(2), atol=2e-3 + WEIGHTS[storage] * 8, rtol=0
    )  # embeddings up to 4
    for given_value, value in zip(found, expected, strict=True):
        torch.testing.assert_close(given_value, value, atol=2e-3, rtol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="tuned on a GPU alone")
@pytest.mark.parametrize(("rows", "dim"), [(16, 128), (300, 128), (300, 768)])
@pytest.mark.parametrize("storage", cuda._STORAGE)
def test_tuned_tiles_are_exact(storage: torch.dtype, rows: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile that the tuner may choose for the batch is tried, and one of them gives the result."""
    monkeypatch.setattr(block_logsumexp_module, "are_deterministic_algorithms_enabled", lambda: False)
    torch.set_float32_matmul_precision("highest")
    arguments = problem(rows, 3000, dim, storage, 1, 0)
    bound = ERRORS[storage]["highest"] * norms(*arguments[:2]) + ROUNDING
    assert largest_error(block_logsumexp(*arguments), exact_blocks(*arguments)) <= bound


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    quads=st.integers(1, 90),
    level=st.integers(0, 3),
)
def test_gumbel_variates_are_those_of_plain_torch(seed: int, step: int, rows: int, quads: int, level: int) -> None:
    """The same words, and logarithms that agree to the last bits: of the variate, or of 1 where it is smaller."""
    keys = torch.tensor(seed, device=DEVICE), torch.tensor(step, device=DEVICE)
    row = torch.arange(rows, device=DEVICE)[:, None] + 2**31
    quad = torch.arange(quads, device=DEVICE) + 2**32 - quads
    expected = negcache_fn.random.gumbel(*keys, row, quad, level=level)
    given_value = torch.empty(rows, quads, 4, device=DEVICE)
    gumbel_module.launch(*keys, *(x.contiguous() for x in torch.broadcast_tensors(row, quad)), level, given_value)
    torch.testing.assert_close(given_value, expected, atol=1e-6, rtol=1e-6)
