"""Times of the Triton kernel beside cuBLAS's product of the same shape: ``python -m examples.gpu.kernels``.

The product writes its B x C scores; the kernel reduces them where they are made. Both are timed as CUDA graphs, which
leave out Python, medians of many calls in one process; `call_ms` is a call from Python. The floor is the larger of two
times: the embeddings read once, and the products of the storage's dtype, at the rates that this device showed for a
large copy and a large product.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from examples.benchmarks.shapes import SIZES, Shape, parse_size
from examples.command_line import CommandParser, run
from negcache_fn._codec import decode, encode
from negcache_fn._kernels.problem import Problem
from negcache_fn._kernels.triton import call as triton

__all__ = ["KINDS", "main", "measure"]

SHAPES = (*SIZES, Shape(1024, 2**17, 768), Shape(256, 2**20, 128))
KINDS = (
    (torch.float32, "highest"),
    (torch.float32, "medium"),
    (torch.bfloat16, "highest"),
    (torch.bfloat16, "medium"),
    (torch.int8, "highest"),
    (torch.int8, "medium"),
)


def measure(
    shapes: tuple[Shape, ...], kinds: tuple[tuple[torch.dtype, str], ...], device: str
) -> Iterator[dict[str, Any]]:
    """One row per shape, storage and precision; the rates of the device first."""
    yield {"device": _name(device), **_rates(device)}
    for shape in shapes:
        for storage, precision in kinds:
            problem = _problem(shape, storage, device)
            with _precision(precision):
                row = _row(shape, storage, precision)
                start = time.perf_counter()
                error = _error(problem)
                row |= {"first_call_seconds": time.perf_counter() - start, "largest_error": error}
                row["kernel_ms"] = _milliseconds(lambda p=problem: triton.block_logsumexp(p))
                row["call_ms"] = _call_milliseconds(lambda p=problem: triton.block_logsumexp(p))
                row["with_sums_ms"] = _milliseconds(lambda p=problem: triton.blocks_and_sums(p))
                row["sums_error"] = _sums_error(problem)
                row["product_ms"] = _milliseconds(_product(problem))
                row["tile"] = _tile(storage)
            row["ratio"] = row["kernel_ms"] / row["product_ms"]
            yield row


def _row(shape: Shape, storage: torch.dtype, precision: str) -> dict[str, Any]:
    return {
        "batch": shape.batch,
        "capacity": shape.capacity,
        "dim": shape.dim,
        "storage": str(storage).removeprefix("torch."),
        "precision": precision,
    }


def _problem(shape: Shape, storage: torch.dtype, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def unit(rows: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, shape.dim, generator=generator, device=device))

    columns = encode(unit(shape.capacity), storage)
    return Problem(
        20.0 * unit(shape.batch),
        columns["embedding"],
        torch.zeros(shape.capacity, device=device),
        torch.full((shape.batch, 1), -1, device=device),
        None,
        row_scale=columns.get("embedding_scale"),
    )


def _decoded(problem: Problem, rows: slice = slice(None)) -> Tensor:
    """The embeddings in float64."""
    scale = None if problem.row_scale is None else problem.row_scale[rows]
    return decode(problem.embeddings[rows], scale, torch.float64)


def _product(problem: Problem) -> Callable[[], Tensor]:
    if problem.row_scale is None:
        queries = problem.queries.to(problem.embeddings.dtype)
        return lambda: queries @ problem.embeddings.T
    integers = encode(problem.queries, torch.int8)["embedding"]
    return lambda: torch._int_mm(integers, problem.embeddings.T)


def _error(problem: Problem) -> float:
    """Of the kernel's log-sum-exps of the first 64 queries, against float64."""
    found = triton.block_logsumexp(problem)[:64].double()
    worst = 0.0
    for start in range(0, problem.embeddings.shape[0], 2**16):
        rows = _decoded(problem, slice(start, start + 2**16))
        exact = (problem.queries[:64].double() @ rows.T).unflatten(1, (-1, 64)).logsumexp(2)
        worst = max(worst, float((found[:, start // 64 : start // 64 + exact.shape[1]] - exact).abs().max()))
    return worst


def _sums_error(problem: Problem) -> float:
    """Of the mean embedding of the first 64 queries, relative to it in float64."""
    _, total, log_scale = (value[:64].double() for value in triton.blocks_and_sums(problem))
    embeddings = _decoded(problem)
    scores = problem.queries[:64].double() @ embeddings.T
    exact = scores.softmax(1) @ embeddings
    found = total * (log_scale - scores.logsumexp(1)).exp()[:, None]
    return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max())


def _tile(storage: torch.dtype) -> str:
    module = triton.kernel()
    return str(getattr(module._TUNED[max(2, storage.itemsize)], "best_config", "")) if module is not None else ""


def _rates(device: str) -> dict[str, float]:
    """Bytes and bfloat16 operations a second, of a large copy and a large product."""
    rows = torch.randn(2**28 if device == "cuda" else 2**20, device=device)
    target = torch.empty_like(rows)
    size = 8192 if device == "cuda" else 256
    square = torch.randn(size, size, device=device).to(torch.bfloat16)
    return {
        "bytes_per_second": 8 * rows.numel() / _milliseconds(lambda: target.copy_(rows)) * 1e3,
        "bf16_flops": 2 * size**3 / _milliseconds(lambda: square @ square) * 1e3,
    }


def _milliseconds(call: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream()):
        return float(do_bench_cudagraph(call, rep=40, return_mode="median"))


def _call_milliseconds(call: Callable[[], object]) -> float:
    """Of a call from Python, one after the other."""
    count = 50
    call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / count


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


@contextmanager
def _precision(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def main(arguments: list[str] | None = None) -> int:
    """One line of JSON a row."""
    parser = CommandParser("gpu.kernels", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape, on any device")
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=SHAPES, metavar="BxCxD", help="other sizes")
    parser.add_argument("--kind", type=int, nargs="+", choices=range(len(KINDS)), help="these kinds alone")

    def command(options: Any) -> None:
        shapes = (Shape(4, 128, 16),) if options.dry_run else options.sizes
        kinds = KINDS if options.kind is None else tuple(KINDS[kind] for kind in options.kind)
        for row in measure(shapes, kinds, "cuda" if torch.cuda.is_available() else "cpu"):
            print(json.dumps(row), flush=True)

    return run(command, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
