"""Operators: loaded again, opaque to a compiler outside of a graph too, and never silent about a missing gradient."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

import negcache_fn
from negcache_fn import _operators
from negcache_fn._cache import select
from negcache_fn._operators import operator


def _fake_doubled(values: Tensor) -> Tensor:
    return torch.empty_like(values)


@pytest.fixture
def doubled():
    seen: list[bool] = []

    @operator("doubled_in_a_test", fake=_fake_doubled)
    def double(values: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return 2 * values

    yield double, seen
    _operators._LIBRARIES.pop("doubled_in_a_test")


def test_a_module_can_be_loaded_again() -> None:
    state = negcache_fn.init_cache(4, 2, torch.zeros(1, 3))
    before = negcache_fn.stalest(state, 2)
    importlib.reload(select)
    assert torch.equal(select.stalest(state, 2), before)
    assert torch.equal(negcache_fn.stalest(state, 2), before)  # the function of before


def test_is_not_compiled_where_its_caller_is_not(doubled) -> None:
    double, seen = doubled

    @torch.compile(backend="eager")
    def skipped(values: Tensor) -> Tensor:
        torch._dynamo.skip_frame()
        return double(values)

    assert torch.equal(skipped(torch.ones(2)), torch.full((2,), 2.0))
    assert seen == [False]


def test_a_missing_gradient_is_told(doubled) -> None:
    double, _ = doubled
    values = torch.ones(2, requires_grad=True)
    with pytest.warns(UserWarning, match="doubled_in_a_test.*autograd"):
        double(values).sum().backward()
