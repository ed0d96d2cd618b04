"""The main job on two processes: it trains what one process trains, and survives the death of one of them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import negcache_fn
from examples.code_search.corpus import load_or_harvest
from examples.code_search.data import Data
from examples.code_search.features import rows_of
from examples.code_search.methods import METHODS
from examples.code_search.run import Options, Run
from examples.code_search.workers import Workers
from negcache_fn import distributed

STEPS, SLOTS, DIM, BATCH = 24, 3072, 32, 4
SECONDS = 180


def start(installation: Path, out: Path) -> subprocess.Popen[str]:
    options = f"--steps={STEPS} --cache-size={SLOTS} --embedding-dim={DIM} --batch-size={BATCH} --draws-per-query=2"
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=2 -m examples.code_search train"
    command = [sys.executable, *torchrun.split(), f"--root={installation}", f"--out={out}", *options.split()]
    return subprocess.Popen(
        [*command, "--evaluate-every=4"], stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def undisturbed(installation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    finish(start(installation, out))
    return out


def result(out: Path, example: Any) -> tuple[dict[str, Any], Any]:
    """What the last checkpoint holds: model, optimisers and numbers; the whole cache."""
    cache = negcache_fn.init_cache(SLOTS, DIM, example)
    saved: dict[str, Any] = {"run": b"", "cache": distributed.checkpointable(cache)}
    assert distributed.load_checkpoint(out / "cache" / "checkpoints", saved) == STEPS
    return torch.load(io.BytesIO(saved["run"]), weights_only=True), cache


def data_of(installation: Path, out: Path) -> Data:
    return Data(load_or_harvest([installation], out / "corpus.npz", mask_names=False))


def test_two_processes_train_what_one_trains(installation: Path, undisturbed: Path, tmp_path: Path) -> None:
    data = data_of(installation, undisturbed)
    method = next(method for method in METHODS if method.cached)
    options = Options(embedding_dim=DIM, batch_size=BATCH, cache_size=SLOTS, draws_per_query=2, evaluate_every=100)
    run = Run(method, options, data, tmp_path)
    run.train(STEPS)
    saved, cache = result(undisturbed, rows_of(data.documents, slice(0, 1)))
    for row, expected in zip(saved["history"], run.history, strict=True):
        for name in ("loss", "exact_loss", "drift", "occupancy", "effective_sample_size", "scale"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (row["step"], name)
    assert run.cache is not None
    for name in ("id", "embedded_at", "inserted_at"):
        assert torch.equal(cache["items", name], run.cache["items", name])
    torch.testing.assert_close(cache["items", "embedding"], run.cache["items", "embedding"], rtol=1e-3, atol=1e-4)


def test_a_killed_process_costs_nothing_but_time(installation: Path, undisturbed: Path, tmp_path: Path) -> None:
    process = start(installation, tmp_path)
    deadline = time.monotonic() + SECONDS
    while not list((tmp_path / "cache" / "checkpoints").glob("step-8-save-*[0-9]")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    finish(process)
    example = rows_of(data_of(installation, undisturbed).documents, slice(0, 1))
    (found, found_cache), (expected, expected_cache) = result(tmp_path, example), result(undisturbed, example)
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    assert bool((found_cache == expected_cache).all())
    rows = [json.loads(line) for line in (tmp_path / "cache" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected["history"]]


def test_a_folder_of_another_run_is_started_over(
    installation: Path, tmp_path: Path, group_of_one: dist.ProcessGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer steps than are there, another seed, another size: nothing of it is taken, and what is saved is found."""
    data = Data(load_or_harvest([installation], tmp_path / "corpus.npz", mask_names=False))
    method = next(method for method in METHODS if method.cached)

    def trained(folder: str, steps: int, **changed: int) -> Run:
        given = {"embedding_dim": 8, "batch_size": 2, "cache_size": 1024, "draws_per_query": 1, "evaluate_every": 2}
        run = Run(method, Options(**given | changed), data, tmp_path / folder, Workers(group_of_one, 0, 1))
        run.train(steps)
        return run

    trained("shared", 6)
    for name, steps, changed in (("fewer", 4, {}), ("seed", 2, {"seed": 1}), ("size", 2, {"cache_size": 2048})):
        again, alone = trained("shared", steps, **changed), trained(name, steps, **changed)
        assert "starting over" in capsys.readouterr().out, name
        assert again.cache is not None
        assert alone.cache is not None
        assert bool((again.cache == alone.cache).all()), name
        assert [row["loss"] for row in again.history] == [row["loss"] for row in alone.history]
        resumed = trained("shared", steps, **changed)
        assert resumed.step == steps
        assert resumed.cache is not None
        assert bool((resumed.cache == alone.cache).all()), name
