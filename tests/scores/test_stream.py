"""`summarize`: block log-sum-exps, and normalisers with their gradient, against a float64 matrix of all scores."""

from __future__ import annotations

import importlib
import math
import warnings

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from negcache_fn._kernels.blocks import BLOCK, GROUP
from negcache_fn._kernels.cpu import call as cpu
from negcache_fn._scores.definition import ScoreMatrix
from negcache_fn._scores.stream import Summary, logsumexp, summarize
from tests.support.strategies import soft_cap

shapes = st.tuples(st.integers(1, 20), st.integers(1, 300), st.integers(1, 40), st.integers(0, 3), st.integers(0, 999))
PATHS = ("kernel", "plain", "transform")


def make_matrix(
    rows: int, capacity: int, dim: int, exclusions: int, seed: int, *, dtype: torch.dtype, limited: bool = False
) -> ScoreMatrix:
    """Scores of about 10, with empty and excluded slots, and limits that cut some, all or none off."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(rows, dim, generator=generator, dtype=dtype) * 10 / math.sqrt(dim)
    embeddings = torch.randn(capacity, dim, generator=generator, dtype=dtype)
    bias = torch.randn(capacity, generator=generator, dtype=dtype)
    bias[torch.rand(capacity, generator=generator) < 0.2] = -math.inf
    excluded = torch.randint(-1, capacity, (rows, exclusions), generator=generator)
    limit = torch.randn(rows, generator=generator, dtype=dtype) * 10
    limit[torch.rand(rows, generator=generator) < 0.2] = -math.inf
    limit[torch.rand(rows, generator=generator) < 0.2] = math.inf
    return ScoreMatrix(queries, embeddings, bias, excluded, limit if limited else None, None)


def exact(matrix: ScoreMatrix, length: int = BLOCK) -> tuple[Tensor, Tensor, Tensor]:
    """Stretches, normalisers and their gradients in the queries, by autograd through all scores."""
    queries = matrix.queries.detach().double().requires_grad_()
    products = queries @ matrix.embeddings.double().T
    products = products if matrix.transform is None else matrix.transform(products)
    outside = torch.zeros_like(products, dtype=torch.bool)
    for row, slots in enumerate(matrix.excluded.tolist()):
        outside[row, [slot for slot in slots if slot >= 0]] = True
    if matrix.max_score is not None:
        outside |= products > matrix.max_score.double()[:, None]
    scores = (products + matrix.bias.double()).masked_fill(outside, -math.inf)
    padded = torch.nn.functional.pad(scores, (0, -scores.shape[1] % length), value=-math.inf)
    normalizers = logsumexp(scores)
    (gradient,) = torch.autograd.grad(normalizers.sum(), queries)
    return padded.unflatten(1, (-1, length)).logsumexp(-1).detach(), normalizers.detach(), gradient


def summarized(matrix: ScoreMatrix, weights: Tensor | None = None, length: int = BLOCK) -> tuple[Summary, Tensor]:
    queries = matrix.queries.clone().requires_grad_()
    found = summarize(matrix._replace(queries=queries), length)
    assert not found.stretches.requires_grad
    (gradient,) = torch.autograd.grad(found.log_normalizer, queries, weights or torch.ones(len(queries)).to(queries))
    return found, gradient


def check(matrix: ScoreMatrix, tolerance: float, length: int = BLOCK) -> None:
    """Within `tolerance` of exact, without and with a gradient."""
    stretches, normalizers, mean = exact(matrix, length)
    found, gradient = summarized(matrix, length=length)
    with torch.no_grad():
        constant = summarize(matrix, length)
    assert not constant.log_normalizer.requires_grad
    for given_value, expected in (
        (found.stretches, stretches),
        (found.log_normalizer, normalizers),
        (constant.stretches, stretches),
        (constant.log_normalizer, normalizers),
        (gradient, mean),
    ):
        torch.testing.assert_close(given_value.double().detach(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("path", PATHS)
@given(shape=shapes, limited=st.booleans())
@example(shape=(1, 1, 1, 0, 0), limited=False)
@example(shape=(3, 4161, 2, 1, 0), limited=True)
@example(shape=(3, 6500, 2, 1, 1), limited=False)
def test_summary_is_exact(path: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int], limited: bool) -> None:
    matrix = make_matrix(*shape, dtype=dtype, limited=limited and dtype == torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        if path == "plain":
            patch.setattr(cpu, "supports", lambda *_: False)
        if path == "transform":
            matrix = matrix._replace(transform=soft_cap)
        for length in (BLOCK, GROUP):
            check(matrix, 1e-11 if dtype == torch.float64 else 1e-4, length)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("path", PATHS)
def test_rows_without_documents_and_with_nan(path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value -inf and gradient 0; NaN in one row alone. Documents may begin after many empty slots, and end before."""
    matrix = make_matrix(4, 7000, 5, 0, 0, dtype=dtype)
    bias = torch.full_like(matrix.bias, -math.inf)
    bias[5000] = 2.0
    excluded = torch.tensor([[-1], [5000], [-1], [-1]])
    matrix = matrix._replace(bias=bias, excluded=excluded, transform=soft_cap if path == "transform" else None)
    if path == "plain":
        monkeypatch.setattr(cpu, "supports", lambda *_: False)
    matrix.queries[2, 1] = math.nan
    matrix.queries[3] *= 1e6
    found, gradient = summarized(matrix)
    assert (found.log_normalizer == -math.inf).tolist() == [False, True, False, False]
    assert found.log_normalizer.isnan().tolist() == [False, False, True, False]
    assert torch.equal(gradient[1], torch.zeros(5, dtype=dtype))
    assert bool(gradient[2].isnan().all())
    for row in (0,) if path == "transform" else (0, 3):
        slope = 1.0 if matrix.transform is None else exact(matrix)[2][0] / matrix.embeddings[5000]
        torch.testing.assert_close(gradient[row], matrix.embeddings[5000] * slope, check_dtype=False)
    empty, nothing = summarized(
        matrix._replace(bias=torch.full_like(bias, -math.inf), queries=torch.ones(4, 5, dtype=dtype))
    )
    assert bool((empty.log_normalizer == -math.inf).all())
    assert torch.equal(nothing, torch.zeros(4, 5, dtype=dtype))


@pytest.mark.parametrize("transform", [None, soft_cap], ids=["operator", "transform"])
def test_segments_merge(transform: None) -> None:
    """The log-sum-exp of segments' normalisers has the gradient of the whole, also where a segment is empty."""
    matrix = make_matrix(6, 3000, 7, 2, 1, dtype=torch.float64)._replace(transform=transform)
    matrix.bias[:1024] = -math.inf
    queries = matrix.queries.clone().requires_grad_()
    parts = [
        summarize(matrix._replace(queries=queries).of_slots(start, stop)).log_normalizer
        for start, stop in ((0, 1024), (1024, 2048), (2048, 3000))
    ]
    total = logsumexp(torch.stack(parts, -1))
    _, normalizers, mean = exact(matrix)
    torch.testing.assert_close(total, normalizers, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total.sum(), queries)[0], mean, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("path", PATHS)
def test_scores_far_apart(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rising and falling by thousands along the cache: nothing overflows, and what is below rounding has no weight."""
    if path == "plain":
        monkeypatch.setattr(cpu, "supports", lambda *_: False)
    matrix = make_matrix(3, 9000, 4, 0, 2, dtype=torch.float32)
    for bias in (torch.linspace(-4e4, 4e4, 9000), torch.linspace(4e4, -4e4, 9000)):
        far = matrix._replace(bias=bias, transform=torch.tanh if path == "transform" else None)
        check(far, 1e-2 if path == "transform" else 3e-3)  # scores of 4e4 are rounded to 2e-3


def test_a_second_derivative_is_refused() -> None:
    matrix = make_matrix(2, 70, 3, 0, 0, dtype=torch.float64)
    queries = matrix.queries.clone().requires_grad_()
    normalizer = summarize(matrix._replace(queries=queries)).log_normalizer
    (gradient,) = torch.autograd.grad(normalizer.sum(), queries, create_graph=True)
    with pytest.raises(NotImplementedError, match="once only"):
        gradient.sum().backward()


@pytest.mark.parametrize("transform", [None, soft_cap], ids=["operator", "transform"])
def test_parameters_get_gradients(transform: None) -> None:
    """Of the scale, folded into the queries, and of a transform."""
    matrix = make_matrix(3, 3000, 4, 1, 3, dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    own = None if transform is None else lambda products: torch.tanh(products * scale)
    queries = matrix.queries if own else matrix.queries * scale
    if own:
        queries.requires_grad_()
    found = summarize(matrix._replace(queries=queries, transform=own)).log_normalizer
    (given_gradient,) = torch.autograd.grad(found.sum(), scale)
    products = matrix.queries @ matrix.embeddings.T
    scores = (products * scale if own is None else own(products)) + matrix.bias
    scores = scores.scatter(1, matrix.excluded.clamp(min=0), -math.inf)
    (expected,) = torch.autograd.grad(scores.logsumexp(1).sum(), scale)
    torch.testing.assert_close(given_gradient, expected)


@pytest.mark.no_cover
@pytest.mark.parametrize("transform", [None, soft_cap], ids=["operator", "transform"])
def test_compiled_equals_eager(transform: None) -> None:
    """One graph over several steps, with and without a gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")
    torch._dynamo.reset()

    def function(*fields: Tensor) -> tuple[Tensor, Tensor]:
        return summarize(ScoreMatrix(*fields, None, transform))

    for wanted in (True, False):
        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for seed in range(3):
            fields = make_matrix(5, 2500, 6, 1, seed, dtype=torch.float32)[:4]
            leaves = [fields[0].clone().requires_grad_(wanted) for _ in range(2)]
            results = [call(leaf, *fields[1:]) for call, leaf in zip((function, compiled), leaves, strict=True)]
            torch.testing.assert_close(results[0], results[1])
            if wanted:
                gradients = [torch.autograd.grad(r[1].sum(), leaf)[0] for r, leaf in zip(results, leaves, strict=True)]
                torch.testing.assert_close(gradients[0], gradients[1])
        assert counter.frame_count == 1
    torch._dynamo.reset()
