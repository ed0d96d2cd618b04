"""The command line of an example: its parser, the numbers it takes, and the exit status of what it runs.

Free of torch, so that ``--help`` answers at once and the processes that import a command line again start quickly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from examples.interruptions import InterruptedRunError

__all__ = ["FAILED", "INTERRUPTED", "CommandParser", "natural", "positive", "run"]

FAILED = 1
INTERRUPTED = 130
"""128 and the number of SIGINT, as shells report it."""


class CommandParser(argparse.ArgumentParser):
    """The parser of ``python -m examples.NAME``; its help shows defaults, and so does the help of its subcommands."""

    def __init__(self, name: str | None = None, **options: Any) -> None:
        if name is not None:
            options["prog"] = f"python -m examples.{name}"
        super().__init__(**{"formatter_class": _DefaultsShown, **options})


class _DefaultsShown(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default unless it is None or False, which say nothing to the reader."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def natural(text: str) -> int:
    """An argument of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def positive(text: str) -> int:
    """An argument of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def run(command: Callable[[argparse.Namespace], object], options: argparse.Namespace, *, resumes: bool = False) -> int:
    """Runs a command with its parsed options.

    Args:
        command: raises ``ValueError`` or ``FileNotFoundError`` where the user must change something.
        options: what the parser returned.
        resumes: whether the same command line continues an interrupted run; the message then says so.

    Returns:
        The exit status: 0, `FAILED` after an error, or `INTERRUPTED`. Errors and interruptions are one line on stderr.
    """
    try:
        command(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except (InterruptedRunError, KeyboardInterrupt):
        print("interrupted, run again to go on" if resumes else "interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
