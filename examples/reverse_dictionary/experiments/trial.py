"""One training with one loss, and what a step of it costs."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from examples.reverse_dictionary.data import SPLITS, Pair, split_of
from examples.reverse_dictionary.evaluator import DictionaryEvaluator
from examples.reverse_dictionary.experiments.methods import Method, loss_of
from examples.reverse_dictionary.experiments.mining import Mined, in_order
from examples.reverse_dictionary.experiments.tasks import Task
from examples.reverse_dictionary.model import load_model

__all__ = ["Setting", "Trial", "run_trial", "seconds_per_step"]

_VALIDATION_QUERIES = 3000
_TEST_QUERIES = 3000
_STEPS_TO_START = 4
_STEPS_TIMED = 12


@dataclass(frozen=True)
class Setting:
    """What all trials share."""

    task: Task
    model: str
    layers: int | None
    bf16: bool
    device: str


@dataclass(frozen=True)
class Trial:
    """A training of so many steps, which take ``seconds`` at the measured cost of a step."""

    method: Method
    rate: float
    seconds: float
    steps: int
    seed: int
    split: str
    """Whose queries are asked at the end: "validation" or "test"."""


def run_trial(trial: Trial, setting: Setting) -> dict[str, Any]:
    """MRR@10 and Recall@10 over all documents after the last step, what the training took, and its last loss.

    With a cache, also the drift of the drawn documents, the mean of the second half of the steps.
    """
    trainer, clock = _trainer(trial.method, setting, trial.steps, trial.rate, trial.seed)
    drift = _Drift(trainer.loss)
    trainer.add_callback(drift)
    trainer.train()
    model = trainer.model
    assert isinstance(model, SentenceTransformer)
    at_most = _TEST_QUERIES if trial.split == "test" else _VALIDATION_QUERIES
    pairs = setting.task.pairs
    evaluator = DictionaryEvaluator(pairs, _rows(len(pairs), trial.split)[:at_most], bf16=setting.bf16)
    return {
        **evaluator.measure(model, evaluator.embed_documents(model)),
        "seconds": clock.ends[-1] - clock.ends[0],
        "loss": [row["loss"] for row in trainer.state.log_history if "loss" in row][-1],
        **drift.of_second_half(),
    }


def seconds_per_step(method: Method, setting: Setting) -> float:
    """The seconds of a step, with its share of reading and tokenising data."""
    if method.warm_up is not None:
        phases = replace(method, loss="mnrl", warm_up=None), replace(method, warm_up=None)
        return sum(
            share * seconds_per_step(phase, setting)
            for share, phase in zip((method.warm_up, 1 - method.warm_up), phases, strict=True)
        )
    trainer, clock = _trainer(method, setting, _STEPS_TO_START + _STEPS_TIMED, 1e-5, 0)
    trainer.remove_callback(Mined)  # its negatives are then some document
    trainer.train()
    return (clock.ends[-1] - clock.ends[_STEPS_TO_START - 1]) / _STEPS_TIMED


class _Clock(TrainerCallback):
    """The time at the end of each step: of the process where it computes on the CPU itself, else of the wall."""

    def __init__(self, device: str) -> None:
        self.now = time.process_time if device == "cpu" else time.perf_counter
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes the time, once a GPU has done what it was given, where that time is read."""
        if torch.cuda.is_available() and state.global_step in (1, _STEPS_TO_START, state.max_steps):
            torch.cuda.synchronize()
        self.ends.append(self.now())


class _Drift(TrainerCallback):
    """The drift of the drawn documents in each step, where the loss has draws."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.found: list[float] = []

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes it."""
        metrics = getattr(self.loss, "metrics", {})
        if "drift" in metrics:
            self.found.append(float(metrics["drift"]))

    def of_second_half(self) -> dict[str, float]:
        """Its mean, if there are any."""
        return {"drift": mean(self.found[len(self.found) // 2 :])} if self.found else {}


class _Prefilled(TrainerCallback):
    """Fills the cache before the first step, which is not counted."""

    def __init__(self, loss: Any, trained: Sequence[Pair], count: int, seed: int) -> None:
        self.loss = loss
        rows = np.random.default_rng(seed).permutation(len(trained))[:count]
        self.documents = [trained[row].document for row in rows]

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Fills it."""
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            self.loss.prefill(self.documents, batch_size=256)


def _trainer(
    method: Method, setting: Setting, steps: int, rate: float, seed: int
) -> tuple[SentenceTransformerTrainer, _Clock]:
    torch.manual_seed(seed)
    model = load_model(
        setting.model,
        layers=setting.layers,
        device=setting.device,
        longest_text=setting.task.longest_text,
        dropout=method.dropout or 0.0,
    )
    guide = copy.deepcopy(model) if method.loss == "gist" else model
    pairs = setting.task.pairs
    trained = [pairs[row] for row in _rows(len(pairs), "train")]
    mined = Mined(model, trained, method.batch_size, steps, seed) if method.loss == "mined_mnrl" else None
    with TemporaryDirectory() as folder:  # nothing is saved
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=str(Path(folder) / "none"),
                max_steps=steps,
                per_device_train_batch_size=method.batch_size,
                learning_rate=rate,
                warmup_steps=0.1,
                bf16=setting.bf16,
                save_strategy="no",
                logging_steps=max(steps // 20, 1),
                report_to=[],
                dataloader_drop_last=True,
                disable_tqdm=True,
                use_cpu=setting.device == "cpu",
                seed=seed,
                **({} if mined is None else {"batch_sampler": in_order, "remove_unused_columns": False}),
            ),
            train_dataset=_pairs(trained) if mined is None else mined.dataset,
            loss=loss_of(method, model, guide, steps=steps, seed=seed),
        )
    if method.prefilled:
        trainer.add_callback(_Prefilled(trainer.loss, trained, method.prefilled, seed))
    clock = _Clock(setting.device)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(clock)
    if mined is not None:
        trainer.add_callback(mined)
    return trainer, clock


def _pairs(pairs: Sequence[Pair]) -> Dataset:
    return Dataset.from_dict(
        {"definition": [pair.definition for pair in pairs], "document": [pair.document for pair in pairs]}
    )


def _rows(count: int, split: str) -> list[int]:
    return (split_of(count) == SPLITS.index(split)).nonzero()[0].tolist()
