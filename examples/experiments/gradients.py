"""How far each method's gradient is from that of the exhaustive softmax with everything encoded afresh.

One run is stopped at some steps, with its cache as stale as it then is. For a few batches, every method gives its
gradient many times, with draws (or random documents) of its own each time, so that bias and noise are told apart:

    bias^2 = |mean g - exact|^2 - noise^2 / replicates        noise^2 = mean |g - mean g|^2

both relative to `|exact|^2`. The subtracted term is what noise leaves in the mean.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.code_search.evaluate import encode_corpus
from examples.code_search.features import rows_of
from examples.experiments.encoders import DualEncoder, optimizers
from examples.experiments.grid import GradientStudy
from examples.experiments.methods import CacheLearner, Learner, exhaustive_loss, learner
from examples.experiments.tasks import Batch, Task
from examples.experiments.trial import train_step

__all__ = ["run_gradients"]


def run_gradients(study: GradientStudy, task: Task) -> dict[str, Any]:
    """``stops``, a row for each: the state of the cache, and bias, noise and cosine of each method."""
    torch.set_num_threads(1)
    model = DualEncoder(study.encoder, seed=study.seed, scale=study.setting.scale)
    optimizer = optimizers(model, study.setting.rate)
    training = learner(study.trained_by, model, task, study.seed)
    if not isinstance(training, CacheLearner):
        raise ValueError(f"trained_by is {study.trained_by.name}; expected a method with a cache")
    rows: list[dict[str, Any]] = []
    for step in range(max(study.steps) + 1):
        if step in study.steps:
            rows.append(_stop(study, training, step))
        train_step(training, training.batch(study.seed, step), optimizer)
    return {"stops": rows}


def _stop(study: GradientStudy, training: CacheLearner, step: int) -> dict[str, Any]:
    started = time.perf_counter()
    model, task = training.model, training.task
    totals = {method.name: np.zeros(3) for method in study.methods}
    for batch in range(study.batches):
        # Batches that the run never sees: its own ones come by (seed, step).
        place = (study.seed + 10_000, step * study.batches + batch)
        exact = _exact(model, training.task.batch(*place, study.trained_by.batch), task)
        for method in study.methods:
            learning = learner(replace(method, prefill=False), model, task, study.seed)
            totals[method.name] += _compared(learning, training, place, exact, study.replicates)
    bias, noise, cosine = np.stack(list(totals.values()), 1) / study.batches
    return {
        "step": step,
        "drift": _drift(training),
        "age": float((training.state["step"] - training.state["items", "embedded_at"]).double().mean()),
        "scale": model.scale.item(),
        "seconds": time.perf_counter() - started,
        "methods": {
            name: {"bias": float(max(bias[row], 0.0) ** 0.5), "noise": float(noise[row] ** 0.5), "cosine": cosine[row]}
            for row, name in enumerate(totals)
        },
    }


def _compared(
    learning: Learner, training: CacheLearner, place: tuple[int, int], exact: Tensor, replicates: int
) -> np.ndarray:
    """Squares of bias and noise, relative to the exact gradient's, and the mean cosine to it."""
    total, squares, cosines = torch.zeros_like(exact), 0.0, 0.0
    norm = float(exact.norm())
    for replicate in range(replicates):
        if isinstance(learning, CacheLearner):
            learning.state = training.state.clone()
            learning.state["seed"].fill_(replicate + 1)
        gradient = _gradient(learning, learning.batch(*place, others=replicate))
        total += gradient
        squares += float(gradient.norm()) ** 2
        cosines += float(gradient @ exact) / (float(gradient.norm()) * norm)
    mean = total / replicates
    noise = (squares / replicates - float(mean.norm()) ** 2) * replicates / (replicates - 1)
    bias = float((mean - exact).norm()) ** 2 - noise / replicates
    return np.array([bias / norm**2, max(noise, 0.0) / norm**2, cosines / replicates])


def _exact(model: DualEncoder, batch: Batch, task: Task) -> Tensor:
    documents = model.encode_documents(rows_of(task.documents, task.train_documents))
    exhaustive_loss(model, batch, documents, task).backward()
    return _taken(model)


def _gradient(learning: Learner, batch: Batch) -> Tensor:
    learning(batch).loss.backward()
    return _taken(learning.model)


def _taken(model: DualEncoder) -> Tensor:
    """All gradients in one vector; the model is left without."""
    parts: list[Tensor] = []
    for parameter in model.parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parts.append((gradient.to_dense() if gradient.is_sparse else gradient).flatten())
        parameter.grad = None
    return torch.cat(parts)


@torch.no_grad()
def _drift(training: CacheLearner) -> float:
    """Mean ``|fresh - stale|^2 / |fresh|^2`` over the whole cache."""
    items = training.state["items"]
    fresh = encode_corpus(training.model, dict(items["features"].items()))
    return float(((fresh - items["embedding"]).square().sum(1) / fresh.square().sum(1)).mean())
