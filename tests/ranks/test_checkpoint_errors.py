"""What one rank cannot do with a checkpoint is an error on every rank, at once, that names the rank."""

from __future__ import annotations

import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import negcache_fn
from negcache_fn import distributed
from tests.support.builders import same_snapshot, snapshot
from tests.support.processes import run_ranks

CAPACITY, DIM = 2048, 4
LONGEST_SECONDS = 5  # of one call; the group waits for 120
EXAMPLE = {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}


def part(filled: float = 0.0, dtype: torch.dtype = torch.float32, example: Any = EXAMPLE) -> Any:
    """A rank's half of a cache."""
    state = negcache_fn.init_cache(CAPACITY // 2, DIM, example, embedding_dtype=dtype)
    state["items", "embedding"].fill_(filled)
    return state


def saved(state: Any) -> dict[str, Any]:
    return {"cache": distributed.checkpointable(state, dist.group.WORLD)}


def told(function: Callable[[], object]) -> tuple[str, str]:
    started = time.monotonic()
    try:
        function()
    except Exception as error:
        assert time.monotonic() - started < LONGEST_SECONDS
        return type(error).__name__, str(error)
    return "", ""


def not_written(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Saves that fail; then one that does not."""
    group = dist.group.WORLD

    def save(where: Path, step: int = 1, **options: Any) -> None:
        distributed.save_checkpoint(where, step, saved(part(1.0)), group=group, **options)

    def full_disk_on_one() -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            save(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    save(folder, 1)
    found = {
        "no folder": told(lambda: save(folder / "step-1-save-1" / "manifest.json" / "below")),
        "full disk": told(full_disk_on_one),
        "step": told(lambda: save(folder, 1 + rank)),
        "identity": told(lambda: save(folder, 1, identity={"rank": rank})),
        "argument": told(lambda: save(folder, 1, keep=1 - rank)),
        "value": told(lambda: distributed.save_checkpoint(folder, 1, {"x": told if rank else 1}, group=group)),
        "as it is": told(lambda: distributed.save_checkpoint(folder, 1, {"cache": part()}, group=group)),
    }
    dist.barrier()
    found["left"] = ("", ", ".join(sorted(path.name for path in folder.iterdir())))
    save(folder, 7)
    return found


def test_not_written(tmp_path: Path) -> None:
    first, second = run_ranks(2, {"case": (not_written, {"folder": tmp_path / "saves"})}, _made(tmp_path / "r"))["case"]
    assert first.keys() == second.keys()
    expected = {
        "no folder": ("OSError", "the checkpoint was not saved: rank 0: NotADirectoryError"),
        "step": ("ValueError", "step differs between the ranks of the group: [1, 2]"),
        "identity": ("ValueError", "identity differs between the ranks of the group: [{'rank': 0}, {'rank': 1}]"),
        "argument": ("ValueError", "rank 1: ValueError: keep is 0; expected at least 1"),
        "as it is": ("ValueError", "rank 1: TypeError: state_dict['cache'] is a TensorDict; expected checkpointable("),
        "left": ("", "step-1-save-1"),
    }
    for of_rank in (first, second):
        for name, (kind, text) in expected.items():
            assert of_rank[name][0] == kind, of_rank[name]
            assert text in of_rank[name][1], of_rank[name]
        assert of_rank["full disk"][0] in ("OSError", "RuntimeError")
        assert "the checkpoint was not saved: rank 1: " in of_rank["full disk"][1]


def not_loaded(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Loads that fail, and leave both states as they were; then one that does not."""
    group = dist.group.WORLD
    big = part(1.0)
    if rank == 1:
        big["items", "embedding"][3, 2] = 1e6
    distributed.save_checkpoint(folder, 1, saved(big), group=group)

    def load(state: Any, where: Path = folder) -> Any:
        before = snapshot(state)
        try:
            return distributed.load_checkpoint(where, saved(state), group=group)
        except Exception:
            assert same_snapshot(snapshot(state), before)
            raise

    other = {**EXAMPLE, "c": torch.zeros(1)} if rank else EXAMPLE
    found = {
        "no folder": told(lambda: load(part(), folder / "elsewhere" if rank else folder)),
        "infinite": told(lambda: load(part(dtype=torch.float16))),
        "features": told(lambda: saved(part(example=other))),
        "whole": told(lambda: distributed.unshard(part(example=other), group)),
        "no state": told(lambda: distributed.unshard(part() if rank else part()["items"], group)),
        "misfit": told(lambda: distributed.load_checkpoint(folder, {"x": 1} if rank else {}, group=group)),
    }
    state = part()
    assert load(state) == 1
    assert torch.equal(state["items", "embedding"], big["items", "embedding"])
    return found


def test_not_loaded(tmp_path: Path) -> None:
    of_ranks = run_ranks(2, {"case": (not_loaded, {"folder": tmp_path / "saves"})}, _made(tmp_path / "r"))["case"]
    expected = {
        "no folder": "what a rank finds in folder differs between the ranks of the group: [['step-1-save-1'], []]",
        "infinite": "the checkpoint was not loaded: rank 1: ValueError: cache.items.embedding has numbers in",
        "features": "features['c'].dtype differs between the ranks of the group",
        "whole": "features['c'].dtype differs between the ranks of the group",
        "no state": "state has keys",
        "misfit": "rank 1: ValueError: state_dict does not match",
    }
    for of_rank in of_ranks:
        assert {kind for kind, _ in of_rank.values()} == {"ValueError"}, of_rank
        for name, text in expected.items():
            assert text in of_rank[name][1], of_rank[name]


def averaged(rank: int, world: int) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None

    def parameter(*shape: int) -> torch.Tensor:
        made = torch.nn.Parameter(torch.zeros(shape))
        made.grad = torch.full(shape, float(rank))
        return made

    found: dict[str, Any] = {}
    given = {
        "number": [parameter(2), parameter(2)][: 1 + rank],
        "shape": [parameter(2 + rank)],
        "dtype": [parameter(2).detach().to(torch.float64 if rank else torch.float32)],
    }
    for name, parameters in given.items():
        found[name] = told(lambda parameters=parameters: distributed.average_gradients(parameters, group))
        assert all(p.grad is None or bool((p.grad == rank).all()) for p in parameters)
    right = parameter(2)
    distributed.average_gradients(iter([right]), group)
    assert right.grad is not None
    return found | {"right": right.grad.tolist()}


def test_gradients_of_other_parameters(tmp_path: Path) -> None:
    for found in run_ranks(2, {"case": (averaged, {})}, tmp_path)["case"]:
        assert found.pop("right") == [0.5, 0.5]
        for kind, text in found.values():
            assert kind == "ValueError"
            assert re.search(
                r"parameters\[[01]\]\.(shape\[1\]|dtype) differs between the ranks of the group: \[", text
            ), text


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
