"""Fine-tunes the encoder with the trainer of sentence-transformers and the loss of this library."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from examples.interruptions import InterruptedRunError, interruptions_deferred
from examples.reverse_dictionary.callbacks import OneLineProgress, StopWhenInterrupted
from examples.reverse_dictionary.data import SPLITS, Entry, split_of
from examples.reverse_dictionary.define import write_dictionary
from examples.reverse_dictionary.evaluator import DictionaryEvaluator
from examples.reverse_dictionary.model import load_model
from examples.reverse_dictionary.picture import draw
from examples.whole_files import written_whole
from negcache_fn import StepOptions
from negcache_fn.integrations.sentence_transformers import NegativeCacheCallback, NegativeCacheLoss

__all__ = ["Options", "train"]

_VALIDATION_QUERIES = 1000
_TEST_QUERIES = 3000
_LOGGED_EVERY = 20


@dataclass(frozen=True)
class Options:
    """What a training depends on besides the entries."""

    model: str
    layers: int | None
    steps: int
    batch_size: int
    cache_size: int
    num_draws: int | None
    learning_rate: float
    evaluate_every: int
    bf16: bool
    seed: int


def train(entries: list[Entry], options: Options, out: Path, *, device: str) -> None:
    """Trains, or goes on with what was interrupted, and leaves model, dictionary, picture and summary in ``out``.

    Raises:
        InterruptedRunError: after SIGINT or SIGTERM, when all is saved; the next call goes on.
        ValueError: a model that cannot be cut so, or too few entries for a batch.
    """
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    rows = {name: (split_of(len(entries)) == at).nonzero()[0].tolist() for at, name in enumerate(SPLITS)}
    if len(rows["train"]) < options.batch_size or not rows["test"]:
        raise ValueError(
            f"WordNet has {len(entries)} entries here, {len(rows['train'])} of them to train on; expected at least "
            f"--batch-size, which is {options.batch_size}, and some to hold out"
        )
    torch.manual_seed(options.seed)
    model = load_model(options.model, layers=options.layers, device=device)
    validation = DictionaryEvaluator(entries, rows["validation"][:_VALIDATION_QUERIES], bf16=options.bf16)
    print(f"{len(rows['train']):,} definitions to train on; {len(entries):,} entries are searched", flush=True)

    untrained = _begin(out, asdict(options) | {"entries": len(entries)}, model, validation)
    history = _fit(model, [entries[row] for row in rows["train"]], validation, options, out, device)

    test_queries = DictionaryEvaluator(entries, rows["test"][:_TEST_QUERIES], bf16=options.bf16)
    documents = test_queries.embed_documents(model)
    test = test_queries.measure(model, documents)
    write_dictionary(model, documents, entries, out)
    draw(untrained, history, len(entries), out / "training.png")
    trained = [row["eval_mrr@10"] for row in history if "eval_mrr@10" in row][-1]
    summary = {"options": asdict(options), "untrained_validation": untrained, "test": test}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"validation: MRR@10 {untrained['mrr@10']:.3f} untrained, {trained:.3f} trained")
    print(f"test: MRR@10 {test['mrr@10']:.3f}, Recall@10 {test['recall@10']:.3f}")
    print(f"{out}: model/, dictionary.pt, training.png, summary.json")


def _begin(
    out: Path, identity: dict[str, Any], model: SentenceTransformer, validation: DictionaryEvaluator
) -> dict[str, float]:
    """The measures of the untrained model, new or from the training that goes on; another training's state goes."""
    file = out / "begun.json"
    if file.exists():
        begun = json.loads(file.read_text(encoding="utf-8"))
        if begun["identity"] == identity:
            return dict(begun["untrained"])
        print(f"what is in {out} is of other data or options; starting over")
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    untrained = validation(model)
    with written_whole(file) as unfinished:
        unfinished.write_text(json.dumps({"identity": identity, "untrained": untrained}, indent=2), encoding="utf-8")
    return untrained


def _fit(
    model: SentenceTransformer,
    entries: list[Entry],
    validation: DictionaryEvaluator,
    options: Options,
    out: Path,
    device: str,
) -> list[dict[str, Any]]:
    """Trains the model; returns the trainer's log."""
    loss = NegativeCacheLoss(
        model, options.cache_size, seed=options.seed, options=StepOptions(num_draws=options.num_draws)
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(out / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,
            bf16=options.bf16,
            eval_strategy="steps",
            eval_steps=options.evaluate_every,
            save_steps=options.evaluate_every,
            save_total_limit=1,
            logging_steps=_LOGGED_EVERY,
            report_to=[],
            dataloader_drop_last=True,
            dataloader_pin_memory=device == "cuda",
            use_cpu=device == "cpu",
            seed=options.seed,
        ),
        train_dataset=Dataset.from_dict(
            {
                "definition": [entry.definition for entry in entries],
                "entry": [entry.document for entry in entries],
            }
        ),
        evaluator=validation,
        loss=loss,
    )
    NegativeCacheCallback.attach(trainer)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(OneLineProgress)
    last = get_last_checkpoint(out / "checkpoints") if (out / "checkpoints").exists() else None
    with interruptions_deferred() as interrupted:
        trainer.add_callback(StopWhenInterrupted(interrupted))
        trainer.train(resume_from_checkpoint=last)
    if trainer.state.global_step < options.steps:
        raise InterruptedRunError
    return list(trainer.state.log_history)
