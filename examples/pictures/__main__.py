"""The command line: ``python -m examples.pictures``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from examples.command_line import CommandParser, run
from examples.pictures import charts
from examples.pictures.drawing import Theme, save
from examples.pictures.flow import diagram, sizes_of_a_step
from examples.pictures.measures import correction_by_age, drift_by_age, gradients_by_draws, lives, softmax_mass
from examples.pictures.training import train
from examples.threads import one_thread

OUT = Path("docs/images")


def main(arguments: list[str] | None = None) -> int:
    """Draws the pictures that were asked for; returns the exit status."""
    return run(_run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    with one_thread():  # the matrices are small: threads would wait for each other
        for name in options.only:
            for file in save(f"concept_{name}", PICTURES[name](), options.out):
                print(file)


def _flow() -> Callable[[Theme], Figure]:
    sizes = sizes_of_a_step()
    return lambda theme: diagram(theme, sizes)


def _mass() -> Callable[[Theme], Figure]:
    found = softmax_mass(train(400, capacity=1024))
    return lambda theme: charts.mass(theme, found)


def _gradients() -> Callable[[Theme], Figure]:
    found = gradients_by_draws(train(400, capacity=1024), [1, 2, 4, 8, 16])
    return lambda theme: charts.gradients(theme, found)


def _life() -> Callable[[Theme], Figure]:
    found = {evict: lives(evict) for evict in ("fifo", "lru")}
    return lambda theme: charts.life(theme, found)


def _drift() -> Callable[[Theme], Figure]:
    found = drift_by_age([100, 400])
    return lambda theme: charts.drift(theme, found)


def _correction() -> Callable[[Theme], Figure]:
    found = correction_by_age(160, [0, 8, 16, 32, 64, 128])
    return lambda theme: charts.correction(theme, found)


PICTURES = {
    "flow": _flow,
    "mass": _mass,
    "gradients": _gradients,
    "life": _life,
    "drift": _drift,
    "correction": _correction,
}


def _parser() -> CommandParser:
    parser = CommandParser("pictures", description="Draws the pictures of the documentation from runs of the library.")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where they go")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES), help="which of them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
