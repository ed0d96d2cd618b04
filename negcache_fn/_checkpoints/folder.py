"""A folder of saves. Each save is complete or absent.

A save is a folder `step-<step>-save-<number>`. It is written under that name and `.partial`; when all of its files are
on the disk, `manifest.json` is written, with their sizes and checksums, and the folder gets its name. So one rename
makes a save appear, and one rename back to `.partial` removes it. It never replaces another: saves are numbered in
their order, and the newest is the one made last, for any step number.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

__all__ = ["Save", "begin", "damage", "discard", "finish", "made_plain", "read_manifest", "saves_in", "sums"]

_NAME = re.compile(r"step-(\d+)-save-(\d+)")
_PARTIAL = ".partial"
_MANIFEST = "manifest.json"
_CHUNK = 2**20  # bytes that are read at a time

Sums = dict[str, list[int]]  # of each file, its size and checksum


class Save(NamedTuple):
    """One of a folder."""

    number: int
    step: int
    path: Path


def saves_in(folder: Path) -> list[Save]:
    """Of a folder, which need not exist, oldest first."""
    found = [(match, path) for path in _entries(folder) if (match := _NAME.fullmatch(path.name))]
    return sorted(Save(int(match[2]), int(match[1]), path) for match, path in found)


def begin(folder: Path, step: int) -> Path:
    """Makes the partial folder of a new save, and clears the remains of interrupted ones."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max((save.number for save in saves_in(folder)), default=0)
    for path in _entries(folder):
        if path.name.endswith(_PARTIAL) and _NAME.fullmatch(path.name.removesuffix(_PARTIAL)):
            shutil.rmtree(path)
    partial = folder / f"step-{step}-save-{number}{_PARTIAL}"
    partial.mkdir()
    return partial


def sums(folder: Path, names: Iterable[str], *, sync: bool = False) -> Sums:
    """Size and checksum of each file. With `sync`, it is on the disk when the function returns."""
    found: Sums = {}
    for name in names:
        with (folder / name).open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            size, checksum = 0, 0
            while chunk := file.read(_CHUNK):
                size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
        found[name] = [size, checksum]
    return found


def finish(partial: Path, about: dict[str, Any], files: Sums) -> Path:
    """Gives a partial folder, in which all files are, its name.

    Args:
        partial: as `begin` made it.
        about: the entry of the save in the manifest.
        files: their checksums, from the ranks that wrote them.
    """
    for name, (size, _) in files.items():
        if not (partial / name).exists() or (partial / name).stat().st_size != size:
            raise OSError(f"{partial / name} is not here as it was written; expected a folder that all ranks share")
    manifest = {"about": about, "files": files}
    with (partial / _MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"manifest": manifest, "checksum": _checksum(manifest)}, file)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    path = partial.with_name(partial.name.removesuffix(_PARTIAL))
    partial.rename(path)
    _sync(path.parent)
    return path


def discard(path: Path) -> None:
    """Removes a save, complete or partial: first its name, in one rename, then its files."""
    if not path.name.endswith(_PARTIAL):
        path = path.rename(path.with_name(path.name + _PARTIAL))
    shutil.rmtree(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a save, `about` and `files`.

    Raises:
        ValueError: it is missing, or has changed since it was written.
    """
    try:
        found = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        manifest, checksum = cast("dict[str, Any]", found["manifest"]), found["checksum"]
    except FileNotFoundError as error:
        raise ValueError(f"{path} has no {_MANIFEST}") from error
    except (ValueError, KeyError, TypeError) as error:  # a decoding error is a ValueError too
        raise ValueError(f"{path / _MANIFEST} is not as it was written") from error
    if _checksum(manifest) != checksum:
        raise ValueError(f"{path / _MANIFEST} is not as it was written")
    return manifest


def damage(path: Path, files: Sums) -> list[str]:
    """The problems with files of a save; none, if they are as they were written."""
    told: list[str] = []
    for name, expected in files.items():
        try:
            found = sums(path, [name])[name]
        except FileNotFoundError:
            told.append(f"{name} is not there")
            continue
        if found[0] != expected[0]:
            told.append(f"{name} has {found[0]} bytes; expected {expected[0]}")
        elif found[1] != expected[1]:
            told.append(f"{name} is not as it was written")
    return told


def made_plain(name: str, value: Any) -> Any:
    """A value as JSON returns it.

    Raises:
        TypeError: JSON cannot represent it; the error uses the name.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {value!r}; expected numbers, strings, lists and dicts of them: {error}") from error


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _checksum(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _sync(folder: Path) -> None:
    """Writes the names in a folder to the disk."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
