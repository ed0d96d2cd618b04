"""The command line: ``python -m examples.msmarco sample``, ``train`` and ``evaluate``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from examples.command_line import CommandParser, natural, positive, run
from examples.msmarco.options import ESTIMATORS, FORMATS, POOLING, PRECISIONS, STORAGE, TOWERS, Options, Shape, Widths

OUT = Path("runs/msmarco")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    options = _parser().parse_args(arguments)
    return run(_run, options, resumes=options.command == "train")


def _run(options: argparse.Namespace) -> None:
    command = {"sample": _sample, "train": _train, "evaluate": _evaluate}[options.command]
    try:
        command(options)
    except ModuleNotFoundError as error:
        if error.name not in {"transformers", "tokenizers", "tqdm"}:
            raise
        raise ValueError(f"there is no {error.name}; pip install transformers tqdm") from error


def _parser() -> CommandParser:
    parser = CommandParser(
        "msmarco",
        description="MS MARCO passage ranking, or any collection in its format or BEIR's, with a negative cache.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = Options()

    sample = commands.add_parser("sample", help="make a small collection to try it on")
    sample.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the collection goes")
    sample.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="of the files")

    train = commands.add_parser("train", help="train, or go on")
    _add_common(train)
    model = train.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model", type=Path, metavar="DIR", help="transformer and tokenizer, as `save_pretrained` writes"
    )
    model.add_argument("--tiny", action="store_true", help="a small one with random weights, to try it out")
    train.add_argument("--towers", choices=TOWERS, default=Shape().towers, help="one transformer or two")
    train.add_argument("--pooling", choices=POOLING, default=Shape().pooling, help="of a text's tokens")
    train.add_argument("--scale", type=float, default=Shape().scale, help="of the cosines, at first; it is learnt")
    train.add_argument("--query-tokens", type=positive, default=Widths().query_tokens, help="queries are cut at")
    train.add_argument("--passage-tokens", type=positive, default=Widths().passage_tokens, help="passages are cut at")
    train.add_argument("--steps", type=positive, default=defaults.steps, help="training steps")
    train.add_argument("--batch-size", type=positive, default=defaults.batch_size, help="queries in a step")
    train.add_argument("--cache-size", type=positive, default=defaults.cache_size, help="passages in the cache")
    train.add_argument(
        "--prefill", type=natural, help="random passages cached before the first step (default: as many as fit)"
    )
    train.add_argument(
        "--random-passages",
        type=natural,
        default=defaults.random_passages,
        help="that come into the cache in each step",
    )
    train.add_argument(
        "--draws-per-query",
        type=positive,
        default=defaults.draws_per_query,
        help="negatives each query draws from the cache",
    )
    train.add_argument(
        "--estimator",
        choices=ESTIMATORS,
        default=defaults.estimator,
        help='"paper": own draws, no correction of staleness, no classes in the batch',
    )
    train.add_argument("--triples", type=Path, metavar="FILE", help="qidpidtriples, for mined negatives in the batch")
    train.add_argument("--rate", type=float, default=defaults.rate, help="learning rate of the transformers")
    train.add_argument(
        "--scale-rate", type=float, default=defaults.scale_rate, help="that of the logarithm of the scale"
    )
    train.add_argument(
        "--warm-up", type=natural, default=defaults.warm_up, help="steps of it; then the rates fall to 0 on a line"
    )
    train.add_argument("--storage", choices=STORAGE, default=defaults.storage, help="where the cache has its passages")
    train.add_argument("--chunk-size", type=positive, help="passages encoded at a time (default: all of a step)")
    train.add_argument(
        "--evaluate-every", type=positive, default=defaults.evaluate_every, help="steps between checkpoints"
    )
    train.add_argument("--log-every", type=positive, default=defaults.log_every, help="steps between rows of the log")
    train.add_argument(
        "--validation-queries", type=positive, default=defaults.validation_queries, help="asked at each checkpoint"
    )
    train.add_argument(
        "--validation-passages", type=positive, default=defaults.validation_passages, help="searched then, a sample"
    )
    train.add_argument("--validation-split", metavar="NAME", help="(default: dev.small, dev or test)")
    train.add_argument("--seed", type=natural, default=defaults.seed, help="of batches, draws and dropout")

    evaluate = commands.add_parser("evaluate", help="search all passages")
    _add_common(evaluate)
    evaluate.add_argument("--split", nargs="+", metavar="NAME", help="(default: dev.small, dev or test)")
    evaluate.add_argument("--depth", type=positive, default=1000, help="passages to find for each query")
    evaluate.add_argument("--relevant-from", type=positive, default=1, help="grade, for MRR and recall; 2 for TREC's")
    return parser


def _add_common(command: CommandParser) -> None:
    command.add_argument("--data", type=Path, required=True, metavar="DIR", help="the collection")
    command.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="of the run")
    command.add_argument("--tokens", type=Path, metavar="DIR", help="of the tokenised texts (default: DATA/tokens)")
    command.add_argument("--device", help="(default: cuda where there is one, else cpu)")
    command.add_argument("--precision", choices=PRECISIONS, help="(default: bfloat16 on cuda, float32 on the CPU)")


# What takes long to import comes where it is needed, so that `--help` is at once there.


def _sample(options: argparse.Namespace) -> None:
    from examples.msmarco.sample import make_sample

    count = make_sample(options.out, kind=options.format)
    print(f"{options.out}: {count:,} passages, and as many queries")


def _train(options: argparse.Namespace) -> None:
    from examples.msmarco.commands import train_run
    from examples.msmarco.formats import Collection

    collection = Collection.open(options.data)
    device, precision = _device_and_precision(options)
    given = {field.name: getattr(options, field.name) for field in fields(Options) if hasattr(options, field.name)}
    given["precision"] = precision
    given["validation_split"] = options.validation_split or collection.held_out
    given["triples"] = None if options.triples is None else str(options.triples)
    train_run(
        collection,
        options.model,
        options.out,
        shape=Shape(options.towers, options.pooling, options.scale),
        widths=Widths(options.query_tokens, options.passage_tokens),
        options=Options(**given),
        store=options.tokens or options.data / "tokens",
        device=device,
    )


def _evaluate(options: argparse.Namespace) -> None:
    from examples.msmarco.commands import evaluate_run
    from examples.msmarco.formats import Collection

    collection = Collection.open(options.data)
    device, precision = _device_and_precision(options)
    evaluate_run(
        collection,
        options.out,
        options.split or [collection.held_out],
        depth=options.depth,
        least=options.relevant_from,
        precision=precision,
        store=options.tokens or options.data / "tokens",
        device=device,
    )


def _device_and_precision(options: argparse.Namespace):
    import torch

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, options.precision or ("bfloat16" if device.type == "cuda" else "float32")


if __name__ == "__main__":
    sys.exit(main())
