"""One run: a method trained for a number of steps, with evaluations and checkpoints on the way.

A run is a function of its data and options: stopped anywhere, it goes on from its checkpoint to the same result, bit
for bit. One thread does the arithmetic of a step, so that the number of cores does not change it either.
"""

from __future__ import annotations

import io
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import negcache_fn
from examples.code_search import checkpoint
from examples.code_search.data import Data
from examples.code_search.evaluate import evaluate
from examples.code_search.features import rows_of
from examples.code_search.methods import Method, cache_step, in_batch_step
from examples.code_search.model import DualEncoder, optimizers
from examples.code_search.workers import ALONE, Workers
from examples.interruptions import InterruptedRunError, interruptions_deferred
from examples.threads import one_thread
from negcache_fn import StepOptions, distributed

__all__ = ["Options", "Run"]


@dataclass(frozen=True)
class Options:
    """What a run depends on besides its data and method."""

    embedding_dim: int = 256
    batch_size: int = 16
    cache_size: int = 8192
    draws_per_query: int = 4
    seed: int = 0
    evaluate_every: int = 400
    validation_queries: int = 1500
    """How many are asked at each evaluation; the final one asks all of the test modules."""

    def described(self) -> dict[str, Any]:
        """As checkpoints and summaries name them."""
        described = asdict(self)
        return {"num_samples": described.pop("draws_per_query"), **described}


class Run:
    """Encoder, optimisers and cache of one method, at some step."""

    def __init__(self, method: Method, options: Options, data: Data, folder: Path, workers: Workers = ALONE) -> None:
        self.method = method
        self.options = options
        self.data = data
        self.folder = folder
        self.workers = workers
        self.step = 0
        self.seconds = 0.0
        """Spent in training steps so far."""
        self.history: list[dict[str, float]] = []
        """One row a step: loss, the cache's metrics, and mrr@10 and recall@10 where evaluated."""
        self.model = DualEncoder(options.embedding_dim, seed=options.seed)
        self.encode = self.model if workers.group is None else DistributedDataParallel(self.model)
        self.optimizers = optimizers(self.model)
        self.step_options = StepOptions(
            draws_per_query=options.draws_per_query, in_batch=True if workers.group is None else "global"
        )
        self.cache = self._empty_cache() if method.cached else None

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be continued."""
        return {"method": self.method.name, "corpus": self.data.corpus.key, **self.options.described()}

    def train(self, steps: int) -> None:
        """Goes on to ``steps`` steps, from the checkpoint if there is one.

        Raises:
            InterruptedRunError: after SIGINT or SIGTERM, when all is saved.
        """
        self._resume(steps)
        if self.step == steps:
            return
        progress = tqdm(
            total=steps,
            initial=self.step,
            desc=self.method.label,
            unit="step",
            mininterval=0.5,
            dynamic_ncols=True,
            disable=not self.workers.leads,
        )
        with progress, interruptions_deferred() as interrupted, self._metrics_file() as metrics:
            while self.step < steps:
                with one_thread():
                    row = self._train_step()
                is_milestone = self.step == steps or self.step % self.options.evaluate_every == 0
                if is_milestone and self.workers.leads:
                    row |= self._evaluate()
                    progress.set_postfix(loss=f"{row['loss']:.3f}", mrr=f"{row['mrr@10']:.3f}", refresh=False)
                self.history.append(row)
                metrics.write(json.dumps(row) + "\n")
                progress.update()
                stops = self.workers.any(interrupted.is_set)
                if is_milestone or stops:
                    self._save()
                if stops:
                    raise InterruptedRunError

    def _train_step(self) -> dict[str, float]:
        started = time.perf_counter()
        batch = self.data.batch(
            self.options.seed,
            self.step,
            batch_size=self.options.batch_size,
            random_documents=self.method.random_documents(self.options.batch_size, self.options.draws_per_query),
        )
        metrics: dict[str, Tensor] = {}
        if self.cache is None:
            loss = in_batch_step(self.model, batch)
        else:
            loss, metrics = cache_step(
                self.encode,
                self.model.scale,
                self.workers.part(batch),
                self.cache,
                options=self.step_options,
                group=self.workers.group,
            )
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - started
        values = {name: value.item() for name, value in metrics.items()}
        return {
            "step": self.step,
            "loss": self.workers.mean(loss.detach()).item(),
            "scale": self.model.scale.item(),
            **values,
        }

    def _evaluate(self) -> dict[str, float]:
        queries, positives = self.data.held_out("validation", at_most=self.options.validation_queries)
        return evaluate(self.model, queries, positives, self.data.documents)

    def _save(self) -> None:
        saved = {
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        if self.workers.group is None:
            checkpoint.save(saved | {"cache": self.cache}, self.folder / "checkpoint.pt")
            return
        # What is the same everywhere goes as it is, what is here alone by its part.
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        state = {"run": buffer.getvalue(), "cache": self._parts(self.cache)}
        distributed.save_checkpoint(
            self.folder / "checkpoints", self.step, state, group=self.workers.group, identity=self.identity
        )

    def _load(self) -> Any:
        if self.workers.group is None:
            return checkpoint.load(self.folder / "checkpoint.pt")
        cache = self._empty_cache()  # this run's, if what is found is of another
        state = {"run": b"", "cache": self._parts(cache)}
        try:
            found = distributed.load_checkpoint(
                self.folder / "checkpoints", state, group=self.workers.group, identity=self.identity
            )
        except ValueError as error:
            self._start_over(f": {error}")
            return None
        return None if found is None else torch.load(io.BytesIO(state["run"]), weights_only=True) | {"cache": cache}

    def _empty_cache(self) -> TensorDictBase:
        example, slots = rows_of(self.data.documents, slice(0, 1)), self.options.cache_size
        if self.workers.group is not None:
            slots = distributed.local_capacity(slots, self.workers.group)
        return negcache_fn.init_cache(slots, self.options.embedding_dim, example, seed=self.options.seed)

    def _parts(self, cache: TensorDictBase | None) -> dict[str, Any]:
        assert cache is not None, "only the run with a cache is distributed"
        return distributed.checkpointable(cache, self.workers.group)

    def _start_over(self, reason: str = "") -> None:
        if self.workers.leads:
            print(f"{self.method.label}: what is in {self.folder} is of other data or options{reason}; starting over")

    def _resume(self, steps: int) -> None:
        saved = self._load()
        if saved is None:
            return
        if saved["identity"] != self.identity or saved["step"] > steps:
            self._start_over()
            return
        self.step = saved["step"]
        self.seconds = saved["seconds"]
        self.history = saved["history"]
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.cache = saved["cache"]

    def _metrics_file(self) -> TextIO:
        """Opened behind the rows of the steps so far; what a killed run wrote after its checkpoint goes."""
        if not self.workers.leads:
            return io.StringIO()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / "metrics.jsonl").open("w", encoding="utf-8", buffering=1)
        file.writelines(json.dumps(row) + "\n" for row in self.history)
        return file
