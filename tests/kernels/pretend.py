"""A machine to build on, made up of environment variables, with a compiler that copies a build instead of making it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from negcache_fn._kernels.cpu import build
from negcache_fn._kernels.cpu.compiler import find_compiler
from negcache_fn._kernels.cpu.folder import Folder, candidates

load = build._load.__wrapped__  # as a new process would


def forget() -> None:
    """Lets the next call of `library` look again."""
    build.library.cache_clear()
    build._load.cache_clear()


def real_build() -> bytes:
    """The kernels of this machine, from wherever `library` has put them."""
    assert build.library() is not None
    name = f"cpu-{build._fingerprint(find_compiler())}"
    for path in candidates():
        with Folder(path) as folder:
            found = folder.find(name)
            if found is not None:
                return found.read_bytes()
    raise AssertionError("`library` found them, but not in a folder")


class Machine(NamedTuple):
    """Folders of the user, and a compiler."""

    root: Path
    patch: pytest.MonkeyPatch

    @property
    def cache(self) -> Path:
        return self.root / "cache" / "negcache_fn"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    def builds(self, folder: Path) -> list[Path]:
        return sorted(folder.glob("cpu-*.so"))

    def compilations(self) -> int:
        calls = self.root / "calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def set_compiler(self, commands: str = "", *, output: bytes | None = None, words: str = "") -> Path:
        """A shell script with these commands, then one that writes the output; CXX is the words and the script."""
        script = self.root / "compiler"
        copy = ""
        if output is not None:
            (self.root / "output").write_bytes(output)
            copy = f'while [ "$1" != -o ]; do shift; done\ncp "{self.root}/output" "$2"\n'
        script.write_text(f'#!/bin/sh\necho run >> "{self.root}/calls"\n{commands}\n{copy}')
        script.chmod(0o755)
        self.patch.setenv("CXX", f"{words} {script}".strip())
        return script


def pretend(root: Path, patch: pytest.MonkeyPatch, output: bytes) -> Machine:
    """A machine with an empty cache folder, and nothing that an earlier test has loaded."""
    machine = Machine(root, patch)
    machine.temporary.mkdir()
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    patch.setenv("HOME", str(root / "home"))
    patch.setattr(tempfile, "tempdir", str(machine.temporary))
    machine.set_compiler(output=output)
    return machine


def without(path: Path) -> str:
    """A path at which no folder can be made, whoever asks."""
    path.touch()
    return str(path)


def copied(folder: Path, name: str, content: bytes) -> Path:
    """A build of that content, stored as the library does."""
    with Folder(folder) as opened:
        path = folder.parent / "copy"
        path.write_bytes(content)
        return folder / opened.store(path, name).name
