"""Files and folders that are complete or absent, wherever the program that writes them is stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written_whole"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file or a folder to; it moves to ``path`` when the block ends without error.

    A file replaces the file that is there. A folder must not be there yet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    yield unfinished
    os.replace(unfinished, path)
