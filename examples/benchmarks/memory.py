"""Peak memory of a call beyond its state and inputs, each method in a process of its own.

On Linux: the kernel's peak of the resident size, reset just before the call (`/proc/self/clear_refs`), less the
resident size then. `ru_maxrss` alone would not do: a process inherits the peak of the one that started it. A first call
at the same size comes before, so that what torch loads or compiles once is no part of it, and every allocation above
64 KiB is given back when freed (`MALLOC_MMAP_THRESHOLD_`), so that nothing kept from it hides the peak of the second.
On CUDA: the peak of the allocator.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import torch

from examples.benchmarks.methods import Call, Method, UnavailableError
from examples.benchmarks.problem import Problem
from examples.benchmarks.registry import METHODS, select
from examples.benchmarks.shapes import Shape, parse_size
from examples.command_line import CommandParser

__all__ = ["forget_peak", "measure", "peak_bytes", "peak_bytes_on_cuda", "status_bytes", "supported"]

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def supported(device: str) -> bool:
    """Whether the peak can be measured here."""
    return torch.device(device).type == "cuda" or (_CLEAR.exists() and _STATUS.exists())


def measure(method: Method, shapes: list[Shape], device: str, reference: Path | None) -> dict[Shape, int]:
    """Peak bytes per shape, from a fresh process; shapes that it did not get to are missing."""
    sizes = ["x".join(map(str, astuple(shape))) for shape in shapes]
    command = [sys.executable, "-m", "examples.benchmarks.memory", method.name, *sizes, "--device", device]
    if reference is not None:
        command += ["--reference", str(reference)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {shape: line["bytes"] for shape, line in zip(shapes, lines, strict=False)}


def peak_bytes(method: Method, shape: Shape, device: str) -> int:
    """Of the second call in this process.

    Raises:
        UnavailableError: the method cannot run here.
    """
    call = method.make(Problem(shape, device))
    call()
    gc.collect()
    if torch.device(device).type == "cuda":
        return peak_bytes_on_cuda(call)
    forget_peak()
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


def peak_bytes_on_cuda(call: Call) -> int:
    """What the call takes at its peak, beyond what there is before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def forget_peak() -> None:
    """Lets VmHWM begin again at what the process has now."""
    _CLEAR.write_text("5")


def status_bytes(key: str) -> int:
    """Of this process, by the kernel's name: VmHWM, VmRSS, RssFile."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main(arguments: list[str] | None = None) -> int:
    """The process: one line of JSON per shape, as soon as it is known."""
    parser = CommandParser("benchmarks.memory", description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("sizes", nargs="+", type=parse_size)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reference", type=Path)
    options = parser.parse_args(arguments)
    select(reference=options.reference, compiled=True)
    method = METHODS[options.method]
    try:
        for shape in options.sizes:
            print(json.dumps({"bytes": peak_bytes(method, shape, options.device)}), flush=True)
    except UnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
