"""Times and memory of whole steps on a GPU, beside its peers: ``python -m examples.gpu.steps``.

The methods of `examples.benchmarks`, and steps captured as a CUDA graph, which replays without Python. One process, all
methods by turns.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.memory import peak_bytes_on_cuda
from examples.benchmarks.methods import BASELINE, OURS, Call, Method, UnavailableError
from examples.benchmarks.problem import Problem
from examples.benchmarks.registry import select
from examples.benchmarks.shapes import SIZES, Shape, parse_size
from examples.benchmarks.timing import Rounds, interleave, summarize
from examples.command_line import CommandParser, run

__all__ = ["captured", "main", "methods"]

SHAPES = (*SIZES, Shape(1024, 2**17, 768))
_EAGER = ("ours-eager", "ours-bf16-eager", "batch-eager", "batch-bf16-eager")
_COMPILED = ("ours", "ours-bf16", "batch", "batch-bf16")


def captured(make: Callable[[Problem], Call]) -> Callable[[Problem], Call]:
    """The same call, captured as a CUDA graph."""

    def make_graph(problem: Problem) -> Call:
        call = make(problem)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    return make_graph


def methods(reference: Path | None, *, compiled: bool) -> list[Method]:
    """Those of the CPU's table that make sense here, and their graphs; or what is compiled, and the bare product."""
    known = {method.name: method for method in select(reference=reference, compiled=compiled)}
    ours = _COMPILED if compiled else _EAGER
    others = [method for method in known.values() if method not in OURS]
    kept = [known[BASELINE]] if compiled else others
    kept += [known[name] for name in ours]
    return kept + [_as_graph(known[name]) for name in ours]


def _as_graph(method: Method) -> Method:
    label = method.label.replace("eager", "CUDA graph").replace("compiled", "compiled, CUDA graph")
    return Method(f"{method.name}-graph", label, captured(method.make))


def measure(shape: Shape, kept: list[Method], device: str, rounds: Rounds) -> list[dict[str, Any]]:
    """A row a method: seconds, their ratios, peak bytes beyond what there is before the call, or why there are none."""
    problem, calls, rows = Problem(shape, device), {}, []
    for method in kept:
        row = {"shape": asdict(shape), "method": method.name, "label": method.label}
        start = time.perf_counter()
        call, reason = _first_call(method, problem)
        if call is None:
            row["skipped"] = reason
        else:
            calls[method.name] = call
            row |= {
                "first_call_seconds": time.perf_counter() - start,
                "peak_bytes": peak_bytes_on_cuda(call) if device == "cuda" else 0,
            }
        rows.append(row)
        print(f"{shape}: {method.name}: {reason or 'ready'}", file=sys.stderr)
    figures = summarize(interleave(calls, rounds, lambda name: None))
    return [row | figures.get(row["method"], {}) for row in rows]


def _first_call(method: Method, problem: Problem) -> tuple[Call | None, str]:
    """The call, made once; or None, and why."""
    shape = problem.shape
    free = torch.cuda.mem_get_info()[0] if problem.device.type == "cuda" else 2**40
    if method.bytes_needed(shape) > 0.4 * free:
        return None, f"needs {method.bytes_needed(shape) / 2**30:.0f} GiB"
    if method.name == "port" and shape.scores > 2**26:
        return None, "over a second"
    try:
        call = method.make(problem)
        call()
    except UnavailableError as error:
        return None, str(error)
    except Exception as error:  # a peer that fails must not take the others with it
        traceback.print_exc()
        return None, f"{type(error).__name__}: {str(error)[:300]}"
    return call, ""


def main(arguments: list[str] | None = None) -> int:
    """One line of JSON a row."""
    parser = CommandParser("gpu.steps", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape, on any device")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the port as published")
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=SHAPES, metavar="BxCxD", help="other sizes")
    parser.add_argument("--compiled", action="store_true", help="what torch.compile compiles, and the bare product")

    def command(options: Any) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kept = methods(options.reference, compiled=options.compiled)
        rounds = Rounds(0.1, 3, 3) if options.dry_run else Rounds(2.0, 15, 60)
        for shape in (Shape(8, 1024, 16),) if options.dry_run else options.sizes:
            for row in measure(shape, kept, device, rounds):
                print(json.dumps(row), flush=True)

    return run(command, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
