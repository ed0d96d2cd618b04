"""The command line: ``python -m examples.code_search train`` and ``search``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.command_line import CommandParser, positive, run

OUT = Path("runs/code_search")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    options = _parser().parse_args(arguments)
    return run(_train, options, resumes=True) if options.command == "train" else run(_search, options)


def _parser() -> CommandParser:
    parser = CommandParser(
        "code_search",
        description="Find the Python function that a sentence describes, among all that are installed.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train, with the cache and without")
    train.add_argument("--steps", type=positive, default=2000, help="training steps of each run")
    train.add_argument("--batch-size", type=positive, default=16, help="queries in a step")
    train.add_argument("--cache-size", type=positive, default=8192, help="documents in the cache")
    train.add_argument("--draws-per-query", type=positive, default=4, help="negatives each query draws from the cache")
    train.add_argument("--embedding-dim", type=positive, default=256, help="of queries and documents")
    train.add_argument("--evaluate-every", type=positive, default=400, help="steps between evaluations")
    train.add_argument("--seed", type=int, default=0, help="of encoder, batches and draws")
    train.add_argument("--mask-names", action="store_true", help="hide a function's own name from its document")
    train.add_argument(
        "--root",
        type=Path,
        action="append",
        metavar="DIR",
        help="where to look for Python files, may be repeated (default: the standard library and installed packages)",
    )
    train.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where results and checkpoints go")
    search = commands.add_parser("search", help="search by a sentence")
    search.add_argument("sentence", help="what the function does")
    search.add_argument("--count", type=positive, default=10, help="how many functions to show")
    search.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where `train` put its results")
    return parser


# Imported where they are needed: harvesting processes import this module too, and have no use for torch.


def _train(options: argparse.Namespace) -> None:
    from examples.code_search.harvest import installation_roots
    from examples.code_search.run import Options
    from examples.code_search.train import train
    from examples.code_search.workers import join_workers

    roots = [root.resolve() for root in (options.root or [])] or installation_roots()
    for root in roots:
        if not root.is_dir():
            raise FileNotFoundError(f"--root {root} is no folder")
    run_options = Options(
        embedding_dim=options.embedding_dim,
        batch_size=options.batch_size,
        cache_size=options.cache_size,
        draws_per_query=options.draws_per_query,
        seed=options.seed,
        evaluate_every=options.evaluate_every,
    )
    with join_workers() as workers:
        train(
            roots,
            options.out,
            steps=options.steps,
            mask_names=options.mask_names,
            options=run_options,
            workers=workers,
        )


def _search(options: argparse.Namespace) -> None:
    from examples.code_search.search import search

    for rank, hit in enumerate(search(options.sentence, options.out, count=options.count), start=1):
        print(f"{rank:2}. {hit}")


if __name__ == "__main__":
    sys.exit(main())
