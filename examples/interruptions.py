"""SIGINT and SIGTERM: put off to the end of a step, treated alike, or left to the parent process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = [
    "InterruptFlag",
    "InterruptedRunError",
    "interruptions_deferred",
    "leave_interrupts_to_parent",
    "termination_interrupts",
]


class InterruptedRunError(Exception):
    """The run was asked to stop, and has saved what it had."""


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


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def leave_interrupts_to_parent() -> None:
    """For a worker process: a terminal sends SIGINT to it too, but its parent decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
