"""The command line: ``python -m examples.lightning``."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from examples.command_line import CommandParser, positive, run
from examples.lightning.data import CodeSearchData, loader, standard_library
from examples.lightning.module import CodeSearch
from examples.threads import one_thread
from negcache_fn.integrations.lightning import NegativeCacheCallback

OUT = Path("runs/lightning")


def main(arguments: list[str] | None = None) -> int:
    """Trains, or goes on where it stopped, and prints what came of it; the exit status."""
    return run(_run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    roots = [options.root.resolve()] if options.root else standard_library()
    dataset = CodeSearchData(roots, options.out / "corpus.npz", batch_size=options.batch_size)
    tests = len(dataset.data.corpus.queries_of("test"))
    if len(dataset.data.train_queries) < options.batch_size or tests == 0:
        raise ValueError("too few functions with a docstring, give more code: --root DIR")
    with one_thread(), warnings.catch_warnings():
        _ignore_what_is_meant()
        seed_everything(0, verbose=False)
        model = CodeSearch(dataset, cache_size=options.cache_size)
        untrained = model.evaluate("test")
        trainer = _fit(model, options)
        trained = model.evaluate("test")
    print(f"{tests:,} queries of test modules, {len(dataset.data.corpus.names):,} functions searched")
    for label, metrics in (("untrained", untrained), (f"after {trainer.global_step} steps", trained)):
        print(f"{label:>18}   MRR@10 {metrics['mrr@10']:.3f}   Recall@10 {metrics['recall@10']:.3f}")


def _fit(model: CodeSearch, options: argparse.Namespace) -> Trainer:
    last = options.out / "last.ckpt"
    logger: Logger = (TensorBoardLogger if options.tensorboard else CSVLogger)(options.out, name="logs")
    saving = ModelCheckpoint(options.out, filename="last", enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        logger=logger,
        log_every_n_steps=20,
        callbacks=[NegativeCacheCallback(), saving],
        enable_model_summary=False,
    )
    batches = loader(model.dataset, steps_per_epoch=options.steps_per_epoch)
    trainer.fit(model, batches, ckpt_path=last if last.exists() else None, weights_only=True)
    return trainer


def _ignore_what_is_meant() -> None:
    for message in (
        "The 'train_dataloader' does not have many workers",  # a batch takes no time to make
        "Checkpoint directory .* exists and is not empty",  # the run that stopped left it
        "Sparse invariant checks are implicitly disabled",  # as Adagrad likes it
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 asks it of the trees of torch 2.13
    ):
        warnings.filterwarnings("ignore", message)


def _parser() -> CommandParser:
    parser = CommandParser(
        "lightning",
        description="Train a dual encoder that finds the function a sentence describes, with Lightning.",
    )
    parser.add_argument("--epochs", type=positive, default=6)
    parser.add_argument("--steps-per-epoch", type=positive, default=100)
    parser.add_argument("--batch-size", type=positive, default=16, help="queries in a step")
    parser.add_argument("--cache-size", type=positive, default=4096, help="functions in the cache")
    parser.add_argument("--root", type=Path, metavar="DIR", help="Python files to learn from (the standard library)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where checkpoints and logs go")
    parser.add_argument("--tensorboard", action="store_true", help="log for TensorBoard instead of into a CSV file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
