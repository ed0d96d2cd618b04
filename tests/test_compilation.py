"""What guards of a compiled step are left out, and that those which matter are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

import negcache_fn
from negcache_fn import StepOptions
from negcache_fn.compilation import skip_library_guards

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of make_dual

DIM = 4
SETTINGS: dict[str, Any] = {"options": StepOptions(num_draws=3), "scale": 2.0}
"""Globals of this module: user code, whose changes must be noticed."""


def state() -> Any:
    cache = negcache_fn.init_cache(2048, DIM, features=torch.zeros(1, DIM))
    generator = torch.Generator().manual_seed(0)
    documents = torch.randn(300, DIM, generator=generator)
    return negcache_fn.update(cache, documents, documents, ids=torch.arange(300))


def step(cache: Any, queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    found = negcache_fn.step(cache, queries, documents, torch.sin, **SETTINGS)
    return found.loss, found.draw.slot


def compiled(filtered: Callable[[Sequence[Any]], list[bool]]) -> Any:
    torch._dynamo.reset()
    return torch.compile(step, backend="eager", fullgraph=True, options={"guard_filter_fn": filtered})


def batch(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, DIM, generator=generator), torch.randn(rows, DIM, generator=generator)


def test_checks_of_library_code_are_left_out() -> None:
    found: list[tuple[Any, bool]] = []

    def spy(guards: Sequence[Any]) -> list[bool]:
        kept = skip_library_guards(guards)
        found.extend(zip(guards, kept, strict=True))
        return kept

    compiled(spy)(state(), *batch(5))
    left_out = [guard for guard, kept in found if not kept]
    assert 0.3 * len(found) < len(left_out) < 0.7 * len(found)
    assert all("__import_" in guard.name for guard in left_out)
    values = [guard.value for guard in left_out]
    assert not any(isinstance(value, bool | int | float | str | Tensor | tuple) for value in values)
    assert step not in values
    assert all(kept for guard, kept in found if "forward_ad._current_level" in guard.name)


def test_all_other_changes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, of_filter = state(), compiled(skip_library_guards)

    def agree(rows: int) -> Tensor:
        (loss, slots), (expected, drawn) = of_filter(cache, *batch(rows)), step(cache, *batch(rows))
        torch.testing.assert_close(loss, expected)
        assert torch.equal(slots, drawn)
        return loss

    first = agree(5)
    agree(7)
    monkeypatch.setitem(SETTINGS, "scale", 3.0)
    assert agree(5) != first
    monkeypatch.setitem(SETTINGS, "options", StepOptions(draws_per_query=2))
    agree(5)
    cache = negcache_fn.resize(cache, 1024)
    agree(5)
    cache = negcache_fn.init_cache(2048, DIM, features=torch.zeros(1, DIM), embedding_dtype=torch.bfloat16)
    agree(5)
    queries, documents = batch(5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(queries, torch.ones_like(queries))
        for function in (step, of_filter):
            with pytest.raises(Exception, match="step is called under forward-mode"):
                function(cache, dual, documents)


@torch._dynamo.config.patch(recompile_limit=32)
def test_what_compiles_again() -> None:
    """The table of docs/recipes/compiling.md."""
    torch._dynamo.reset()
    counter = CompileCounter()
    options = StepOptions()

    def train(cache: Any, queries: Tensor, documents: Tensor, scale: float | Tensor, options: StepOptions) -> Tensor:
        return negcache_fn.step_(cache, queries, documents, torch.sin, scale=scale, options=options).loss

    function = torch.compile(train, backend=counter, fullgraph=True)

    def graphs(cache: Any, *, rows: int = 5, scale: float | Tensor = 2.0, options: StepOptions = options) -> int:
        before = counter.frame_count
        function(cache, *batch(rows), scale, options)
        return counter.frame_count - before

    cache = negcache_fn.init_cache(2048, DIM, features=torch.zeros(1, DIM))
    assert graphs(cache) == 1
    assert graphs(cache, options=StepOptions()) == 0
    assert [graphs(cache, rows=rows) for rows in (7, 3, 30)] == [1, 0, 0]
    assert [graphs(cache, scale=scale) for scale in (3.0, 4.0, 5.0)] == [1, 0, 0]
    assert [graphs(cache, scale=torch.tensor(scale)) for scale in (3.0, 4.0)] == [1, 0]
    assert graphs(cache, options=StepOptions(num_draws=2)) == 1
    assert graphs(negcache_fn.resize(cache, 1024)) == 1
    narrow = negcache_fn.init_cache(2048, DIM, features=torch.zeros(1, DIM), embedding_dtype=torch.bfloat16)
    assert graphs(narrow) == 1
    with torch.no_grad():
        assert [graphs(cache) for _ in range(2)] == [1, 0]
