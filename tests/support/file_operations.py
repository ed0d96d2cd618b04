"""What a program does to files, one operation at a time: to look at the disk before each, or to make one fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
_WATCHING: list[tuple[Path, Callable[[str], None]]] = []


@contextmanager
def before_each_operation(folder: Path, function: Callable[[str], None]) -> Iterator[None]:
    """Calls the function before each operation on what is in the folder, with the operation's name.

    What it does itself is not watched. If it raises, the operation fails with that. Operations: those that Python
    audits, and `fsync`.
    """
    if not _hooked:
        sys.addaudithook(_hook)  # for the life of the process
        _hooked.append(True)
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        _call("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    _WATCHING.append((folder.resolve(), function))
    try:
        with patch("os.fsync", watched):
            yield
    finally:
        _WATCHING.clear()


_hooked: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCHING or event not in _EVENTS or not arguments:
        return
    path, where = arguments[0], 1
    if event in ("os.remove", "os.rmdir") and len(arguments) > where and arguments[where] not in (-1, None):
        path = Path(os.readlink(f"/proc/self/fd/{arguments[where]}")) / os.fsdecode(path)
    if isinstance(path, (str, bytes, os.PathLike)):
        _call(event, Path(os.fsdecode(path)).absolute())


def _call(event: str, path: Path) -> None:
    if not _WATCHING:
        return
    folder, function = _WATCHING[-1]
    if folder in (path, *path.parents):
        _WATCHING.clear()
        try:
            function(event)
        finally:
            _WATCHING.append((folder, function))
