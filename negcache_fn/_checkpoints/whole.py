"""Saves that several ranks write and read together: complete on all ranks, or absent."""

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
    """Another save in a folder, which all ranks share.

    Args:
        folder: folder of the saves.
        step: number of the step.
        write: writes this rank's files into a folder, and returns their names.
        about: the entry of the save in the manifest.
        group: the ranks; None: this process alone.
        task: the task that fails if a rank fails, for the message.

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
    """The manifest of a save and its problems, the same on every rank; each rank reads some of its files."""
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
    """A failed removal does not stop a run whose checkpoint was saved."""
    try:
        discard(path)
    except OSError as error:
        warnings.warn(f"{path} could not be removed: {error}", stacklevel=3)
