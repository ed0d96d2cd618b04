"""The CPU kernels against float64, over shapes, storages and precisions."""

import ctypes
import functools
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import negcache_fn
from negcache_fn._draws import noise
from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.cpu import build, functions, scans
from negcache_fn._kernels.cpu import call as cpu
from negcache_fn._kernels.cpu import noise as noise_kernels
from negcache_fn._kernels.dispatch import Problem
from negcache_fn._scores import hardest, stream
from negcache_fn._scores import masses as sums
from negcache_fn._scores.definition import ScoreMatrix

CPU_INFO = Path("/proc/cpuinfo")
HAS_PAIRS, HAS_INTEGERS = (
    CPU_INFO.exists() and flag in CPU_INFO.read_text() for flag in ("avx512_bf16", "avx512_vnni")
)
PRODUCTS = (
    pytest.param("tiles", marks=pytest.mark.skipif(not cpu._multiplies_tiles(), reason="no bfloat16 tiles here")),
    pytest.param("emulated", marks=pytest.mark.skipif(not HAS_PAIRS, reason="no AVX-512 with bfloat16 here")),
    "vectors",
    pytest.param("narrow", marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="another kind of CPU")),
)
PRECISIONS = ("highest", "high", "medium")
STORAGES = (torch.float32, torch.bfloat16, torch.float16)
# Error of a product of P bfloat16 parts relative to |q| |e|: 2^-8 is the unit roundoff of one part.
ERRORS = {"highest": 2.0**-21, "high": 2.0**-15, "medium": 2.0**-7}
INTEGERS = 2.0**-13  # the same of 16-bit integers, with room: each number errs by up to 2^-14.5 of the largest


def bound_of_pass(arguments: tuple[Tensor, ...], precision: str, products: str) -> float:
    """Of the scores where all of the cache is summed over, for which tiles take two parts at most."""
    queries, embeddings = arguments[:2]
    if products == "vectors" and precision != "highest":
        error = INTEGERS  # where the CPU multiplies them
    else:
        error = ERRORS["high" if precision == "highest" and products in ("tiles", "emulated") else precision]
    return error * float(queries.norm(dim=1).max() * embeddings.float().norm(dim=1).max()) + 1e-5


load_library = build._load.__wrapped__
needs_kernels = pytest.mark.skipif(build.library() is None, reason="no C++ compiler on this machine")


@contextmanager
def configured(precision: str, *, products: str) -> Iterator[None]:
    """With a precision of float32 products, and the way to make them.

    By "tiles", "emulated" tiles, "vectors" or "narrow" vectors (not AVX-512).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_FEW_QUERIES", 0)
        patch.setattr(cpu, "_multiplies_tiles", lambda: products in ("tiles", "emulated"))
        if products in FLAGS:
            patch.setattr(functions, "library", lambda: library_with(*FLAGS[products]))
        yield
    torch.set_float32_matmul_precision(before)


FLAGS = {
    "narrow": ("-mno-avx512f",),
    "emulated": ("-D__AMX_BF16__", "-include", str(Path(__file__).with_name("emulated_tiles.h"))),
}


@functools.cache
def library_with(*flags: str) -> ctypes.CDLL | None:
    """The kernels, built with other flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_FLAGS", (*build._FLAGS, *flags))
        return load_library()


def problem(rows: int, capacity: int, dim: int, storage: torch.dtype, exclusions: int, seed: int) -> tuple[Tensor, ...]:
    """Queries, embeddings, bias with empty slots, and excluded slots."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(rows, dim, generator=generator) * 10 / math.sqrt(dim)
    embeddings = torch.randn(capacity, dim, generator=generator).to(storage)
    bias = torch.randn(capacity, generator=generator)
    bias[torch.rand(capacity, generator=generator) < 0.2] = -math.inf
    excluded = torch.randint(-1, capacity, (rows, exclusions), generator=generator)
    return queries, embeddings, bias, excluded


def limited_problem(
    rows: int, capacity: int, dim: int, storage: torch.dtype, exclusions: int, seed: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of small integers, and with limits between integers that cut some, all or none off."""
    generator = torch.Generator().manual_seed(seed)
    _, _, bias, excluded = problem(rows, capacity, dim, storage, exclusions, seed)
    queries = torch.randint(-2, 3, (rows, dim), generator=generator).float()
    embeddings = torch.randint(-2, 3, (capacity, dim), generator=generator).to(storage)
    limit = torch.randint(-4, 5, (rows,), generator=generator) + 0.5
    limit[torch.rand(rows, generator=generator) < 0.2] = -math.inf
    limit[torch.rand(rows, generator=generator) < 0.2] = math.inf
    return (queries, embeddings, bias, excluded), limit


def exact_scores(queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor) -> Tensor:
    scores = queries.double() @ embeddings.double().T + bias
    for row, slots in enumerate(excluded.tolist()):
        scores[row, [slot for slot in slots if slot >= 0]] = -math.inf
    return scores


def largest_error(computed: Tensor, expected: Tensor) -> float:
    assert torch.equal(computed == -math.inf, expected == -math.inf)
    assert not bool(computed.isnan().any())
    return float((computed.double() - expected).nan_to_num().abs().max())


shapes = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 80), st.integers(0, 3), st.integers(0, 999))


@needs_kernels
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("products", PRODUCTS)
@given(shape=shapes)
@example(shape=(1, 1, 1, 0, 0))
@example(shape=(17, 64, 32, 1, 1))
@example(shape=(16, 65, 33, 2, 2))
def test_block_logsumexp_is_exact(
    products: str, precision: str, storage: torch.dtype, shape: tuple[int, int, int, int, int]
) -> None:
    rows, capacity, dim, exclusions, seed = shape
    arguments = problem(rows, capacity, dim, storage, exclusions, seed)
    scores = exact_scores(*arguments)
    padded = torch.nn.functional.pad(scores, (0, -capacity % 64), value=-math.inf)
    with configured(precision, products=products):
        computed = cpu.block_logsumexp(Problem(*arguments, None))
    bound = bound_of_pass(arguments, precision, products)
    assert largest_error(computed, padded.view(rows, -1, 64).logsumexp(-1)) <= bound


@needs_kernels
@pytest.mark.parametrize("storage", STORAGES)
@given(shape=shapes)
def test_score_blocks_is_exact(storage: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    rows, capacity, dim, exclusions, seed = shape
    arguments = problem(rows, capacity, dim, storage, exclusions, seed)
    blocks = torch.randint(0, -(-capacity // 64), (rows, 2), generator=torch.Generator().manual_seed(seed))
    padded = torch.nn.functional.pad(exact_scores(*arguments), (0, -capacity % 64), value=-math.inf)
    expected = padded.view(rows, -1, 64).gather(1, blocks[..., None].expand(-1, -1, 64))
    assert largest_error(cpu.score_blocks(Problem(*arguments, None), blocks), expected) <= 2e-4


@needs_kernels
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("products", PRODUCTS)
@given(shape=shapes, data=st.data())
def test_hardest_equals_plain_torch(
    products: str, storage: torch.dtype, shape: tuple[int, int, int, int, int], data: st.DataObject
) -> None:
    """Small integers are exact in every storage, and full of ties, which go by slot."""
    rows, capacity, dim, exclusions, seed = shape
    n = data.draw(st.integers(1, capacity))
    generator = torch.Generator().manual_seed(seed)
    _, _, bias, excluded = problem(rows, capacity, dim, storage, exclusions, seed)
    queries = torch.randint(-2, 3, (rows, dim), generator=generator).float()
    embeddings = torch.randint(-2, 3, (capacity, dim), generator=generator).to(storage)
    bias = torch.where(bias > -math.inf, 0.0, bias)
    with configured("highest", products=products):
        scores, slots = cpu.hardest(Problem(queries, embeddings, bias, excluded, None), n)
    matrix = ScoreMatrix(queries, embeddings, bias, excluded, None, None)
    expected_scores, expected_slots = hardest._hardest(matrix, n)
    assert torch.equal(scores, expected_scores)
    assert torch.equal(slots, expected_slots)


def pipes(length: int, count: int) -> Tensor:
    """Numbers that rise and fall, for which the median of first, middle and last number is a bad pivot each time."""
    rising = torch.arange(length // 2)
    return torch.cat([rising, rising.flip(0)]).repeat(count).float()


@needs_kernels
@pytest.mark.parametrize("n", [1, 65, 500])
@pytest.mark.parametrize(
    "order",
    [
        lambda length: torch.arange(4 * length).float(),
        lambda length: -torch.arange(4 * length).float(),
        lambda length: pipes(length, 4),
        lambda length: torch.arange(4 * length).fmod(3).float(),
        lambda length: torch.zeros(4 * length),
    ],
    ids=["rising", "falling", "pipes", "three values", "one value"],
)
def test_hardest_in_any_order(order, n: int) -> None:
    scores = order(2 * n + BLOCK)  # so many are kept before the best n of them are chosen
    arguments = (torch.ones(1, 1), scores[:, None], torch.zeros(len(scores)), torch.empty(1, 0, dtype=torch.int64))
    best, slots = cpu.hardest(Problem(*arguments, None), n)
    expected = scores.sort(descending=True, stable=True)
    assert torch.equal(best[0], expected.values[:n])
    assert torch.equal(slots[0], expected.indices[:n])


@needs_kernels
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("products", PRODUCTS)
@given(shape=shapes)
def test_limits_on_the_score(products: str, storage: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    """Products of small integers are exact, and limits between integers leave nothing to rounding."""
    rows, capacity, dim, exclusions, seed = shape
    arguments, limit = limited_problem(rows, capacity, dim, storage, exclusions, seed)
    scores = exact_scores(*arguments)
    products_alone = arguments[0].double() @ arguments[1].double().T
    scores = scores.masked_fill(products_alone > limit[:, None], -math.inf)
    blocks = torch.nn.functional.pad(scores, (0, -capacity % 64), value=-math.inf).view(rows, -1, 64)
    n = min(capacity, 9)
    with configured("highest", products=products):
        assert largest_error(cpu.block_logsumexp(Problem(*arguments, limit)), blocks.logsumexp(-1)) <= 1e-4
        best, slots = cpu.hardest(Problem(*arguments, limit), n)
    chosen = blocks.amax(-1).argmax(-1, keepdim=True)
    # Of a block in which nothing is left the lowest score stays; one with something is exact.
    found = cpu.score_blocks(Problem(*arguments, limit), chosen)[:, 0]
    expected = blocks.gather(1, chosen[..., None].expand(-1, -1, 64))[:, 0]
    nothing = (scores == -math.inf).all(1, keepdim=True)
    assert largest_error(found.masked_fill(nothing, 0.0), expected.masked_fill(nothing, 0.0)) <= 1e-4
    matrix = ScoreMatrix(*arguments, limit, None)
    assert largest_error(best, hardest._hardest(matrix, n)[0].double()) <= 1e-4
    assert largest_error(best, scores.topk(n).values) <= 1e-4
    assert torch.equal(slots < 0, best == -math.inf)


@needs_kernels
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize(("rows", "capacity", "exclusions"), [(40, 300, 200), (1100, 130, 7), (3, 64, 64)])
def test_many_exclusions(products: str, rows: int, capacity: int, exclusions: int) -> None:
    """In any order, repeated, of slots that are not here, and of more rows than a panel has."""
    queries, embeddings, bias, excluded = problem(rows, capacity, 5, torch.float32, exclusions, 0)
    excluded[::3, ::2] += capacity
    excluded[1, :] = excluded[1, 0]
    excluded[2, : min(exclusions, 64)] = torch.arange(min(exclusions, 64)).flip(0)
    inside = torch.where(excluded < capacity, excluded, -1)
    scores = exact_scores(queries, embeddings, bias, inside)
    padded = torch.nn.functional.pad(scores, (0, -capacity % 64), value=-math.inf).view(rows, -1, 64)
    with configured("highest", products=products):
        found = cpu.block_logsumexp(Problem(queries, embeddings, bias, excluded, None))
    assert largest_error(found, padded.logsumexp(-1)) <= 1e-3
    assert bool((found[2, 0] == -math.inf) == (exclusions >= 64))


@needs_kernels
def test_a_chosen_block_is_never_empty() -> None:
    """The lowest score that may be drawn stays, also where it is above the limit; the others above it do not."""
    queries, embeddings = torch.tensor([[1.0]]), torch.arange(64.0)[:, None]
    bias = torch.zeros(64)
    bias[0] = -math.inf
    arguments = (queries, embeddings, bias, torch.tensor([[1]]), torch.tensor([-3.0]))
    blocks = torch.zeros(1, 1, dtype=torch.int64)
    for scores in (
        cpu.score_blocks(Problem(*arguments), blocks),
        stream._score_blocks(ScoreMatrix(*arguments, None), blocks),
    ):
        assert torch.nonzero(scores[0, 0] > -math.inf).tolist() == [[2]]


@needs_kernels
@pytest.mark.parametrize("products", PRODUCTS)
def test_many_rows_and_threads(products: str) -> None:
    """More queries than one panel holds, more candidates than room for them before the first selection."""
    rows, capacity = (1100, 3000) if products != "emulated" else (70, 800)  # which is slow
    arguments = problem(rows, capacity, 768, torch.float32, 1, 0)
    expected = exact_scores(*arguments)
    blocks = torch.nn.functional.pad(expected, (0, -capacity % 64), value=-math.inf).view(rows, -1, 64)
    with configured("highest", products=products):
        assert largest_error(cpu.block_logsumexp(Problem(*arguments, None)), blocks.logsumexp(-1)) <= 1e-3
        scores, slots = cpu.hardest(Problem(*arguments, None), 100)
    assert largest_error(scores, expected.topk(100).values) <= 1e-3
    assert largest_error(scores, expected.gather(1, slots)) <= 1e-3


def extremes(kind: str, count: int, dim: int) -> Tensor:
    """Rows whose numbers are all as large as the largest, none but one, or half of them one after the other."""
    signs = torch.randint(0, 2, (count, dim), generator=torch.Generator().manual_seed(count)) * 2.0 - 1.0
    signs[::2] = 1.0
    if kind == "one":
        return signs * (torch.arange(dim) == dim // 3)
    return signs * (torch.arange(dim) < dim // 2) if kind == "half" else signs


@needs_kernels
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("of_queries", ["all", "half", "one"])
@pytest.mark.parametrize("of_embeddings", ["all", "half", "one"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_no_sum_overflows(storage: torch.dtype, of_embeddings: str, of_queries: str, size: float) -> None:
    """Of products of numbers at their bounds, of any size, which is that of the scores divided by 2 D."""
    queries, embeddings = 2.0 / size * extremes(of_queries, 35, 2001), size * extremes(of_embeddings, 130, 2001)
    nothing = torch.empty(35, 0, dtype=torch.int64)
    arguments = (queries, embeddings.to(storage), torch.zeros(130), nothing)
    scores = torch.nn.functional.pad(exact_scores(*arguments), (0, 62), value=-math.inf)
    with configured("high", products="vectors"):
        blocks, total, log_scale = cpu.blocks_and_sums(Problem(*arguments, None))
    bound = bound_of_pass(arguments, "high", "vectors")
    assert largest_error(blocks, scores.view(35, 3, 64).logsumexp(-1)) <= bound
    # Scores are multiples of 2, and of an even number: those that are not largest have no weight.
    mean = total.double() * (log_scale - blocks.logsumexp(1)).double().exp()[:, None]
    expected = scores.softmax(1)[:, :130] @ arguments[1].double()
    assert float((mean - expected).abs().max()) <= size * (2 * min(bound, 1.0) + 2.0**-8)


@needs_kernels
@pytest.mark.parametrize(("precision", "wrong"), [("highest", math.nan), ("high", math.nan), ("high", math.inf)])
@pytest.mark.parametrize("storage", STORAGES)
def test_numbers_that_are_not_finite_are_seen(precision: str, wrong: float, storage: torch.dtype) -> None:
    """In the row of such a query, and in the block of such an embedding; zeros and the smallest numbers are neither."""
    queries, embeddings, bias, excluded = problem(20, 200, 40, storage, 0, 0)
    queries[:, 39] = queries[:, 39].abs()  # or the product with infinity would leave no score
    queries[3, 7], queries[5], queries[6] = wrong, 0.0, 1e-42
    embeddings[130, 39], embeddings[1], embeddings[2] = wrong, 0.0, 1e-42
    bias[130] = 0.0
    with configured(precision, products="vectors"):
        blocks = cpu.block_logsumexp(Problem(queries, embeddings, bias, excluded, None))
    finite = torch.ones(20, 4, dtype=torch.bool)
    finite[3] = finite[:, 2] = False
    assert torch.equal(blocks.isfinite(), finite)
    torch.testing.assert_close(blocks[5, 0], bias[:64].logsumexp(0))
    torch.testing.assert_close(blocks[6, 0], bias[:64].logsumexp(0))


@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize("limited", [True, False], ids=["limited", "unlimited"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_operators_are_what_they_say(
    native: bool, limited: bool, storage: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strides, aliasing and fake kernels, whichever code runs: a compiled graph relies on them."""
    if not native:
        monkeypatch.setattr(cpu, "supports", lambda *_: False)
    queries, embeddings, bias, excluded = problem(3, 200, 8, storage, 1, 0)
    if storage == torch.float64:
        queries, bias = queries.double(), bias.double()
    scale = bias.exp() if storage == torch.int8 else None
    arguments = (queries, embeddings, bias, excluded, None, None, None, scale)
    if limited:
        labels = torch.tensor([0, -2, 1], dtype=torch.int32), torch.arange(200, dtype=torch.int32) % 3 - 1
        arguments = (*arguments[:4], queries.new_tensor([1.0, 2.0, 3.0]), *labels, scale)
    blocks = torch.tensor([[0, 3], [1, 1], [2, 0]])
    for reduction in ("logsumexp", "max"):
        torch.library.opcheck(torch.ops.negcache_fn.reduce_blocks.default, (*arguments, reduction))
    torch.library.opcheck(torch.ops.negcache_fn.score_blocks.default, (*arguments, blocks))
    torch.library.opcheck(torch.ops.negcache_fn.hardest.default, (*arguments, 5))
    for differentiable in (True, False):
        torch.library.opcheck(torch.ops.negcache_fn.summarize.default, (*arguments, BLOCK, differentiable))
    queries.requires_grad_()
    # Not the last check, which sums all outputs: only one of them is differentiable.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.negcache_fn.summarize.default, (*arguments, BLOCK, True), test_utils=checks)


@needs_kernels
def test_nan_is_seen() -> None:
    queries, embeddings, bias, excluded = problem(20, 200, 40, torch.float32, 0, 0)
    queries[3, 7] = math.nan
    found = cpu.block_logsumexp(Problem(queries, embeddings, bias, excluded, None)).isnan()
    assert bool(found[3].all())
    assert not bool(found[[0, 19]].any())


@needs_kernels
def test_an_unknown_storage_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a result that nobody wrote."""
    given_problem = Problem(*problem(2, 70, 8, torch.float32, 0, 0), None)
    monkeypatch.setattr(cpu, "_NUMBERS", {torch.float32: 7})
    for call in (
        lambda: cpu.block_logsumexp(given_problem),
        lambda: cpu.score_blocks(given_problem, torch.zeros(2, 1, dtype=torch.int64)),
        lambda: cpu.hardest(given_problem, 3),
    ):
        with pytest.raises(RuntimeError, match=r"does not know the storage number of torch\.float32"):
            call()


@needs_kernels
@given(data=st.data(), capacity=st.integers(1, 300))
def test_lowest_and_find_slots_equal_a_list(data: st.DataObject, capacity: int) -> None:
    keys = data.draw(st.lists(st.integers(-3, 3), min_size=capacity, max_size=capacity))
    skip = data.draw(st.lists(st.booleans(), min_size=capacity, max_size=capacity))
    n = data.draw(st.integers(1, capacity + 3))
    order = sorted((key, slot) for slot, key in enumerate(keys) if not skip[slot])[:n]
    expected = [slot for _, slot in order] + [-1] * (n - len(order))
    assert scans.lowest_slots(torch.tensor(keys), torch.tensor(skip), n).tolist() == expected
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    cached = torch.randperm(2 * capacity, generator=generator)[:capacity] * 2**40
    cached[torch.rand(capacity, generator=generator) < 0.2] = -1
    live = torch.tensor(skip).long() - 1
    ids = torch.randint(-1, 2 * capacity, (n,), generator=generator) * 2**40
    ids[ids < 0] = -1
    places = {int(document): slot for slot, document in enumerate(cached) if document >= 0 and live[slot] >= 0}
    assert scans.find_slots(ids, cached, live).tolist() == [places.get(int(document), -1) for document in ids]


def masses_problem(rows: int, capacity: int, storage: torch.dtype, limited: bool) -> tuple[Problem, Tensor, Tensor]:
    """With the weights of the rows, and the exact masses. Rows that do not count are NaN; some masses are tiny."""
    generator = torch.Generator().manual_seed(0)
    queries, limit, weight = (torch.randn(*size, generator=generator) for size in ((rows, 16), (rows,), (rows,)))
    embeddings = torch.randn(capacity, 16, generator=generator).to(storage)
    bias, excluded = torch.zeros(capacity), torch.randint(-1, capacity, (rows, 2), generator=generator)
    bias[3::7] = -math.inf
    weight = 30 * weight - 200
    weight[4::5] = -math.inf
    exact = ScoreMatrix(
        queries.double(), embeddings.double(), bias.double(), excluded, limit.double() if limited else None, None
    )
    expected = sums.sum_of_rows(exact.scores(), weight.double())
    queries[4::5] = math.nan
    return Problem(queries, embeddings, bias, excluded, limit if limited else None), weight, expected


masses = pytest.mark.parametrize(
    ("rows", "capacity", "storage", "limited"),
    [
        (rows, capacity, storage, limited)
        for limited in (False, True)
        for rows, capacity, storage in (
            (1, 1, torch.float32),
            (5, 64, torch.float32),
            (70, 200, torch.bfloat16),
            (1500, 130, torch.float16),
        )
    ],
)


@needs_kernels
@masses
def test_masses_of_slots(rows: int, capacity: int, storage: torch.dtype, limited: bool) -> None:
    """Of 1500 rows, more than a panel has."""
    given_problem, weight, expected = masses_problem(rows, capacity, storage, limited)
    log_scale = about_masses_of_blocks(expected)
    check_masses(cpu.slot_masses(given_problem, weight, log_scale), expected, log_scale, rows)
    blocks = torch.arange(len(log_scale))
    torch.library.opcheck(torch.ops.negcache_fn.slot_masses.default, (*given_problem, blocks, weight, log_scale))


def check_masses(found: Tensor, expected: Tensor, log_scale: Tensor, rows: int, bound: float = 1e-4) -> None:
    """Against float64; of slots that are far below the scale of their block, one of the rows may be all that counts."""
    assert torch.equal(found > -math.inf, expected > -math.inf)
    small = expected < log_scale.repeat_interleave(BLOCK)[: len(expected)] - 60.0
    least = torch.where(small, expected - math.log(rows), expected)
    assert bool((found <= expected + bound).all())
    assert bool((found >= least - bound).all())


def about_masses_of_blocks(masses: Tensor) -> Tensor:
    """Their log-sum-exps, each off by a factor of up to 20."""
    return (masses.view(-1, BLOCK).logsumexp(1) + torch.arange(len(masses) // BLOCK).cos() * 3).float()


@needs_kernels
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", [3, 70])
def test_masses_of_some_blocks_are_read_where_they_lie(rows: int, storage: torch.dtype) -> None:
    """As if they had been copied, which they are where the last block is not whole."""
    for capacity in (6 * BLOCK, 6 * BLOCK - 1):
        given_problem, weight, expected = masses_problem(rows, capacity, storage, False)
        blocks = torch.tensor([0, 2, 5])
        expected = expected.view(-1, BLOCK)[blocks].flatten()
        log_scale = about_masses_of_blocks(expected)
        found = torch.ops.negcache_fn.slot_masses(*given_problem, blocks, weight, log_scale)
        check_masses(found, expected, log_scale, rows)


@needs_kernels
@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 15), (5, 16), (7, 100), (300, 4000), (0, 3), (4, 0)])
def test_logsumexp(rows: int, columns: int, scale: float) -> None:
    """Of finite values and -inf; NaN is seen wherever it is, and stays in its row."""
    values = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    values[:, ::7] = -math.inf
    values[2:3] = -math.inf
    found = cpu.logsumexp(values)
    torch.testing.assert_close(found.double(), values.double().logsumexp(1), atol=1e-5, rtol=1e-6)
    for place in (0, columns - 1):
        if rows > 1 and columns > 0:
            spoilt = values.clone()
            spoilt[1, place] = math.nan
            assert cpu.logsumexp(spoilt).isnan().nonzero().flatten().tolist() == [1]


@needs_kernels
@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 63), (33, 64), (7, 200), (300, 4000), (0, 3), (4, 0)])
def test_sums_of_rows(rows: int, columns: int, scale: float) -> None:
    """Of finite values and -inf; rows without weight do not count, even if they hold NaN, and NaN elsewhere is seen."""
    generator = torch.Generator().manual_seed(0)
    values = scale * torch.randn(rows, columns, generator=generator)
    values[:, ::7] = -math.inf
    weight = torch.randn(rows, generator=generator)
    if rows > 4:
        values[3], weight[3] = math.nan, -math.inf
        values[1, :2] = -math.inf
    kept = weight > -math.inf
    expected = (values[kept].double() + weight[kept, None]).logsumexp(0)
    found = cpu.sum_of_rows(values, weight)
    assert torch.equal(found > -math.inf, expected > -math.inf)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(sums._sum_of_rows(values, weight), found, atol=1e-4, rtol=1e-6)
    torch.library.opcheck(torch.ops.negcache_fn.sum_of_rows.default, (values, weight))
    if rows > 4:
        values[2, columns // 2] = math.nan
        assert bool(cpu.sum_of_rows(values, weight)[columns // 2].isnan())


@needs_kernels
@pytest.mark.parametrize(("rows", "quads"), [(1, 1), (3, 5), (40, 700), (0, 4)])  # 28,000 counters: on all threads
@pytest.mark.parametrize("seed", [0, -5, 2**40 + 3, -(2**63)])
def test_noise_has_the_bits_of_plain_torch(rows: int, quads: int, seed: int) -> None:
    key = torch.tensor(seed), torch.tensor(2**33 + 17)
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(2**32, (rows, 1), generator=generator)
    quad = torch.randint(2**32, (quads,), generator=generator)
    places = torch.broadcast_tensors(row, quad)
    expected = negcache_fn.random.gumbel(*key, row, quad, level=2)
    assert torch.equal(noise_kernels.gumbel(*key, *places, 2), expected)
    assert torch.equal(noise._gumbel_op(*key, *places, 2), expected)
    torch.library.opcheck(torch.ops.negcache_fn.gumbel.default, (*key, *places, 2))


@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_noise_is_float32_whatever_the_default(
    default: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(noise_kernels, "gumbel", lambda *_: None)
    key, places = (torch.tensor(0), torch.tensor(1)), (torch.arange(50), torch.arange(50))
    expected = negcache_fn.random.gumbel(*key, *places, level=0)
    torch.set_default_dtype(default)
    try:
        found = noise._gumbel_op(*key, *places, 0)
        torch.library.opcheck(torch.ops.negcache_fn.gumbel.default, (*key, *places, 0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
