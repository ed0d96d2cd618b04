"""Which run, model and data a saved cache belongs to, and who can see it."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="the extra sentence-transformers is not installed")

from datasets import DatasetDict
from huggingface_hub.utils import filter_repo_objects
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.util import dot_score
from torch import nn
from transformers.trainer_utils import HPSearchBackend

from negcache_fn._checkpoints.folder import finish, read_manifest, sums
from negcache_fn.integrations.sentence_transformers import NegativeCacheCallback, NegativeCacheLoss
from tests.integrations.test_sentence_transformers_trainer import arguments, trained
from tests.support import tiny

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with checkpoints at 2 and 4, and the model's files."""
    made = tmp_path_factory.mktemp("runs")
    run(made / "first", made, seed=1)
    return made


def run(
    output: Path, files: Path, *, seed: int = 1, loss: Any = None, data: Any = None, resume: Any = None, **options: Any
) -> NegativeCacheLoss:
    """Trains; `loss` makes the trainer's loss of a model."""
    model = tiny.transformer(files / "model")
    made = NegativeCacheLoss(model, 64) if loss is None else loss(model)
    given = tiny.dataset(96, seed) if data is None else data
    trained(model, made, given, arguments(output, **SAVING | options), resume=resume)
    return made


@pytest.fixture
def runs(folder: Path, tmp_path: Path) -> Path:
    """Copies of the run."""
    shutil.copytree(folder, tmp_path / "runs")
    return tmp_path / "runs"


def caches(output: Path) -> list[str]:
    return sorted(path.name.partition("-save")[0] for path in output.rglob("step-*-save-*"))


def test_the_cache_of_the_checkpoint_that_was_given(runs: Path) -> None:
    """And never output_dir's own of the same step, which is another run's."""
    run(runs / "other", runs, seed=2)
    expected = run(runs / "first", runs, resume=str(runs / "first" / "checkpoint-2")).state
    assert expected is not None
    found = run(runs / "other", runs, resume=str(runs / "first" / "checkpoint-2")).state
    assert found is not None
    assert bool((found == expected).all())


def test_another_runs_cache_is_not_taken(runs: Path) -> None:
    """A later run wrote the checkpoint, and not its cache: the weights are not those of the cache."""
    model = tiny.transformer(runs / "model")
    args = arguments(runs / "first", **SAVING | {"learning_rate": 1e-3})
    trained(model, MultipleNegativesRankingLoss(model), tiny.dataset(96, 3), args, attach=False)
    with pytest.warns(UserWarning, match=r"at step 2 with an empty cache: of .*checkpoint-2, .* with other weights"):
        state = run(runs / "first", runs, resume=str(runs / "first" / "checkpoint-2")).state
    assert state is not None
    assert int(state["step"]) == 2


def test_other_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    made: list[NegativeCacheLoss] = []

    def loss(model: SentenceTransformer) -> NegativeCacheLoss:
        made.append(NegativeCacheLoss(model, 32, similarity_fct=dot_score, embedding_dtype=torch.float16, seed=5))
        return made[0]

    with pytest.raises(ValueError, match="differs from the checkpoint: ") as told:
        run(tmp_path, folder, loss=loss, resume=str(folder / "first" / "checkpoint-2"))
    for text in (
        "cache_size is 32, and 64 there",
        "embedding_dtype is 'torch.float16', and 'torch.float32' there",
        "seed is 5, and 0 there",
        "similarity_fct is 'dot_score', and 'cos_sim' there",
        "expected the same, or that",
    ):
        assert text in str(told.value)
    assert made[0].state is None


def test_another_structure_of_losses(runs: Path) -> None:
    """The only cache is found under any name; data sets by theirs; what has none begins empty, with a warning."""
    checkpoint = str(runs / "first" / "checkpoint-2")
    data = tiny.dataset(96, 1)

    def step_of(loss: NegativeCacheLoss) -> int:
        assert loss.state is not None
        return int(loss.state["step"])

    inside: list[NegativeCacheLoss] = []

    def matryoshka(model: SentenceTransformer) -> nn.Module:
        inside.append(NegativeCacheLoss(model, 64))
        return MatryoshkaLoss(model, inside[-1], [32, 8])

    run(runs / "matryoshka", runs, loss=matryoshka, resume=checkpoint)
    assert step_of(inside[0]) == 4

    def one(model: SentenceTransformer) -> Any:
        return {"a": NegativeCacheLoss(model, 64)}

    found: Any = run(runs / "one", runs, loss=one, data=DatasetDict({"a": data}), resume=checkpoint)
    assert step_of(found["a"]) == 4

    def two(model: SentenceTransformer) -> Any:
        return {name: NegativeCacheLoss(model, 64) for name in ("a", "b")}

    both = DatasetDict({"a": data, "b": tiny.dataset(96, 2)})
    with (
        pytest.warns(UserWarning, match=r"the checkpoint has caches of \[''\]; those of \['a', 'b'\] begin empty"),
        pytest.warns(UserWarning, match=r"caches of \[''\] are left out, as the losses are \['a', 'b'\]"),
    ):
        found = run(runs / "two", runs, loss=two, data=both, resume=checkpoint)
    assert step_of(found["a"]) + step_of(found["b"]) == 2
    with pytest.warns(UserWarning, match=r"caches of \['a'\]; those of \['b'\] begin empty"):
        added: Any = run(
            runs / "added", runs, loss=two, data=both, resume=str(runs / "one" / "checkpoint-4"), max_steps=8
        )
    assert step_of(added["a"]) + step_of(added["b"]) == 8
    assert step_of(added["a"]) >= 4


def saved_by_two(save: Path, number: int) -> Path:
    """A save as two ranks with caches of their own make it."""
    made = save.with_name(f"step-2-save-{number}.partial")
    made.mkdir()
    about = read_manifest(save)["about"] | {"ranks": 2}
    parts = torch.load(save / "0-of-1.pt", weights_only=True)
    parts[""]["state"] = parts[""]["state"].clone()
    parts[""]["state"]["step"].fill_(100)
    names = ["0-of-2.pt", "1-of-2.pt"]
    for name in names:
        torch.save(parts, made / name)
    return finish(made, about, sums(made, names))


def test_files_of_several_ranks(runs: Path) -> None:
    """The files of a run on two ranks and those of one on one do not mix: the last one's are taken."""
    save = next((runs / "first" / "_negative_cache").glob("step-2-*"))
    two = saved_by_two(save, 0)
    resume = {"resume": str(runs / "first" / "checkpoint-2"), "save_strategy": "no"}
    state = run(runs / "first", runs, **resume).state
    assert state is not None
    assert int(state["step"]) == 4
    shutil.rmtree(two)
    saved_by_two(save, 9)
    with pytest.warns(UserWarning, match="has caches of 2 ranks for 1: "):
        state = run(runs / "first", runs, **resume).state
    assert state is not None
    assert int(state["step"]) == 102


def test_a_damaged_cache_is_told(runs: Path) -> None:
    file = next((runs / "first" / "_negative_cache").glob("step-2-*/0-of-1.pt"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"with an empty cache: of .*: 0-of-1.pt has \d+ bytes; expected \d+"):
        run(runs / "first", runs, resume=str(runs / "first" / "checkpoint-2"))


def test_a_cache_goes_with_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    run(tmp_path / "limited", folder, save_total_limit=1, max_steps=6)
    assert caches(tmp_path / "limited") == ["step-6"]
    run(tmp_path / "weights", folder, save_only_model=True)
    assert caches(tmp_path / "weights") == []
    run(tmp_path / "limited", folder, save_total_limit=2)  # a second run in the folder
    assert caches(tmp_path / "limited") == sorted(
        path.name.replace("checkpoint", "step") for path in (tmp_path / "limited").glob("checkpoint-*")
    )


def test_no_cache_goes_to_another_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal trials have equal results, with a learnable scale and without the callback too."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # optuna is not here
    results: list[tuple[float, list[Any]]] = []
    for attach in (True, False):
        loss = NegativeCacheLoss(tiny.transformer(folder / "model"), 64, learnable_scale=True, scale=10.0)
        trainer = SentenceTransformerTrainer(
            model_init=lambda: tiny.transformer(folder / "model"),
            args=arguments(tmp_path / str(attach), **SAVING | {"logging_steps": 1}),
            train_dataset=tiny.dataset(96, 1),
            loss=loss,
        )
        if attach:
            NegativeCacheCallback.attach(trainer)
        trainer.hp_search_backend = HPSearchBackend.OPTUNA
        trainer.hp_space = lambda trial: trial.params
        for number in range(2):
            trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": 1e-2}))
            assert loss.state is not None
            assert int(loss.state["step"]) == 4
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            results.append((torch.as_tensor(loss.scaling()).item(), losses))
        if attach:
            names = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("step-*-save-*"))]
            assert names == [
                f"True/_negative_cache/run-{number}/step-{step}-save-{step // 2}"
                for number in (0, 1)
                for step in (2, 4)
            ]
            best = str(tmp_path / "True" / "run-1" / "checkpoint-2")
            trainer.hp_search_backend = None
            trainer.train(resume_from_checkpoint=best)  # finds it
            assert loss.state is not None
            assert int(loss.state["step"]) == 4
    assert all(result == results[0] for result in results)


class Hub:
    """Stands in for the hub: what would be uploaded, now or, as uploads run behind, at the end."""

    def __init__(self) -> None:
        self.uploads: list[tuple[Path, Any]] = []
        self.files: set[str] = set()

    def create_repo(self, name: str, **options: Any) -> Any:
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path: Any, ignore_patterns: Any = None, **options: Any) -> Any:
        self.uploads.append((Path(folder_path), ignore_patterns))
        self.look()
        return SimpleNamespace(done=lambda: True, is_done=lambda: True, result=lambda: None, exception=lambda: None)

    def look(self) -> None:
        for folder, ignored in self.uploads:
            if folder.exists():
                names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
                self.files |= set(filter_repo_objects(names, ignore_patterns=ignored))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *_, **__: made)
    logging.disable(logging.WARNING)
    yield made
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints"])
def test_a_cache_is_never_uploaded(folder: Path, tmp_path: Path, hub: Hub, strategy: str) -> None:
    model = tiny.transformer(folder / "model")
    pushing = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "me/model", "hub_always_push": True}
    args = arguments(tmp_path / "run", **SAVING, **pushing)
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=tiny.dataset(96, 1), loss=NegativeCacheLoss(model, 64)
    )
    NegativeCacheCallback.attach(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for resume in (None, str(tmp_path / "run" / "checkpoint-2")):  # the same step is saved again
            trainer.train(resume_from_checkpoint=resume)
            hub.look()
        trainer.push_to_hub()
    hub.look()
    assert len(hub.uploads) > 2
    assert any(name.endswith("model.safetensors") for name in hub.files)
    assert caches(tmp_path / "run") == ["step-2", "step-4"]
    told = [name for name in hub.files if "negative_cache" in name or name.endswith("-of-1.pt")]
    assert told == []
