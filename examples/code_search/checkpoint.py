"""Files that are whole or not there, and interruptions that wait for the end of a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

__all__ = ["InterruptFlag", "InterruptedRunError", "interruptions_deferred", "load", "save"]


class InterruptedRunError(Exception):
    """The run was asked to stop, and has saved what it had."""


def save(value: object, file: Path) -> None:
    """``torch.save`` beside the file, then into its place: who is stopped in between leaves the old one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".unfinished")
    torch.save(value, unfinished)
    os.replace(unfinished, file)


def load(file: Path) -> Any:
    """What was saved, tensors and plain values only; None where there is no such file."""
    return torch.load(file, weights_only=True) if file.exists() else None


class InterruptFlag:
    """Whether a signal has come."""

    def __init__(self) -> None:
        self.is_set = False


@contextmanager
def interruptions_deferred() -> Iterator[InterruptFlag]:
    """Turns the first SIGINT or SIGTERM into a flag; a second one acts as usual."""
    flag = InterruptFlag()
    previous: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def set_flag(_number: int, _frame: FrameType | None) -> None:
        flag.is_set = True
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, set_flag)
    try:
        yield flag
    finally:
        restore()
