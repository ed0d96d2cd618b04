"""One run: a dual encoder trained with a negative cache, with evaluations and checkpoints on the way.

A run is a function of its data, model and options: the batch, the draws and the dropout of a step depend on its seed
and number alone, so that a run that was stopped goes on from its checkpoint as if it had not been.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from tqdm import tqdm

import negcache_fn
from examples.code_search import checkpoint
from examples.interruptions import InterruptedRunError, interruptions_deferred
from examples.msmarco.data import Data, TrainingSet
from examples.msmarco.estimators import step_options
from examples.msmarco.evaluate import asked, evaluate
from examples.msmarco.model import DualEncoder
from examples.msmarco.options import Options
from examples.msmarco.retrieval import autocast
from examples.msmarco.storage import new_cache, restored_cache
from negcache_fn import FalseNegatives

__all__ = ["CHECKPOINT_FILE", "Run"]

CHECKPOINT_FILE = "checkpoint.pt"
_PREFILL_BATCH = 512


class Run:
    """Encoder, optimiser and cache, at some step."""

    def __init__(self, options: Options, data: Data, model: DualEncoder, folder: Path, device: torch.device) -> None:
        self.options = options
        self.data = data
        self.folder = folder
        self.device = device
        self.dtype = getattr(torch, options.precision)
        self.step = 0
        self.step_options = step_options(options)
        self.model = model.to(device).train()
        passage_tower = model.passage_tower
        self.encode = (
            passage_tower if options.chunk_size is None else negcache_fn.chunked(passage_tower, options.chunk_size)
        )
        self.training_set = TrainingSet(
            data,
            batch_size=options.batch_size,
            random_passages=options.random_passages,
            seed=options.seed,
            triples=None if options.triples is None else Path(options.triples),
        )
        self.identity = {
            "passages": data.passages.key,
            "queries": self.training_set.texts.key,
            "judgements": self.training_set.key,
            "passage_tokens": data.passage_tokens,
            "query_tokens": data.query_tokens,
            "model": model.digest(),
            **model.shape._asdict(),
            **_described(options),
        }
        towers = [weight for name, weight in model.named_parameters() if name != "log_scale"]
        self.optimizer = torch.optim.Adam([{"params": towers}, {"params": [model.log_scale]}])
        self.cache: TensorDictBase | None = None

    def resume(self) -> None:
        """Takes up the checkpoint, if there is one; else begins with an empty cache.

        Raises:
            ValueError: a checkpoint of other data, another model or other options.
        """
        file, options = self.folder / CHECKPOINT_FILE, self.options
        if not file.exists():
            self.cache = new_cache(
                options.storage,
                options.cache_size,
                self.model.dim,
                self.data.features(np.zeros(1, np.int64)),
                dtype=self.dtype,
                device=self.device,
                folder=self.folder,
                seed=options.seed,
            )
            return
        saved = torch.load(file, weights_only=True, mmap=options.storage == "files")
        differences = [
            f"{name} {saved['identity'].get(name)!r}, now {value!r}"
            for name, value in self.identity.items()
            if saved["identity"].get(name) != value
        ]
        if differences:
            raise ValueError(
                f"{file} is of another run: {'; '.join(differences)}. Give the options of then, or another --out"
            )
        self.step = saved["step"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.cache = restored_cache(saved["cache"], options.storage, self.folder)

    def train(self) -> None:
        """Goes on to the last step; `resume` comes first.

        Raises:
            InterruptedRunError: after SIGINT or SIGTERM, when all is saved.
        """
        options = self.options
        if self.step == options.steps:
            return
        with interruptions_deferred() as interrupted, self._log() as log:
            if self.step == 0:
                self._prefill(lambda: interrupted.is_set)
                log.write(json.dumps({"step": 0, **self._evaluate()}) + "\n")
            progress = tqdm(total=options.steps, initial=self.step, desc="train", unit="step", mininterval=0.5)
            with progress:
                while self.step < options.steps:
                    loss, metrics = self._train_step()
                    is_milestone = self.step == options.steps or self.step % options.evaluate_every == 0
                    if is_milestone or self.step % options.log_every == 0:
                        row = {"step": self.step, "loss": loss.item(), "scale": self.model.scale.item()}
                        row |= {name: value.item() for name, value in metrics.items()}
                        if is_milestone:
                            row |= self._evaluate()
                            progress.set_postfix({"mrr@10": f"{row['mrr@10']:.3f}"}, refresh=False)
                        log.write(json.dumps(row) + "\n")
                    progress.update()
                    if is_milestone or interrupted.is_set:
                        self._save()
                    if interrupted.is_set:
                        raise InterruptedRunError

    def _train_step(self) -> tuple[Tensor, dict[str, Tensor]]:
        options = self.options
        batch = self.training_set.batch(self.step).to(self.device)
        share = _share_of_rate(self.step, options.warm_up, options.steps)
        for group, rate in zip(self.optimizer.param_groups, (options.rate, options.scale_rate), strict=True):
            group["lr"] = rate * share
        with self._seeded(self.step), autocast(self.device, self.dtype):
            output = negcache_fn.step_(
                self.cache,
                self.model.query_tower({"input_ids": batch.queries}),
                batch.passages,
                self.encode,
                options=self.step_options,
                scale=self.model.scale,
                ids=batch.ids,
                false_negatives=FalseNegatives(ids=batch.positives),
            )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return output.loss.detach(), output.metrics

    @torch.no_grad()
    def _prefill(self, is_interrupted: Callable[[], bool]) -> None:
        """Random passages, embedded without dropout, so that the first queries have something to draw from."""
        options, passages = self.options, self.data.passages
        wanted = options.cache_size if options.prefill is None else options.prefill
        count = min(wanted, options.cache_size, len(passages))
        rows = np.random.default_rng((options.seed, 2)).choice(len(passages), count, replace=False)
        self.model.eval()
        with tqdm(total=count, desc="prefill", unit="passage", unit_scale=True) as progress:
            for start in range(0, count, _PREFILL_BATCH):
                if is_interrupted():  # nothing is worth saving yet
                    raise InterruptedRunError
                some = rows[start : start + _PREFILL_BATCH]
                features = {name: value.to(self.device) for name, value in self.data.features(some).items()}
                with autocast(self.device, self.dtype):
                    embeddings = self.model.passage_tower(features)
                negcache_fn.update_(self.cache, features, embeddings, ids=torch.from_numpy(some).to(self.device))
                progress.update(len(some))
        self.model.train()

    def _evaluate(self) -> dict[str, float]:
        """MRR@10 and NDCG@10 of some held-out queries, over a sample of the passages with all that answer."""
        options = self.options
        questions = asked(self.data, options.validation_split, at_most=options.validation_queries)
        count = min(options.validation_passages, len(self.data.passages))
        others = np.random.default_rng(0).choice(len(self.data.passages), count, replace=False)
        rows = np.union1d(others, questions.judgements.passages)
        (found,) = evaluate(self.model, self.data, [questions], passages=rows, depth=10, dtype=self.dtype)
        return {name: value for name, value in found.metrics.items() if name != "recall@10"}

    @contextmanager
    def _seeded(self, step: int) -> Iterator[None]:
        """The global generators as (seed, step) says: dropout is a function of them, and not of what came before."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(
                int(np.random.SeedSequence((self.options.seed, 3, step)).generate_state(1, np.uint64)[0] >> 1)
            )
            yield

    def _save(self) -> None:
        saved = {
            "identity": self.identity,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "cache": self.cache,
        }
        checkpoint.save(saved, self.folder / CHECKPOINT_FILE)

    @contextmanager
    def _log(self) -> Iterator[TextIO]:
        """Opened behind the rows of the steps so far; what a killed run wrote after its checkpoint goes."""
        file = self.folder / "metrics.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = []
        if self.step and file.exists():
            for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
                if not line.endswith("\n") or json.loads(line)["step"] > self.step:
                    break
                kept.append(line)
        with file.open("w", encoding="utf-8", buffering=1) as log:
            log.writelines(kept)
            yield log


def _described(options: Options) -> dict[str, Any]:
    """As checkpoints name them."""
    described = asdict(options)
    return {"num_samples": described.pop("draws_per_query"), **described}


def _share_of_rate(step: int, warm_up: int, steps: int) -> float:
    """Rises on a line to 1 in the step after the warm-up, then falls on one to reach 0 after the last."""
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return (steps - step) / max(1, steps - warm_up)
