"""What is measured: our step, what it is held against, and the list of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import negcache_fn
from examples.benchmarks.problem import SCALE, Problem
from examples.benchmarks.shapes import Shape
from negcache_fn import StepOptions
from negcache_fn.compilation import skip_library_guards

__all__ = ["BASELINE", "OURS", "PLAIN", "Call", "Method", "UnavailableError", "cache_step"]

BASELINE = "product"
"""The name of the method that all ratios refer to."""

Call = Callable[[], None]


class UnavailableError(Exception):
    """A method cannot be measured here; says why."""


@dataclass(frozen=True)
class Method:
    """Something to measure."""

    name: str
    label: str
    make: Callable[[Problem], Call]
    """The call to measure, its state made; UnavailableError where there is none."""
    bytes_needed: Callable[[Shape], int] = lambda shape: 0
    """A rough bound of what a call takes besides its inputs: what would not fit is left out."""
    swept: bool = True
    """Whether the sweeps have it, or only the main table."""
    compiled: bool = False


def cache_step(
    problem: Problem,
    step: Callable[..., negcache_fn.StepOutput],
    *,
    dtype: torch.dtype = torch.float32,
    options: StepOptions = StepOptions(),
    for_batch: bool = False,
) -> Call:
    """One step of the cache with its backward pass; the encoder gives rows that are there already.

    Args:
        problem: the inputs; its shape decides how many documents are drawn.
        step: `_step`, or what is compiled of it.
        dtype: of the cached embeddings.
        options: of the step, apart from the number of draws.
        for_batch: whether documents are drawn for the batch, not for each query.
    """
    state = problem.state(dtype)
    samples = problem.shape.samples
    if not for_batch:
        options = replace(options, draws_per_query=samples)
    elif samples > 1:
        options = replace(options, num_draws=samples * problem.shape.batch)

    def call() -> None:
        problem.next_batch()
        out = step(state, problem.queries, problem.features, problem.encoded, problem.ids, options)
        out.loss.backward()

    return call


def _step(
    state: Any, queries: Tensor, features: Any, encoded: Tensor, ids: Tensor, options: StepOptions
) -> negcache_fn.StepOutput:
    def encode(features: Any) -> Tensor:
        return encoded[-features["tokens"].shape[0] :]

    return negcache_fn.step_(state, queries, features, encode, options=options, scale=SCALE, ids=ids)


# One graph for most sizes: what it calls for the pass over the cache is the same whatever the size. There are others
# for each storage, and for each number of segments.
torch._dynamo.config.recompile_limit = 64
_compiled_step = torch.compile(_step, fullgraph=True, dynamic=True, options={"guard_filter_fn": skip_library_guards})


def _ours(
    name: str,
    label: str,
    *,
    compiled: bool = True,
    dtype: torch.dtype = torch.float32,
    options: StepOptions = StepOptions(),
    for_batch: bool = False,
    swept: bool = False,
    precision: str = "highest",
) -> Method:
    def make(problem: Problem) -> Call:
        step = _compiled_step if compiled else _step
        return _with_precision(precision, cache_step(problem, step, dtype=dtype, options=options, for_batch=for_batch))

    return Method(name, label, make, swept=swept, compiled=compiled)


def _with_precision(precision: str, call: Call) -> Call:
    """The call, under `torch.set_float32_matmul_precision`."""

    def with_precision() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            call()
        finally:
            torch.set_float32_matmul_precision(before)

    return with_precision


def _product(dtype: torch.dtype = torch.float32) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        queries, embeddings = problem.queries.detach().to(dtype), problem.embeddings(dtype)

        def call() -> None:
            queries @ embeddings.T

        return call

    return make


def _read(problem: Problem) -> Call:
    embeddings = problem.embeddings()

    def call() -> None:
        embeddings.sum()

    return call


def _full_softmax(problem: Problem) -> Call:
    embeddings = problem.embeddings()
    target = torch.zeros(problem.shape.batch, dtype=torch.int64, device=problem.device)

    def call() -> None:
        problem.next_batch()
        documents = problem.encoded[: problem.shape.batch]
        positive = (problem.queries * documents).sum(1, keepdim=True)
        logits = torch.cat([positive, problem.queries @ embeddings.T], 1)
        cross_entropy(SCALE * logits, target).backward()

    return call


_BFLOAT16 = torch.bfloat16

OURS = (
    _ours("ours", "`negcache_fn`, compiled", swept=True),
    _ours("ours-eager", "`negcache_fn`, eager", compiled=False, swept=True),
    _ours("ours-bf16", "`negcache_fn`, bfloat16 storage, compiled", dtype=_BFLOAT16),
    _ours("ours-bf16-eager", "`negcache_fn`, bfloat16 storage, eager", dtype=_BFLOAT16, compiled=False),
    _ours("ours-int8", "`negcache_fn`, int8 storage, compiled", dtype=torch.int8, swept=True),
    _ours("ours-high", '`negcache_fn`, precision "high", compiled', precision="high"),
    _ours(
        "ours-bf16-high",
        '`negcache_fn`, bfloat16 storage, precision "high", compiled',
        dtype=_BFLOAT16,
        precision="high",
    ),
    _ours(
        "ours-int8-medium",
        '`negcache_fn`, int8 storage, precision "medium", compiled',
        dtype=torch.int8,
        precision="medium",
    ),
    _ours("batch", "`negcache_fn`, draws for the batch, compiled", for_batch=True, swept=True),
    _ours("batch-eager", "`negcache_fn`, draws for the batch, eager", compiled=False, for_batch=True),
    _ours(
        "batch-bf16", "`negcache_fn`, draws for the batch, bfloat16 storage, compiled", dtype=_BFLOAT16, for_batch=True
    ),
    _ours(
        "batch-bf16-eager",
        "`negcache_fn`, draws for the batch, bfloat16 storage, eager",
        dtype=_BFLOAT16,
        compiled=False,
        for_batch=True,
    ),
    _ours("batch-int8", "`negcache_fn`, draws for the batch, int8 storage, compiled", dtype=torch.int8, for_batch=True),
    _ours(
        "batch-high", '`negcache_fn`, draws for the batch, precision "high", compiled', for_batch=True, precision="high"
    ),
    _ours("ours-top64", "`negcache_fn`, `top_k=64`, compiled", options=StepOptions(top_k=64)),
)

PLAIN = (
    Method(BASELINE, "bare product `queries @ embeddings.T`, float32", _product(), lambda shape: 4 * shape.scores),
    Method(
        "product-bf16",
        "bare product, bfloat16",
        _product(_BFLOAT16),
        lambda shape: 2 * shape.scores,
        swept=False,
    ),
    Method("read", "reading the embeddings once, float32", _read, swept=False),
    Method("softmax", "full softmax in plain torch, with backward", _full_softmax, lambda shape: 20 * shape.scores),
)
