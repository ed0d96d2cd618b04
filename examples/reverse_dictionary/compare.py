"""The comparison: each method trains the same encoder for the same wall time, and is asked over the whole corpus."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.code_search.evaluate import summarize
from examples.reverse_dictionary.corpus import Corpus
from examples.reverse_dictionary.encoder import Encoder
from examples.reverse_dictionary.methods import Method
from examples.reverse_dictionary.training import Training
from examples.whole_files import written_whole

__all__ = ["Options", "batches", "compare", "evaluate", "train"]

_ASKED = 3000
_WARM_UP = 0.05
_STEPS_AHEAD = 8
_LAST_STEPS = 50
_ROWS_AT_ONCE = 4096
_QUERIES_AT_ONCE = 500


@dataclass(frozen=True)
class Options:
    """The budgets."""

    seconds_per_run: float
    tune_seconds: float
    total_seconds: float
    seeds: int
    learning_rates: tuple[float, ...]


def compare(encoder: Encoder, corpus: Corpus, methods: Sequence[Method], options: Options, out: Path) -> dict[str, Any]:
    """Tunes the learning rate of each method on validation queries, then trains it with each seed.

    The result is written after every run. A run that would go over the total time is not begun.
    """
    started = time.perf_counter()
    found: dict[str, Any] = {
        "device": _device_name(corpus.documents.device),
        "torch": torch.__version__,
        "options": asdict(options),
        "documents": len(corpus.documents),
        "training_pairs": len(corpus.rows_of("train")),
        "untrained": {split: evaluate(encoder, corpus, split) for split in ("validation", "test")},
        "tuning": [],
        "runs": [],
    }
    trainings = {method.name: Training(method, encoder, corpus) for method in methods}
    found["start_seconds"] = time.perf_counter() - started

    for tuning, method, seed in _plan(methods, options):
        seconds = options.tune_seconds if tuning else options.seconds_per_run
        rates = options.learning_rates if tuning else (_best_rate(found["tuning"], method, options),)
        for rate in rates:
            began = time.perf_counter()
            if began - started + seconds > options.total_seconds:
                found["stopped"] = "total_seconds"
                _write(found, out)
                return found
            measured = train(trainings[method.name], corpus, seconds, rate, seed)
            split = "validation" if tuning else "test"
            measured[split] = evaluate(encoder, corpus, split)
            measured["with_evaluation_seconds"] = time.perf_counter() - began
            found["tuning" if tuning else "runs"].append(measured)
            _write(found, out)
            print(json.dumps(measured), flush=True)
    return found


def train(trained: Training, corpus: Corpus, seconds: float, rate: float, seed: int) -> dict[str, Any]:
    """Trains for so many seconds of wall time; returns what was measured.

    The learning rate rises over the first 5 % of the time and falls to 0 over the rest.
    """
    method, device = trained.method, corpus.documents.device
    stream = batches(corpus.rows_of("train"), method.batch_size, seed)
    losses: list[Tensor] = []
    trained.restart()
    _wait(device)
    started = time.perf_counter()
    trained.loss.restart(seed)
    _wait(device)
    prefilled = time.perf_counter() - started
    while (used := (time.perf_counter() - started) / seconds) < 1:
        losses.append(trained.step(next(stream), rate * min(used / _WARM_UP, (1 - used) / (1 - _WARM_UP))))
        if len(losses) % _STEPS_AHEAD == 0:
            _wait(device)  # so that the clock is that of the device
    _wait(device)
    elapsed = time.perf_counter() - started
    steps = len(losses)
    return {
        "method": method.name,
        "learning_rate": rate,
        "seed": seed,
        "seconds": elapsed,
        "prefill_seconds": prefilled,
        "steps": steps,
        "texts_per_second": steps * method.texts_per_step / elapsed,
        "loss": torch.stack(losses[-_LAST_STEPS:]).mean().item(),
    }


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """[size] rows each, without end: every epoch is a new order of all, without its last, smaller batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        yield from order[: len(rows) // size * size].split(size)


@torch.no_grad()
def evaluate(encoder: Encoder, corpus: Corpus, split: str) -> dict[str, float]:
    """MRR@10 and Recall@10 of up to 3,000 queries of the split over all documents."""
    documents = torch.cat([encoder(tokens) for tokens in corpus.documents.split(_ROWS_AT_ONCE)])
    ranks: list[Tensor] = []
    for rows in corpus.rows_of(split, at_most=_ASKED).split(_QUERIES_AT_ONCE):
        scores = encoder(corpus.queries[rows]) @ documents.T
        ranks.append((scores >= scores.gather(1, rows[:, None])).sum(1))  # of equal scores the answer comes last
    return summarize(torch.cat(ranks).cpu().numpy())


def _plan(methods: Sequence[Method], options: Options) -> Iterator[tuple[bool, Method, int]]:
    """Whether to tune, with what method, and the seed."""
    if len(options.learning_rates) > 1:
        yield from ((True, method, 0) for method in methods)
    for seed in range(1, options.seeds + 1):
        yield from ((False, method, seed) for method in methods)


def _best_rate(tuning: list[dict[str, Any]], method: Method, options: Options) -> float:
    """The one with the best MRR@10 of validation queries."""
    tried = [row for row in tuning if row["method"] == method.name]
    if not tried:
        return options.learning_rates[0]
    return float(max(tried, key=lambda row: row["validation"]["mrr@10"])["learning_rate"])


def _write(found: dict[str, Any], out: Path) -> None:
    with written_whole(out) as unfinished:
        unfinished.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
