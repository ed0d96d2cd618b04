"""A small training run that is killed again and again, and goes on from its checkpoints.

    python -m tests.support.killed_training FOLDER KILLS

Each life is a fork of one process that has everything imported. It saves every step twice, and in some lives no file
may grow beyond some size, as on a full disk.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import negcache_fn
from negcache_fn import distributed

ROWS, DIM, BATCH = 256, 8, 8


class Run:
    """Two towers, an optimiser, a cache."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.rows = torch.randn(ROWS, 6)
        self.towers = torch.nn.ModuleList([torch.nn.Linear(6, DIM) for _ in range(2)])
        self.optimizer = torch.optim.Adam(self.towers.parameters(), lr=0.01)
        self.state = negcache_fn.init_cache(1024, DIM, self.rows[:1], seed=3)
        self.step = 0
        self.train()  # makes the optimiser's moments
        self.first = self.step

    def train(self) -> None:
        rows = torch.arange(BATCH * self.step, BATCH * (self.step + 1)) % ROWS
        queries, encode = self.towers[0](self.rows[rows]), self.towers[1]
        out = negcache_fn.step_(self.state, queries, self.rows[rows], encode, scale=2.0, ids=rows)
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def saved(self) -> dict[str, Any]:
        return {
            "towers": self.towers.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "cache": distributed.checkpointable(self.state),
            "step": self.step,
        }

    def save(self, folder: Path) -> None:
        distributed.save_checkpoint(folder, self.step, self.saved(), identity={"rows": ROWS})

    def load(self, folder: Path) -> None:
        saved = self.saved()
        step = distributed.load_checkpoint(folder, saved, identity={"rows": ROWS})
        if step is not None:
            assert saved["step"] == step
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = step


def live(run: Run, folder: Path, largest: int | None, started: int) -> None:
    """Until it is killed; tells when it starts a save."""
    os.write(started, b".")
    run.load(folder)
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    while True:
        run.train()
        for _ in range(2):
            os.write(started, b".")
            with suppress(*(() if largest is None else (OSError, RuntimeError))):
                run.save(folder)


def main(folder: Path, kills: int, seed: int = 0) -> tuple[int, int]:
    """Kills so many lives, and lets one more load: the number of steps it has, and of kills that a save survived."""
    chance, run, inside = random.Random(seed), Run(), 0
    for _ in range(kills):
        largest = chance.choice([None, None, None, 1000, 40_000])
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                live(run, folder, largest, writing)
            except BaseException as error:
                print(f"a life ended by itself: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os.close(writing)
        for _ in range(chance.randint(1, 5)):  # loading, the first save, ...
            os.read(reading, 1)
        time.sleep(0.05 * chance.random() ** 2)
        os.kill(child, signal.SIGKILL)
        os.close(reading)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "a life ended by itself"
        inside += bool(list(folder.glob("*.partial")))
    run.load(folder)
    whole = Run()
    while whole.step < run.step:
        whole.train()
    for name, value in flat(whole.saved()).items():
        assert torch.equal(torch.as_tensor(flat(run.saved())[name]), torch.as_tensor(value)), name
    return run.step - run.first, inside


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Tensors and numbers by path."""
    if not isinstance(value, (dict, list)):
        return {name: value} if isinstance(value, (torch.Tensor, int, float)) else {}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: leaf for key, child in items for path, leaf in flat(child, f"{name}/{key}").items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps, while_saving = main(Path(sys.argv[1]), int(sys.argv[2]))
    print(f"{steps} steps, {while_saving} kills while it saved")
