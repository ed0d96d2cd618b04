"""The command line: ``python -m examples.experiments``."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from examples.command_line import CommandParser, positive, run
from examples.experiments.grid import Grid, read_grid
from examples.interruptions import termination_interrupts

OUT = Path("runs/experiments")
GRID = Path(__file__).with_name("grid.toml")


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing, then writes tables and pictures; returns the exit status."""
    options = _parser().parse_args(arguments)
    with termination_interrupts():
        return run(_run, options, resumes=True)


def _parser() -> CommandParser:
    parser = CommandParser(
        "experiments",
        description="What negatives do to retrieval: all methods on the same data. Resumes where it stopped.",
    )
    parser.add_argument("--grid", type=Path, default=GRID, metavar="FILE", help="what to compare")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="comparisons (default: all of the grid)")
    parser.add_argument(
        "--beir", type=Path, metavar="DIR", help="a folder in BEIR's format instead of the grid's tasks"
    )
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where results and tables go")
    parser.add_argument("--page", type=Path, metavar="FILE", help="fill this page, pictures into images/ beside")
    parser.add_argument("--report-only", action="store_true", help="report the results in --out, run nothing")
    return parser


def _only(grid: Grid, names: list[str] | None) -> Grid:
    if names is None:
        return grid
    known = [comparison.name for comparison in grid.comparisons]
    if unknown := set(names) - set(known):
        raise ValueError(f"--only names {sorted(unknown)}; expected some of {known}")
    return replace(grid, comparisons=tuple(c for c in grid.comparisons if c.name in names))


# Imported where they are needed: the processes that run trials import this module too.


def _run(options: argparse.Namespace) -> None:
    from examples.experiments.page import write_report
    from examples.experiments.runner import read_results, run_grid

    grid = _only(read_grid(options.grid, beir=options.beir), options.only)
    options.out.mkdir(parents=True, exist_ok=True)
    found = read_results(options.out) if options.report_only else run_grid(grid, options.out, jobs=options.jobs)
    print(write_report(grid, found, options.out, options.page))


if __name__ == "__main__":
    sys.exit(main())
