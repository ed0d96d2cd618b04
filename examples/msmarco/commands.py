"""The two commands: train a dual encoder, and evaluate it on all of a collection."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from examples.msmarco.data import Data
from examples.msmarco.evaluate import asked, evaluate, write_run
from examples.msmarco.formats import Collection, read_texts
from examples.msmarco.model import DualEncoder, export, load_tokenizer, load_transformer
from examples.msmarco.options import Options, Shape, Widths
from examples.msmarco.run import CHECKPOINT_FILE, Run
from examples.msmarco.tiny import make_tiny_model

__all__ = ["evaluate_run", "train_run"]

_MODEL = "model"


def train_run(
    collection: Collection,
    model_folder: Path | None,
    out: Path,
    *,
    shape: Shape,
    widths: Widths,
    options: Options,
    store: Path,
    device: torch.device,
) -> None:
    """Trains, or goes on; leaves checkpoint, log and encoders in ``out``. Without a model it makes a tiny one.

    Raises:
        InterruptedRunError: when stopped in training; the next call goes on.
        ValueError: data or a checkpoint that do not fit.
    """
    if model_folder is None:
        model_folder = out / "tiny"
        files = (collection.queries("train"), collection.passages)
        make_tiny_model(model_folder, (text for file in files for _, text in read_texts(file)), seed=options.seed)
    tokenizer, transformer = load_tokenizer(model_folder), load_transformer(model_folder)
    most = getattr(transformer.config, "max_position_embeddings", None)
    if most is not None and max(widths.query_tokens, widths.passage_tokens) > most:
        raise ValueError(
            f"--query-tokens and --passage-tokens are {widths.query_tokens} and {widths.passage_tokens}; "
            f"expected at most {most}, what the model in {model_folder} takes"
        )
    data = _data(collection, model_folder, widths, store)
    model = DualEncoder(transformer, shape, data.padding)
    print(f"{len(data.passages):,} passages, of which the cache holds {options.cache_size:,}; {device}")
    run = Run(options, data, model, out, device)
    run.resume()  # an error before anything of another run is replaced
    tokenizer.save_pretrained(out / _MODEL)
    transformer.config.save_pretrained(out / _MODEL)
    run.train()
    export(model, tokenizer, out)
    print(f"{out}: {CHECKPOINT_FILE}, metrics.jsonl, and the encoders as `from_pretrained` reads them")


def evaluate_run(
    collection: Collection,
    out: Path,
    splits: list[str],
    *,
    depth: int,
    least: int,
    precision: str,
    store: Path,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Metrics of each split over all passages; also in ``out``, with run files for other programs.

    Raises:
        FileNotFoundError: when nothing has been trained in ``out``.
    """
    file = out / CHECKPOINT_FILE
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; train first, with the same --out")
    saved = torch.load(file, weights_only=True, mmap=True, map_location="cpu")  # the cache is not read
    identity = saved["identity"]
    data = _data(collection, out / _MODEL, Widths(*(identity[name] for name in Widths._fields)), store)
    shape = Shape(*(identity[name] for name in Shape._fields))
    model = DualEncoder(load_transformer(out / _MODEL, weights=False), shape, data.padding)
    model.load_state_dict(saved["model"])
    questions = [asked(data, split, least=least) for split in splits]
    found = evaluate(model.to(device), data, questions, depth=depth, dtype=getattr(torch, precision), progress=True)
    results: dict[str, dict[str, float]] = {}
    for split, some, one in zip(splits, questions, found, strict=True):
        write_run(out / f"run.{split}.trec", some, one, data.passages)
        results[split] = {"step": saved["step"], "queries": len(some.rows), **one.metrics}
        print("  ".join([f"{split}:", *(f"{name} {value:.4f}" for name, value in one.metrics.items())]))
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _data(collection: Collection, model_folder: Path, widths: Widths, store: Path) -> Data:
    return Data(
        collection,
        load_tokenizer(model_folder),
        query_tokens=widths.query_tokens,
        passage_tokens=widths.passage_tokens,
        store=store,
    )
