"""Everything that wants a GPU, within a few minutes: ``python -m examples.gpu``, or ``make gpu``.

First, side by side, what is limited by the compiler: the tests on the device, and the kernels that the measurements
need. Then, one after the other, the measurements. Each part is a process with a limit of its own, its output is a file
in ``--out``, and what was done when time ran out is kept. The last lines say how each part ended.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.command_line import CommandParser, positive, run
from examples.gpu.kernels import KINDS

__all__ = ["main"]

OUT = Path("runs/gpu")
_TESTS = ("tests/cuda", "tests/kernels/triton_cases.py")
_PARTS = ("tests", "kernels", "steps", "profile", "compiled")


@dataclass(frozen=True)
class Part:
    """A process: its name, its arguments after ``python -m``, and the seconds it may take."""

    name: str
    command: tuple[str, ...]
    seconds: int


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 if every part ended well."""
    parser = CommandParser("gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where the output of every part goes")
    parser.add_argument("--seconds", type=positive, default=400, help="after which no part runs any longer")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the port as published")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on any device: whether it would run")
    parser.add_argument("--only", nargs="+", choices=_PARTS, help="these parts alone")
    return run(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    beside, after = _parts(options)
    ended = _together(beside, options.out, end)
    for part in after:
        ended |= _together([part], options.out, end)
    for name, how in ended.items():
        print(f"{name}: {how}")
    if failed := [name for name, how in ended.items() if not how.startswith("done")]:
        raise ValueError(f"not done: {', '.join(failed)}; see {options.out}")


def _parts(options: argparse.Namespace) -> tuple[list[Part], list[Part]]:
    """Those that run side by side, and those that have the device for themselves."""
    wanted = options.only or _PARTS
    dry = ("--dry-run",) if options.dry_run else ()
    reference = () if options.reference is None else ("--reference", str(options.reference))
    beside, after = [], []
    if "tests" in wanted:
        several = () if options.dry_run else ("-n", "8")
        tests = ("pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "--durations=8", *several, *_TESTS)
        beside.append(Part("tests", tests[:-1] if options.dry_run else tests, 300))
    if "kernels" in wanted:
        if not options.dry_run:
            kinds = range(len(KINDS))
            beside += [Part(f"build_{kind}", ("examples.gpu.kernels", "--kind", str(kind)), 200) for kind in kinds]
        after.append(Part("kernels", ("examples.gpu.kernels", *dry), 150))
    if "steps" in wanted:
        after.append(Part("steps", ("examples.gpu.steps", *reference, *dry), 100))
    if "profile" in wanted:
        after.append(Part("profile", ("examples.gpu.profile", *dry), 60))
    if "compiled" in wanted and not options.dry_run:
        after.append(Part("compiled", ("examples.gpu.steps", "--compiled"), 200))
    return beside, after


def _together(parts: list[Part], out: Path, end: float) -> dict[str, str]:
    """Runs them side by side; by name, how they ended."""
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "device", "PYTHONUNBUFFERED": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    running = []
    for part in parts:
        file = (out / f"{part.name}.log").open("w", encoding="utf-8")
        command = [sys.executable, "-m", *part.command]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        running.append((part, process, file, time.monotonic()))
    ended = {}
    for part, process, file, start in running:
        try:
            status = process.wait(timeout=max(1.0, min(start + part.seconds, end) - time.monotonic()))
            how = "done" if status == 0 else f"status {status}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            how = "out of time"
        file.close()
        ended[part.name] = f"{how} after {time.monotonic() - start:.0f} s"
    return ended


if __name__ == "__main__":
    sys.exit(main())
