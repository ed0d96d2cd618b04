"""What plain torch scores: on devices without a kernel, in float64 and with a transform."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.cpu import call as cpu
from negcache_fn._scores import hardest as package
from negcache_fn._scores.definition import ScoreMatrix, Similarity
from negcache_fn._scores.hardest import hardest
from negcache_fn._scores.stream import blocks_and_mean, score_blocks, summarize
from tests.scores.test_definition import ranked
from tests.scores.test_stream import exact, make_matrix
from tests.support.builders import is_close
from tests.support.strategies import soft_cap


def whole_numbers(capacity: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> ScoreMatrix:
    """Scores that are small integers: hundreds tie, some at the limit; empty slots, exclusions, limits and labels.

    The second query's limit is below all that a whole block has.
    """
    generator = torch.Generator().manual_seed(seed)
    queries = torch.tensor([[1.0, 0.0], [1.0, -1.0], [0.0, 0.0]], dtype=dtype)
    embeddings = torch.randint(-2, 3, (capacity, 2), generator=generator).to(dtype)
    embeddings[:BLOCK] = torch.tensor([2.0, -2.0], dtype=dtype)
    bias = torch.randint(-1, 2, (capacity,), generator=generator).to(dtype)
    bias[torch.rand(capacity, generator=generator) < 0.2] = -math.inf
    excluded = torch.randint(-1, capacity, (3, 20), generator=generator)
    limit = torch.tensor([1.0, 2.0, math.inf], dtype=dtype)
    labels = torch.tensor([1, -2, 0], dtype=torch.int32), torch.randint(-1, 3, (capacity,), generator=generator)
    return ScoreMatrix(queries, embeddings, bias, excluded, limit, None, labels[0], labels[1].to(torch.int32))


def scores_of(matrix: ScoreMatrix) -> Tensor:
    """All scores, in loops."""
    products = matrix.queries.double() @ matrix.embeddings.double().T
    products = products if matrix.transform is None else matrix.transform(products)
    scores = products + matrix.bias.double()
    for i in range(len(scores)):
        for j in range(scores.shape[1]):
            above = matrix.max_score is not None and float(products[i, j]) > float(matrix.max_score[i])
            labels = matrix.row_labels, matrix.slot_labels
            same = labels[0] is not None and labels[1] is not None and int(labels[0][i]) == int(labels[1][j])
            if above or same or j in matrix.excluded[i].tolist():
                scores[i, j] = -math.inf
    return scores


@pytest.fixture(params=["kernel", "plain", "transform"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which code scores."""
    if request.param == "plain":
        monkeypatch.setattr(cpu, "supports", lambda *_: False)
    return request.param


def on(path: str, matrix: ScoreMatrix) -> ScoreMatrix:
    """The matrix as that code takes it: in float32, or with a transform that leaves it as it is."""
    if path == "transform":
        return matrix._replace(transform=lambda products: products * 1.0)
    tensors = (matrix.queries, matrix.embeddings, matrix.bias)
    queries, embeddings, bias = (values.float() for values in tensors)
    limit = None if matrix.max_score is None else matrix.max_score.float()
    return matrix._replace(queries=queries, embeddings=embeddings, bias=bias, max_score=limit)


@pytest.mark.parametrize("n", [1, 2, 3, 40, 200])
@pytest.mark.parametrize("slab", [1, 32])
def test_hardest_in_order(path: str, slab: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties by slot across blocks and slabs; the best may each be in a block of its own; what is missing is -1."""
    monkeypatch.setattr(package, "_SLAB", slab)
    matrix = on(path, whole_numbers(1500))
    for given in (matrix, matrix.of_slots(0, 230), matrix._replace(max_score=None)):
        expected, slots = ranked(scores_of(given), min(n, len(given.bias)))
        found, where = hardest(given, min(n, len(given.bias)))
        assert torch.equal(where, slots)
        assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_hardest_spread_over_blocks(path: str, n: int) -> None:
    """One in each block, the best in the later ones: n blocks are needed."""
    capacity = 9 * BLOCK
    queries, bias = torch.ones(1, 1).double(), torch.full((capacity,), -50.0).double()
    bias[::BLOCK] = torch.arange(9.0).double()
    nothing = torch.empty(1, 0, dtype=torch.int64)
    matrix = on(path, ScoreMatrix(queries, torch.zeros(capacity, 1).double(), bias, nothing, None, None))
    assert hardest(matrix, n)[1].tolist() == [[BLOCK * (8 - place) for place in range(n)]]


def test_scores_at_the_limit_stay(path: str) -> None:
    """In the pass, its gradient, and in blocks scored again."""
    matrix = on(path, whole_numbers(700))
    scores = scores_of(matrix)
    blocks, log_normalizer, _ = blocks_and_mean(matrix)
    padded = torch.nn.functional.pad(scores, (0, -700 % BLOCK), value=-math.inf).unflatten(1, (-1, BLOCK))
    assert is_close(blocks, padded.logsumexp(-1), 1e-5)
    assert is_close(log_normalizer, scores.logsumexp(1), 1e-5)
    numbers = torch.arange(padded.shape[1]).expand(3, -1)
    again = score_blocks(matrix, numbers)
    some = (padded > -math.inf).any(-1)  # of others a score may be left
    assert torch.equal(again.double()[some], padded[some])


def test_stretches_are_the_columns(path: str) -> None:
    """Of every query, with its exclusions and limit; past the end nothing."""
    matrix = on(path, whole_numbers(700))
    scores = torch.nn.functional.pad(scores_of(matrix), (0, 68), value=-math.inf)
    for length, numbers in ((BLOCK, [0, 3, 10]), (256, [1, 2]), (BLOCK, [2])):
        columns = torch.cat([torch.arange(number * length, (number + 1) * length) for number in numbers])
        found = matrix.of_stretches(torch.tensor(numbers), length).scores()
        assert torch.equal(found.double(), scores[:, columns])


def test_a_chosen_block_has_something_to_draw(path: str) -> None:
    """Whatever rounding says of the limit: its lowest score that is not excluded stays, and no other above it."""
    queries, bias = torch.ones(2, 1).double(), torch.zeros(BLOCK).double()
    bias[0], bias[9] = -math.inf, -3.0
    embeddings = torch.arange(5.0, 5.0 + BLOCK).double()[:, None]
    excluded = torch.tensor([[1, 2], [-1, -1]])
    limit = torch.tensor([8.0 - 1e-5, 6.0 - 1e-5]).double()
    matrix = on(path, ScoreMatrix(queries, embeddings, bias, excluded, limit, None))
    again = score_blocks(matrix, torch.zeros(2, 1, dtype=torch.int64))[:, 0]
    assert (again > -math.inf).nonzero().tolist() == [[0, 3], [1, 1]]
    assert again[0, 3] == 8 and again[1, 1] == 6


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_low_precision_is_stored_not_computed(path: str, storage: torch.dtype) -> None:
    """Pass, gradient, blocks scored again and pairs: as exact for the stored numbers as float32 is."""
    made = make_matrix(5, 700, 24, 2, 4, dtype=torch.float32)
    stored = made.embeddings.to(storage)
    matrix = made._replace(embeddings=stored, transform=soft_cap if path == "transform" else None)
    blocks, normalizers, mean = exact(matrix)
    queries = matrix.queries.clone().requires_grad_()
    found = summarize(matrix._replace(queries=queries)).log_normalizer
    of_mean = blocks_and_mean(matrix)
    (gradient,) = torch.autograd.grad(found.sum(), queries)
    close: Any = {"atol": 2e-5, "rtol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(of_mean[0], blocks, **close)
    torch.testing.assert_close(found.detach(), normalizers, **close)
    if path != "kernel":  # whose weights are bfloat16 beside such embeddings: tests/kernels/test_sums.py
        torch.testing.assert_close(of_mean[2], mean, atol=2e-4, rtol=2e-4, check_dtype=False)
        torch.testing.assert_close(gradient, mean, atol=2e-4, rtol=2e-4, check_dtype=False)
    again = score_blocks(matrix, torch.tensor([[0, 10]] * 5)).flatten(1).logsumexp(1)
    torch.testing.assert_close(again, blocks[:, [0, 10]].logsumexp(1), **close)
    similarity = Similarity(torch.float32, 1.5, matrix.transform)
    products = 1.5 * matrix.queries.double() @ stored.double().T
    expected = products if matrix.transform is None else matrix.transform(products)
    torch.testing.assert_close(similarity.pairwise(matrix.queries, stored), expected, **close)
    each = similarity.rowwise(matrix.queries, stored[:10].view(5, 2, 24))
    torch.testing.assert_close(each, expected[:, :10].view(5, 5, 2)[range(5), range(5)], **close)
