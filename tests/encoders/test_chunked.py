"""Encoding in chunks gives the embeddings and gradients of encoding in one piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

import negcache_fn
from negcache_fn import chunked
from tests.support.builders import unit
from tests.support.checks import steps


class Tower(nn.Module):
    """Counts the rows of every call."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 16, dtype=torch.float64)
        self.outer = nn.Linear(16, 4, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.rows: list[int] = []
        self.dropped: list[Tensor] = []

    def forward(self, features: Any) -> Tensor:
        values = features["values"] * features["nested"]["weight"][:, None]
        self.rows.append(values.shape[0])
        kept = self.dropout(self.inner(values).tanh())
        self.dropped.append(kept.detach() == 0)
        return self.outer(kept)


def features(rows: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return {"values": values, "nested": {"weight": torch.rand(rows, generator=generator, dtype=torch.float64)}}


def gradients(encode: Any, tower: Tower, batch: Any, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    embeddings = encode(batch)
    return embeddings.detach(), list(
        torch.autograd.grad((embeddings * target).sum().square(), list(tower.parameters()))
    )


@given(rows=st.integers(1, 20), size=st.integers(1, 22), as_tensordict=st.booleans())
def test_embeddings_and_gradients(rows: int, size: int, as_tensordict: bool) -> None:
    tower = Tower()
    batch: Any = features(rows)
    target = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = gradients(tower, tower, batch, target)
    if as_tensordict:
        batch = TensorDict(batch, batch_size=[rows])
    embeddings, found = gradients(chunked(tower, size), tower, batch, target)
    torch.testing.assert_close(embeddings, expected[0], rtol=1e-12, atol=1e-12)
    for gradient, wanted in zip(found, expected[1], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)


def test_chunks_are_encoded_twice_and_never_more_rows_at_once() -> None:
    tower = Tower()
    chunked(tower, 4)(features(10)).sum().backward()
    assert tower.rows[:3] == [4, 4, 2]
    assert sorted(tower.rows[3:]) == [2, 4, 4]
    tower.rows.clear()
    with torch.no_grad():
        chunked(tower, 4)(features(10))
    assert tower.rows == [4, 4, 2]


def test_dropout_drops_the_same_again() -> None:
    tower = Tower(dropout=0.5)
    embeddings = chunked(tower, 4)(features(8))
    torch.rand(100)  # the generator has gone on
    embeddings.sum().backward()
    first, again = tower.dropped[:2], tower.dropped[2:]
    assert bool(first[0].any())
    for masks in first:
        assert any(torch.equal(masks, other) for other in again)


def test_a_step_in_chunks_is_the_step() -> None:
    results = []
    for size in (None, 3):
        tower = Tower()
        encode: Any = tower if size is None else chunked(tower, size)
        state = negcache_fn.init_cache(32, 4, features(1), embedding_dtype=torch.float64)
        for n in range(3):
            queries = torch.randn(5, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            out = negcache_fn.step_(
                state, queries, features(5, n), encode, options=negcache_fn.StepOptions(draws_per_query=2), scale=3.0
            )
            out.loss.backward()
        results.append((out.loss.detach(), tower.inner.weight.grad, state["items", "embedding"]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_it_is_a_module_with_the_parameters_of_the_encoder() -> None:
    tower = Tower()
    module = chunked(tower, 2)
    assert list(module.parameters()) == list(tower.parameters())
    assert not chunked(tower, 2).eval().encode.training
    assert chunked(lambda batch: batch["values"], 3)(features(7)).shape == (7, 3)


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="size is 0"):
        chunked(Tower(), 0)
    with pytest.raises(TypeError, match="encode is a int"):
        chunked(3, 2)  # pyright: ignore[reportArgumentType]
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(TypeError, match=r"DistributedDataParallel\(chunked\(encoder, size\)\)"):
        chunked(wrapped, 2)


@pytest.mark.no_cover
def test_chunks_compile_whole() -> None:
    """Inside a compiled step: one graph over three steps, the loss and gradients of the encoder in one piece."""
    tower = steps.Tower()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(negcache_fn.step_, fullgraph=True, backend=counter)
    results = []
    for function, encode in ((negcache_fn.step_, tower), (compiled, negcache_fn.chunked(tower, 3))):
        state = steps.warm(tower, 40).clone().lock_()
        for n in range(3):
            queries = unit(3, 6, n).requires_grad_()
            options = negcache_fn.StepOptions(draws_per_query=2)
            loss = function(state, queries, steps.documents(5, n), encode, scale=5.0, options=options).loss
            gradients = torch.autograd.grad(loss, [queries, *tower.parameters()])
        results.append((loss.detach(), *gradients))
    assert counter.frame_count == 1
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
