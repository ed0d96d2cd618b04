"""Where the time of a step goes on a GPU, kernel by kernel: ``python -m examples.gpu.profile``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from examples.benchmarks.problem import Problem
from examples.benchmarks.registry import METHODS
from examples.benchmarks.shapes import SIZES, Shape
from examples.command_line import CommandParser, run

__all__ = ["kernels_of", "main"]

_STEPS = 5
_SHOWN = 40


def kernels_of(name: str, shape: Shape, device: str) -> dict[str, Any]:
    """Kernels and microseconds of one step of a method, and the longest of them."""
    call = METHODS[name].make(Problem(shape, device))
    for _ in range(3):
        call()
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        for _ in range(_STEPS):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in recorded.events() or ():
        times[event.name] += event.device_time if on_gpu else event.cpu_time
        counts[event.name] += 1
    longest = [[key[:90], counts[key] / _STEPS, round(time / _STEPS, 1)] for key, time in times.most_common(_SHOWN)]
    return {
        "part": "profile",
        "method": name,
        "shape": str(shape),
        "kernels": counts.total() / _STEPS,
        "microseconds": times.total() / _STEPS,
        "longest": longest,
    }


def main(arguments: list[str] | None = None) -> int:
    """One line of JSON a method."""
    parser = CommandParser("gpu.profile", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape, on any device")

    def command(options: Any) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for name in ("ours-eager", "batch-eager"):
            for shape in (Shape(8, 1024, 16),) if options.dry_run else (SIZES[0],):
                print(json.dumps(kernels_of(name, shape, device)), flush=True)

    return run(command, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
