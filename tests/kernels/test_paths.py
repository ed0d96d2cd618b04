"""The oracles of draws and losses hold whichever code makes the products: plain torch, vectors of two widths, tiles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import negcache_fn
from negcache_fn._kernels.cpu import call as cpu
from negcache_fn._kernels.cpu import scans
from negcache_fn._kernels.dispatch import Problem
from tests.draws.test_sample import varied
from tests.kernels.test_cpu import PRECISIONS, PRODUCTS, configured, needs_kernels, problem
from tests.support.builders import unit
from tests.support.checks import draws, exact, updates


@pytest.fixture(params=["plain", *PRODUCTS])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One way to make products, for all the test."""
    if request.param == "plain":
        monkeypatch.setattr(cpu, "supports", lambda *_: False)
        monkeypatch.setattr(cpu, "supports_sums", lambda *_: False)
        monkeypatch.setattr(scans, "supports", lambda *_: False)
        yield request.param
        return
    if cpu.library() is None:
        pytest.skip("no C++ compiler on this machine")
    with configured("highest", products=request.param):
        yield request.param


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_distribution(path: str, storage: torch.dtype) -> None:
    draws.distribution(negcache_fn.sample_gumbel, varied(2500, storage), unit(3, 8, 9), scale=6.0)


def test_distribution_among_the_best(path: str) -> None:
    draws.distribution(negcache_fn.sample_gumbel, varied(1000), unit(3, 8, 9), scale=5.0, top_k=20)
    draws.cutoff_separates(negcache_fn.sample_gumbel, varied(1000), unit(3, 8, 9), 20, scale=5.0)


@pytest.mark.parametrize("exclude_ids", [torch.arange(0, 200, 3), torch.arange(9).view(3, 3) * 6], ids=["all", "each"])
def test_distribution_with_exclusions(path: str, exclude_ids: Tensor) -> None:
    draws.distribution(negcache_fn.sample_gumbel, varied(200), unit(3, 8, 9), scale=5.0, exclude_ids=exclude_ids)


def test_exact_loss_and_its_gradient(path: str) -> None:
    exact.large(negcache_fn.exact_loss, 5000, None)
    exact.large(negcache_fn.exact_loss, 1000, 30)


def test_writing(path: str) -> None:
    updates.history(negcache_fn.init_cache, negcache_fn.update)


@needs_kernels
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("products", PRODUCTS)
def test_low_precision_errs_less_than_naive_code(products: str, precision: str, storage: torch.dtype) -> None:
    """Against float64 scores of the true vectors: no more error than a product in the storage's own precision."""
    queries, vectors, bias, excluded = problem(70, 2000, 128, torch.float32, 0, 3)
    queries, bias = queries / queries.norm(dim=1, keepdim=True) * 20, torch.zeros_like(bias)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    truth = torch.nn.functional.pad(queries.double() @ vectors.double().T, (0, 48), value=-torch.inf)
    truth = truth.view(70, -1, 64).logsumexp(-1)
    naive = (queries.to(storage) @ vectors.to(storage).T).double()
    naive = torch.nn.functional.pad(naive, (0, 48), value=-torch.inf).view(70, -1, 64).logsumexp(-1)
    with configured(precision, products=products):
        ours = cpu.block_logsumexp(Problem(queries, vectors.to(storage), bias, excluded, None))
    error, naive_error = (float((found - truth).abs().mean()) for found in (ours, naive))
    assert error <= naive_error + 1e-6, (error, naive_error)
