"""A program that stops at any operation leaves the checkpoint before, or the new one, whole."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from negcache_fn import distributed
from tests.support.file_operations import before_each_operation

KILLS = int(os.environ.get("NEGCACHE_FN_KILLS", "20"))
SIZE = 3000
STEPS = (4, 5, 5, 2)  # the same again, and a lower one


def values(number: int) -> dict[str, Any]:
    """What the save of this number holds."""
    return {"tensor": torch.full((SIZE,), float(number)), "number": number, "nested": {"half": torch.ones(3) * number}}


def loaded(folder: Path) -> tuple[int | None, int]:
    """The step and the number of what is loaded, whose parts all belong together."""
    found = values(-1)
    step = distributed.load_checkpoint(folder, found)
    number = found["number"]
    for name, value in values(number).items():
        if name != "nested":
            assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value))
    assert found["nested"]["half"].tolist() == [number] * 3
    return step, number


def test_stopped_before_any_operation(tmp_path: Path) -> None:
    folder, copies = tmp_path / "checkpoints", tmp_path / "copies"
    stopped: list[tuple[int, str]] = []

    def stop(operation: str) -> None:
        if folder.exists():
            shutil.copytree(folder, copies / str(len(stopped)))
        else:
            (copies / str(len(stopped))).mkdir(parents=True)
        stopped.append((number, operation))

    for number, step in enumerate(STEPS):
        with before_each_operation(folder, stop):
            distributed.save_checkpoint(folder, step, values(number), keep=1)
        assert len(list(folder.iterdir())) == 1
    assert {name for _, name in stopped} >= {"open", "fsync", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
    assert len(stopped) > 20 * len(STEPS)
    for place, (number, operation) in enumerate(stopped):
        copy = copies / str(place)
        step, found = loaded(copy)
        before = (None, -1) if number == 0 else (STEPS[number - 1], number - 1)
        assert (step, found) in (before, (STEPS[number], number)), (number, operation)
        if place % 3 == 0:
            distributed.save_checkpoint(copy, 3, values(77), keep=1)  # a run goes on, and clears up
            assert loaded(copy) == (3, 77)
            assert len(list(copy.iterdir())) == 1


def test_a_name_is_given_when_all_is_on_the_disk(tmp_path: Path) -> None:
    """Without this a power failure leaves files of the right names without their bytes."""
    synced: set[str] = set()
    at_rename: list[set[str]] = []
    fsync, rename = os.fsync, Path.rename

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.path.realpath(f"/proc/self/fd/{descriptor}"))

    def renaming(path: Path, target: Path) -> Path:
        if path.is_dir():
            at_rename.append({str(file) for file in (path, *path.iterdir())} - synced)
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("os.fsync", noting)
        patched.setattr(Path, "rename", renaming)
        distributed.save_checkpoint(tmp_path, 1, values(1))
    assert at_rename == [set()]
    assert str(tmp_path) in synced


@pytest.mark.filterwarnings("ignore:.* could not be removed")
def test_any_operation_may_fail(tmp_path: Path) -> None:
    """A full disk: an OSError, and the older checkpoint is there; the next save succeeds."""
    folder = tmp_path / "checkpoints"
    operations: list[str] = []
    with before_each_operation(folder, operations.append):
        distributed.save_checkpoint(folder, 0, values(0))
    expected, outcomes = (0, 0), {True: 0, False: 0}
    for failing in range(1, len(operations) + 1):
        left = [failing]

        def full(operation: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        saved = True
        with before_each_operation(folder, full):
            try:
                distributed.save_checkpoint(folder, failing, values(failing))
            except OSError:
                saved = False
        outcomes[saved] += 1
        before, expected = expected, (failing, failing)
        assert loaded(folder) in ((expected,) if saved else (before, expected)), operations[failing - 1]
        expected = loaded(folder)
    assert outcomes[False] > 15
    distributed.save_checkpoint(folder, 300, values(300))
    assert loaded(folder) == (300, 300)
    assert len(list(folder.iterdir())) == 2


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Where a write fails in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_write_may_fail_in_the_middle(size: int, tmp_path: Path) -> None:
    distributed.save_checkpoint(tmp_path, 1, values(1))
    with files_up_to(size), pytest.raises((OSError, RuntimeError)):
        distributed.save_checkpoint(tmp_path, 2, values(2))
    assert loaded(tmp_path) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1-save-1"]
    distributed.save_checkpoint(tmp_path, 2, values(2))
    assert loaded(tmp_path) == (2, 2)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A training run that is killed again and again is the undisturbed one, bit for bit."""
    command = [sys.executable, "-m", "tests.support.killed_training", str(tmp_path / "checkpoints"), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600)
    assert done.returncode == 0, done.stderr
    steps, while_saving = (int(number) for number in re.findall(r"\d+", done.stdout))
    assert steps >= 1
    assert while_saving >= 1
