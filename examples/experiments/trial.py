"""One trial: an encoder trained by one method, asked validation and test queries as it uses up its budgets."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.code_search.baselines import tfidf
from examples.code_search.evaluate import encode_corpus, ranks_of, summarize
from examples.code_search.features import rows_of
from examples.experiments.encoders import DualEncoder, optimizers
from examples.experiments.grid import Trial
from examples.experiments.methods import Learner, learner
from examples.experiments.tasks import Batch, Pairs, Task

__all__ = ["evaluate", "run_lexical", "run_trial", "train_step"]

_FIRST_POINT = 50
_GROWTH = 2
_CURVE_QUERIES = 2000
_QUERIES_AT_ONCE = 512
_SMOOTHING = 0.95


def run_trial(trial: Trial, task: Task) -> dict[str, Any]:
    """What was measured: ``at`` each budget, and the ``curve`` on the way, which trials that only tune do without.

    Arithmetic is done by one thread, so that a trial is a function of its fields; only seconds (of that thread) vary.
    """
    torch.set_num_threads(1)
    model = DualEncoder(trial.encoder, seed=trial.seed, scale=trial.setting.scale)
    optimizer = optimizers(model, trial.setting.rate)
    started = time.thread_time()
    learning = learner(trial.method, model, task, trial.seed)
    used = {"steps": 0, "documents": float(learning.documents_encoded), "seconds": time.thread_time() - started}
    at: dict[str, Any] = {}
    curve: list[dict[str, Any]] = []

    def rate_left(_: int) -> float:
        return 1 - sum(used[budget] / most for budget, most in trial.budgets.items()) if trial.decay else 1.0

    schedules = [torch.optim.lr_scheduler.LambdaLR(part, rate_left) for part in optimizer]
    smoothed: dict[str, float] = {}
    next_point = float(_FIRST_POINT)
    while True:
        for budget, most in trial.budgets.items():
            if used[budget] >= most and budget not in at:
                splits = ("validation", "test") if budget in trial.test_at else ("validation",)
                at[budget] = {**used, **{split: evaluate(model, task, task.splits[split]) for split in splits}}
        if len(at) == len(trial.budgets):
            break
        if trial.test_at and used["steps"] >= next_point:
            next_point *= _GROWTH
            found = evaluate(model, task, task.splits["validation"], at_most=_CURVE_QUERIES)
            curve.append({**used, **smoothed, "scale": model.scale.item(), "validation": found})
        started = time.thread_time()
        batch = learning.batch(trial.seed, used["steps"])
        metrics = train_step(learning, batch, optimizer)
        used["seconds"] += time.thread_time() - started
        used["steps"] += 1
        used["documents"] = float(learning.documents_encoded)
        for schedule in schedules:
            schedule.step()
        for name, value in metrics.items():
            before = smoothed.get(name, value.item())
            smoothed[name] = _SMOOTHING * before + (1 - _SMOOTHING) * value.item()
    return {"at": at, "curve": curve, "scale": model.scale.item()}


def run_lexical(task: Task) -> dict[str, Any]:
    """What tf-idf finds for the ``test`` queries."""
    pairs = task.splits["test"]
    return {"test": tfidf(task.document_bags, task.query_bags, pairs.queries, pairs.positives)}


def train_step(learning: Learner, batch: Batch, optimizer: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """One step of the learner and the optimisers; returns loss and metrics."""
    outcome = learning(batch)
    outcome.loss.backward()
    for part in optimizer:
        part.step()
        part.zero_grad()
    return {"loss": outcome.loss.detach(), **outcome.metrics}


@torch.no_grad()
def evaluate(model: DualEncoder, task: Task, pairs: Pairs, *, at_most: int | None = None) -> dict[str, float]:
    """MRR@10 and Recall@10 of the queries over all documents; of several answers the best counts."""
    rows = np.arange(len(pairs.queries))
    if at_most is not None and len(rows) > at_most:
        rows = np.random.default_rng(0).choice(rows, at_most, replace=False)
    queries = [
        model.encode_queries(rows_of(task.queries, pairs.queries[rows[start : start + _QUERIES_AT_ONCE]]))
        for start in range(0, len(rows), _QUERIES_AT_ONCE)
    ]
    documents = encode_corpus(model, task.documents)
    return summarize(ranks_of(torch.cat(queries), documents, pairs.positives[rows]))
