"""Saves that several ranks write and read together: on all ranks whole, or not there."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from negcache_fn._checkpoints.folder import Save, begin, damage, discard, finish, read_manifest, sums
from negcache_fn._ranks.group import ranks_of
from negcache_fn._ranks.outcomes import of_all_ranks

__all__ = ["examine", "remove", "write_whole"]


def write_whole(
    folder: Path,
    step: int,
    write: Callable[[Path], list[str]],
    about: dict[str, Any],
    group: dist.ProcessGroup | None,
    task: str,
) -> Path:
    """A further save in a folder, which all ranks share.

    Args:
        folder: of saves.
        step: its number.
        write: writes this rank's files into a folder, and gives their names.
        about: what the manifest says of the save.
        group: the ranks; None: this process alone.
        task: what fails if a rank does, for the message.

    Returns:
        The folder of the save.

    Raises:
        OSError, ValueError, RuntimeError: on every rank, if one of them fails; nothing of the save is left.
    """
    leads = ranks_of(group).rank == 0
    partial = of_all_ranks(group, task, lambda: begin(folder, step) if leads else None)[0]
    assert partial is not None
    try:
        names = write(partial)
        parts = of_all_ranks(group, task, lambda: sums(partial, names, sync=True))
        files = {name: found for part in parts for name, found in part.items()}
        path = of_all_ranks(group, task, lambda: finish(partial, about, files) if leads else None)[0]
    except Exception:
        if leads and partial.exists():
            remove(partial)
        raise
    assert path is not None
    return path


def examine(save: Save, group: dist.ProcessGroup | None, task: str) -> tuple[dict[str, Any], list[str]]:
    """The manifest of a save and what is wrong with it, the same on every rank; each reads some of its files."""
    ranks = ranks_of(group)

    def found() -> tuple[dict[str, Any], list[str]]:
        try:
            manifest = read_manifest(save.path)
        except ValueError as error:
            return {}, [str(error)]
        names = sorted(manifest["files"])[ranks.rank :: ranks.size]
        return manifest, damage(save.path, {name: manifest["files"][name] for name in names})

    of_ranks = of_all_ranks(group, task, found)
    return of_ranks[0][0], sorted({text for _, told in of_ranks for text in told})


def remove(path: Path) -> None:
    """What cannot be removed is no reason to stop a run whose checkpoint is there."""
    try:
        discard(path)
    except OSError as error:
        warnings.warn(f"{path} could not be removed: {error}", stacklevel=3)
