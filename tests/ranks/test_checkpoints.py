"""Checkpoints of a sharded cache: read by any number of ranks, whole or not there."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tensordict import TensorDictBase

import negcache_fn
from negcache_fn import distributed
from tests.support.processes import run_ranks
from tests.support.sharded_training import DIM, features

CAPACITY = 8 * 1024


def whole() -> TensorDictBase:
    state = negcache_fn.init_cache(CAPACITY, DIM, features(torch.zeros(1, dtype=torch.int64), torch.float32), seed=7)
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(CAPACITY - 50)
    return negcache_fn.update_(
        state, features(ids, torch.float32), torch.randn(len(ids), DIM, generator=generator), ids=ids
    )


def queries() -> torch.Tensor:
    return torch.randn(24, DIM, generator=torch.Generator().manual_seed(1))


def save_first(rank: int, world: int, *, folder: Path) -> None:
    group = dist.group.WORLD
    assert group is not None
    state = distributed.shard(whole(), group)
    distributed.save_checkpoint(
        folder, 5, {"cache": distributed.checkpointable(state, group), "note": "five"}, group=group
    )


def load_and_save(rank: int, world: int, *, folder: Path) -> tuple[Any, ...]:
    group = dist.group.WORLD
    assert group is not None
    example = features(torch.zeros(1, dtype=torch.int64), torch.float32)
    state = negcache_fn.init_cache(distributed.local_capacity(CAPACITY, group), DIM, example)
    saved = {"cache": distributed.checkpointable(state, group), "note": ""}
    step = distributed.load_checkpoint(folder, saved, group=group)
    assert step is not None
    distributed.save_checkpoint(folder, step + 1, saved, group=group)  # for the next number of ranks
    draw = negcache_fn.sample_gumbel(state, queries().view(world, -1, DIM)[rank], draws_per_query=2, group=group)
    return step, saved["note"], distributed.unshard(state, group), draw.slot


def test_four_two_one_three_eight(tmp_path: Path) -> None:
    expected = whole()
    drawn = negcache_fn.sample_gumbel(expected, queries(), draws_per_query=2).slot
    checkpoints = tmp_path / "checkpoints"
    run_ranks(4, {"case": (save_first, {"folder": checkpoints})}, _made(tmp_path / "4"))
    for number, world in enumerate((2, 1, 3, 8)):
        folder = _made(tmp_path / f"{world} after")
        of_ranks = run_ranks(world, {"case": (load_and_save, {"folder": checkpoints})}, folder)["case"]
        for step, note, state, _ in of_ranks:
            assert (step, note) == (5 + number, "five")
            assert bool((state == expected).all())
        assert torch.equal(torch.cat([slots for *_, slots in of_ranks]), drawn), world
    # Without a group as well.
    example = features(torch.zeros(1, dtype=torch.int64), torch.float32)
    state = negcache_fn.init_cache(CAPACITY, DIM, example)
    assert distributed.load_checkpoint(checkpoints, {"cache": distributed.checkpointable(state)}) == 9
    assert bool((state == expected).all())


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    value = torch.zeros(3)
    assert distributed.load_checkpoint(tmp_path, {"value": value}) is None
    for step in (1, 9, 10):
        distributed.save_checkpoint(tmp_path, step, {"value": value + step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10-save-3", "step-9-save-2"]
    assert distributed.load_checkpoint(tmp_path, {"value": value}) == 10
    assert value.tolist() == [10, 10, 10]
    with pytest.raises(ValueError, match="keep is 0"):
        distributed.save_checkpoint(tmp_path, 11, {"value": value}, keep=0)


def save_forever(rank: int, folder: str) -> None:
    """Checkpoints in which every number is that of the step."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    group = dist.group.WORLD
    assert group is not None
    state = negcache_fn.init_cache(distributed.local_capacity(64 * 1024, group), 32, torch.zeros(1, 8))
    for step in range(1, 10**6):
        state["items", "embedding"].fill_(step)
        state["items", "features"].fill_(step)
        saved = {"cache": distributed.checkpointable(state, group), "step": step}
        distributed.save_checkpoint(f"{folder}/checkpoints", step, saved, group=group)


def being_written(checkpoints: Path) -> bool:
    try:
        return any(checkpoints.glob("*.partial/*"))
    except FileNotFoundError:  # it got its name
        return False


@pytest.mark.parametrize("after_seconds", [0.0, 0.13])
def test_killed_while_it_saves(after_seconds: float, tmp_path: Path) -> None:
    workers = mp.start_processes(save_forever, (str(tmp_path),), nprocs=2, join=False, start_method="spawn")
    assert workers is not None
    checkpoints = tmp_path / "checkpoints"
    deadline = time.monotonic() + 90

    def assert_saving() -> None:
        workers.join(0)  # raises what a process that ended raised
        assert time.monotonic() < deadline, "the processes have stopped to save"

    try:
        while not list(checkpoints.glob("step-*[0-9]")):
            assert_saving()
            time.sleep(0.01)
        time.sleep(after_seconds)
        while not being_written(checkpoints):
            assert_saving()
    finally:
        for process in workers.processes:
            process.kill()
            process.join()
    state = negcache_fn.init_cache(64 * 1024, 32, torch.zeros(1, 8))
    saved = {"cache": distributed.checkpointable(state), "step": 0}
    step = distributed.load_checkpoint(checkpoints, saved)
    assert step is not None
    assert saved["step"] == step
    assert bool((state["items", "embedding"] == step).all())
    assert bool((state["items", "features"] == step).all())
    distributed.save_checkpoint(checkpoints, step + 1, saved)  # and clears up
    assert not list(checkpoints.glob("*.partial"))
