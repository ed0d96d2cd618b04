"""The trainer of sentence-transformers: learning, resuming, several data sets, several processes."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="the extra sentence-transformers is not installed")

from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from tensordict import TensorDictBase
from torch import nn
from transformers import TrainerCallback

import negcache_fn
from negcache_fn.integrations.sentence_transformers import NegativeCacheCallback, NegativeCacheLoss
from tests.support import tiny
from tests.support.processes import run_ranks


def arguments(folder: Path, **options: Any) -> SentenceTransformerTrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "max_steps": 12,
        "learning_rate": 5e-3,
        "save_strategy": "no",
        "logging_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return SentenceTransformerTrainingArguments(output_dir=str(folder), **{**defaults, **options})


def trained(
    model: SentenceTransformer,
    loss: Any,
    data: Dataset | DatasetDict,
    args: SentenceTransformerTrainingArguments,
    *,
    resume: str | bool | None = None,
    attach: bool = True,
    **options: Any,
) -> SentenceTransformerTrainer:
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss, **options)
    if attach:
        NegativeCacheCallback.attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_learns_what_it_has_not_seen(tmp_path: Path) -> None:
    """One line is another than with MultipleNegativesRankingLoss."""
    data, held_out = tiny.dataset(480, 1), tiny.pairs(100, 2)
    after: dict[str, float] = {}
    for name in ("ranking", "cache"):
        model = tiny.transformer(tmp_path / "model")
        before = tiny.reciprocal_rank(model, held_out)
        loss = MultipleNegativesRankingLoss(model) if name == "ranking" else NegativeCacheLoss(model, 256)
        trained(model, loss, data, arguments(tmp_path, max_steps=30), attach=name == "cache")
        after[name] = tiny.reciprocal_rank(model, held_out)
        assert before < 0.2
    assert after["cache"] > 0.9


@pytest.mark.parametrize("given", ["train", "arguments", "True"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, given: str) -> None:
    """With dropout, a learnable scale and drawn negatives: bit for bit, parameters and cache."""
    data = tiny.dataset(160, 1)
    saving = {"save_strategy": "steps", "save_steps": 6}

    def start() -> tuple[SentenceTransformer, NegativeCacheLoss]:
        model = tiny.transformer(tmp_path / "model")
        return model, NegativeCacheLoss(
            model, 128, options=negcache_fn.StepOptions(draws_per_query=2), learnable_scale=True
        )

    model, loss = start()
    trained(model, loss, data, arguments(tmp_path / "run", **saving))
    checkpoint = str(tmp_path / "run" / "checkpoint-6")
    other, other_loss = start()
    if given == "train":
        trained(other, other_loss, data, arguments(tmp_path / "elsewhere", **saving), resume=checkpoint)
    elif given == "arguments":
        args = arguments(tmp_path / "elsewhere", resume_from_checkpoint=checkpoint)
        trained(other, other_loss, data, args, resume=args.resume_from_checkpoint)
    else:
        shutil.rmtree(tmp_path / "run" / "checkpoint-12")
        trained(other, other_loss, data, arguments(tmp_path / "run", **saving), resume=True)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert loss.state is not None
    assert other_loss.state is not None
    assert (loss.state == other_loss.state).all()
    assert int(loss.state["step"]) == 12
    assert loss.scaling.logarithm is not None
    assert other_loss.scaling.logarithm is not None
    assert torch.equal(loss.scaling.logarithm, other_loss.scaling.logarithm)


def test_warns_if_there_is_nothing_to_resume(tmp_path: Path) -> None:
    data = tiny.dataset(160, 1)
    model = tiny.transformer(tmp_path / "model")
    args = arguments(tmp_path, save_strategy="steps", save_steps=6)
    trained(model, NegativeCacheLoss(model, 128), data, args, attach=False)
    with pytest.warns(
        UserWarning, match="the run goes on at step 6 with an empty cache: of .*, nothing is saved of it"
    ):
        trained(model, NegativeCacheLoss(model, 128), data, args, resume=str(tmp_path / "checkpoint-6"))


class Seen(TrainerCallback):
    """As one that reports."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_metrics_are_logged(tmp_path: Path) -> None:
    model, seen = tiny.transformer(tmp_path / "model"), Seen()
    data = tiny.dataset(64, 1)
    trainer = trained(
        model,
        NegativeCacheLoss(model, 128),
        data,
        arguments(tmp_path, max_steps=8, eval_strategy="steps", eval_steps=4),
        callbacks=[seen],
        eval_dataset=tiny.dataset(32, 2),
    )
    assert seen.logs[-3]["cache/occupancy"] == pytest.approx(0.5, abs=0.01)
    assert any("cache/drift" in entry for entry in trainer.state.log_history)
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert not any("eval_loss" in entry and "cache/drift" in entry for entry in seen.logs)
    with pytest.raises(ValueError, match="loss has no NegativeCacheLoss in it"):
        trained(model, MultipleNegativesRankingLoss(model), data, arguments(tmp_path))


def test_several_data_sets_and_matryoshka(tmp_path: Path) -> None:
    """A loss and a cache for each; hard negatives in one of them; both restored."""
    model = tiny.transformer(tmp_path / "model")
    found = tiny.pairs(64, 1)
    triplets = Dataset.from_dict(
        {
            "anchor": [anchor for anchor, _ in found],
            "positive": [text for _, text in found],
            "negative": tiny.texts(64, 5),
        }
    )
    data = DatasetDict({"pairs": tiny.dataset(64, 2), "triplets": triplets})

    def losses() -> dict[str, nn.Module]:
        first, second = (
            NegativeCacheLoss(model, 64),
            NegativeCacheLoss(model, 96, options=negcache_fn.StepOptions(draws_per_query=2)),
        )
        return {"pairs": first, "triplets": MatryoshkaLoss(model, second, [32, 8])}

    args = arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=4)
    trainer = trained(model, losses(), data, args)
    callback = trainer.callback_handler.callbacks[0]
    assert isinstance(callback, NegativeCacheCallback)
    assert set(callback.losses) == {"pairs", "triplets"}
    assert any("cache/triplets/drift" in entry for entry in trainer.state.log_history)
    again = trained(model, losses(), data, args, resume=str(tmp_path / "checkpoint-4"))
    for name, loss in callback.losses.items():
        restored = again.callback_handler.callbacks[0].losses[name]
        assert loss.state is not None
        assert int(loss.state["step"]) == int(restored.state["step"])
        assert torch.equal(loss.state["items", "id"], restored.state["items", "id"])


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_half_precision_and_accumulation(tmp_path: Path, options: dict[str, Any]) -> None:
    model = tiny.transformer(tmp_path / "model")
    loss = NegativeCacheLoss(model, 128, options=negcache_fn.StepOptions(draws_per_query=2), mini_batch_size=8)
    trainer = trained(model, loss, tiny.dataset(160, 1), arguments(tmp_path, max_steps=10, **options))
    assert loss.state is not None
    assert loss.state["items", "embedding"].dtype == torch.float32
    assert bool(loss.state["items", "embedding"].isfinite().all())
    assert int(loss.state["step"]) == 10 * options.get("gradient_accumulation_steps", 1)
    first, last = (entry["loss"] for entry in (trainer.state.log_history[0], trainer.state.log_history[-2]))
    assert last < first


def training(rank: int, world: int, *, folder: str, gather: bool, mini_batch_size: int | None = None) -> dict[str, Any]:
    """One run of the trainer on this rank, which wraps the model for data-parallel training."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    path = Path(folder)
    model = tiny.transformer(path / "model")
    loss = NegativeCacheLoss(
        model,
        2048,
        options=negcache_fn.StepOptions(draws_per_query=2),
        gather_across_devices=gather,
        learnable_scale=True,
        mini_batch_size=mini_batch_size,
    )
    warnings.simplefilter("ignore")
    args = arguments(
        path / "out",
        per_device_train_batch_size=16 // world,
        max_steps=6,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=0.05,
        save_strategy="steps",
        save_steps=3,
    )
    trained(model, loss, tiny.dataset(96, 1), args)
    assert loss.state is not None
    assert loss.scaling.logarithm is not None
    return {
        "wrapped": type(loss.model).__name__,
        "state": loss.state.clone(),
        "scale": float(loss.scaling.logarithm.detach()),
        "parameters": [p.detach().clone() for p in model.parameters()],
        "files": sorted(str(file.relative_to(path / "out")) for file in (path / "out").rglob("*-of-*.pt")),
    }


def test_two_processes(tmp_path: Path) -> None:
    """Separate caches stay separate; a shared one, and parameters, are those of one process with the whole batch."""
    cases: dict[str, Any] = {
        name: (training, {"folder": str(tmp_path / name), **options})
        for name, options in {
            "separate": {"gather": False},
            "shared": {"gather": True},
            "chunks": {"gather": True, "mini_batch_size": 8},
        }.items()
    }
    for name in cases:
        tiny.transformer(tmp_path / name / "model", dropout=0.0)  # only rank 0 would write the files
    results = run_ranks(2, cases, tmp_path, fresh=True)
    for name, (first, second) in results.items():
        assert first["wrapped"] == "DistributedDataParallel", name
        assert first["scale"] == second["scale"]
        assert first["scale"] != pytest.approx(math.log(20), abs=1e-4)
        for one, other in zip(first["parameters"], second["parameters"], strict=True):
            assert torch.equal(one, other), name
        assert first["files"] == [
            f"_negative_cache/step-{step}-save-{number}/{rank}-of-2.pt"
            for step, number in ((3, 1), (6, 2))
            for rank in (0, 1)
        ]
    first, second = (result["state"] for result in results["separate"])
    assert first["items"].shape[0] == second["items"].shape[0] == 2048
    assert int(first["seed"]) != int(second["seed"])
    assert not ids_of(first) & ids_of(second)

    alone = run_ranks(1, {"shared": cases["shared"]}, tmp_path / "shared", fresh=True)["shared"][0]
    for name in ("shared", "chunks"):
        first, second = (result["state"] for result in results[name])
        assert first["items"].shape[0] == second["items"].shape[0] == 1024
        assert ids_of(first) | ids_of(second) == ids_of(alone["state"])
        together = torch.cat([first["items", "embedding"], second["items", "embedding"]])
        torch.testing.assert_close(together, alone["state"]["items", "embedding"], atol=1e-4, rtol=1e-4)
        assert results[name][0]["scale"] == pytest.approx(alone["scale"], abs=1e-5)
        for one, other in zip(results[name][0]["parameters"], alone["parameters"], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def training_on_two_data_sets(rank: int, world: int, *, folder: str, **options: Any) -> dict[str, Any]:
    """A loss and a cache for each data set, or a loss for both; why it ended, if it did."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29512"}
    path = Path(folder)
    model = tiny.transformer(path / "model")
    names, together = ("a", "b"), options.pop("together", False)
    losses = {name: NegativeCacheLoss(model, 2048, **options) for name in names}
    data = DatasetDict({name: tiny.dataset(64, seed) for seed, name in enumerate(names, start=1)})
    warnings.simplefilter("ignore")
    batch = 16 // world
    args = arguments(path / "out", per_device_train_batch_size=batch, max_steps=6, optim="sgd", learning_rate=0.05)
    error = None
    try:
        trained(model, losses["a"] if together else losses, data, args)
    except ValueError as told:
        error = str(told)
    return {
        "error": error,
        "states": {name: None if loss.state is None else loss.state.clone() for name, loss in losses.items()},
        "parameters": [p.detach().clone() for p in model.parameters()],
    }


def test_two_data_sets_on_two_ranks(tmp_path: Path) -> None:
    """Documents of a data set are in its loss's cache alone, on both ranks, and replicas stay equal.

    The trainer gives the ranks batches of different data sets. Losses that share a cache then raise on every rank.
    """
    cases: dict[str, Any] = {
        name: (training_on_two_data_sets, {"folder": str(tmp_path / name), **options})
        for name, options in {
            "separate": {},
            "shared": {"gather_across_devices": True},
            "together": {"gather_across_devices": True, "together": True},
        }.items()
    }
    model = tiny.transformer(tmp_path / "model", dropout=0.0)
    for name in cases:
        tiny.transformer(tmp_path / name / "model", dropout=0.0)
    own: dict[str, set[int]] = {}
    for seed, name in enumerate(("a", "b"), start=1):
        everything = NegativeCacheLoss(model, 2048)
        everything.prefill(tiny.dataset(64, seed)["positive"])
        assert everything.state is not None
        own[name] = ids_of(everything.state)
    results = run_ranks(2, cases, tmp_path, fresh=True)
    for found in results.pop("shared"):
        assert "loss differs between the ranks of the group" in found["error"]
        assert "give these one loss, or losses without gather_across_devices" in found["error"]
    for name, of_ranks in results.items():
        assert [found["error"] for found in of_ranks] == [None, None], name
        for one, other in zip(*(found["parameters"] for found in of_ranks), strict=True):
            assert torch.equal(one, other), name
        for found in of_ranks:
            for data, state in found["states"].items():
                if name == "together":
                    continue
                assert state is not None, (name, data)
                assert ids_of(state), (name, data)
                assert ids_of(state) <= own[data], (name, data)
    both = set.union(*(ids_of(found["states"]["a"]) for found in results["together"]))
    assert both & own["a"]
    assert both & own["b"]


def ids_of(state: TensorDictBase) -> set[int]:
    return set(state["items", "id"].tolist()) - {-1}
