"""The command line: ``python -m examples.benchmarks``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.experiments import Experiments, Row, reset_compiler
from examples.benchmarks.hardware import describe
from examples.benchmarks.shapes import QUICK_SIZES, SIZES, UPDATES, parse_size, sweeps
from examples.benchmarks.timing import Rounds
from examples.command_line import CommandParser, positive, run

OUT = Path("runs/benchmarks")
EXPERIMENTS = ("sizes", "sweeps", "updates", "memory")


def main(arguments: list[str] | None = None) -> int:
    """Measures, then writes results.json, table.md and the plots; returns the exit status."""
    return run(_run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    file = options.out / "results.json"
    if not options.report_only:
        options.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_measure(options), indent=1), encoding="utf-8")
    _report(json.loads(file.read_text(encoding="utf-8")), options)


def _parser() -> CommandParser:
    parser = CommandParser(
        "benchmarks",
        description="What one step of the cache costs, side by side with the alternatives.",
    )
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the port as published; without it no such rows")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: two minutes")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, help="which experiments")
    parser.add_argument("--sizes", nargs="+", type=parse_size, metavar="BxCxD", help="those of the main table")
    parser.add_argument("--eager", action="store_true", help="leave out what torch.compile has to compile")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where results, table and plots go")
    parser.add_argument("--page", type=Path, metavar="FILE", help="fill this page, plots into images/ beside")
    parser.add_argument("--report-only", action="store_true", help="report the results in --out, measure nothing")
    return parser


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    rounds = Rounds(seconds=2.0, least=3, most=10) if options.quick else Rounds(seconds=20.0)
    sweep_rounds = Rounds(seconds=1.0, least=3, most=7) if options.quick else Rounds(seconds=8.0, least=3, most=9)
    experiments = Experiments(options.device, options.reference, not options.eager, rounds)
    swept = Experiments(options.device, options.reference, not options.eager, sweep_rounds)
    shapes = sweeps(quick=options.quick)
    rows: list[Row] = []
    hardware = describe(options.device)
    if "sizes" in options.only:
        rows += experiments.sizes(options.sizes or (QUICK_SIZES if options.quick else SIZES))
    if "sweeps" in options.only:
        for name, of_sweep in shapes.items():
            rows += swept.sweep(name, of_sweep)
    if "updates" in options.only:
        reset_compiler()
        rows += swept.updates(QUICK_SIZES[0] if options.quick else UPDATES)
    if "memory" in options.only:
        # Every process would compile for itself: too slow for a first look.
        of_memory = replace(swept, compiled=swept.compiled and not options.quick)
        rows += of_memory.memory(shapes["capacity"][::2])
    return {
        "hardware": hardware,
        "quick": options.quick,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }


def _report(results: dict[str, Any], options: argparse.Namespace) -> None:
    from examples.benchmarks.plots import draw, markdown
    from examples.benchmarks.report import fill_page, sections

    made = sections(results)
    table = "\n\n".join(made.values())
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    draw(results["rows"], options.out)
    if options.page is not None:
        draw(results["rows"], options.page.parent / "images")
        fill_page(options.page, made | markdown(results["rows"]))
    print(table)


if __name__ == "__main__":
    sys.exit(main())
