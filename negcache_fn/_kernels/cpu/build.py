"""Builds the C++ kernels once with the machine's compiler, and loads them.

They need no header of torch, so building takes a few seconds and one build serves every version of torch.
(`torch.utils.cpp_extension.load` is not used: it also needs ninja, and a build that is killed leaves a lock that later
builds wait for.) If they cannot be built, or with NEGCACHE_FN_NATIVE=0 in the environment, plain torch computes the
same in two to three times the time.
"""

import ctypes
import functools
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.cpu.compiler import (
    BuildError,
    compile_units,
    describe_compiler,
    describe_cpu,
    find_compiler,
)
from negcache_fn._kernels.cpu.folder import Folder, candidates

__all__ = ["library"]

_FOLDER = Path(__file__).parent
_FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fvisibility=hidden", "-w"),
    f"-DNEGCACHE_BLOCK={BLOCK}",
)
_PATIENCE_SECONDS = 120.0  # for a build by this process or another
_EXPORTED = re.compile(rb"^\w+ (negcache_\w+)\(", re.MULTILINE)
_LOGGER = logging.getLogger(__name__)
_ONE_AT_A_TIME = threading.Lock()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if necessary; None, with one warning in the log, if they are not available."""
    with _ONE_AT_A_TIME:  # threads that come here together
        return _load()


@functools.cache
def _load() -> ctypes.CDLL | None:
    if os.environ.get("NEGCACHE_FN_NATIVE", "1") == "0":
        return None
    try:
        return _find_or_build()
    except (BuildError, OSError) as error:
        # In the log, and not by `warnings`: if those are errors, it would end a step that plain torch can run.
        _LOGGER.warning(
            "negcache_fn runs in plain torch on this CPU, two to three times slower, without its C++ kernels: %s. "
            "NEGCACHE_FN_NATIVE=0 silences this warning.",
            error,
        )
        return None


def _find_or_build() -> ctypes.CDLL:
    if os.name != "posix":
        raise BuildError("they are built on Linux and macOS only")
    deadline = time.monotonic() + _PATIENCE_SECONDS
    compiler = find_compiler()
    name = f"cpu-{_fingerprint(compiler)}"
    refused: list[str] = []
    for path in candidates():
        try:
            folder = Folder(path)
        except OSError as error:
            refused.append(f"{path}: {error.strerror or error}")
            continue
        with folder:
            found = folder.find(name)
            if found is not None:
                return _open(found, folder)
            if folder.is_writable():
                return _open(_build(compiler, folder, name, deadline), folder)
        refused.append(f"{path}: it cannot be written")
    raise BuildError(
        f"there is no folder to keep them in ({'; '.join(refused)}): set XDG_CACHE_HOME to a folder of yours"
    )


def _build(compiler: Sequence[str], folder: Folder, name: str, deadline: float) -> Path:
    """The path of the compiled kernels, compiled by this process unless another was first."""
    with folder.locked(name, deadline):
        found = folder.find(name)
        if found is not None:
            return found
        _LOGGER.info("building the CPU kernels in %s", folder.path)
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder.inside) as workplace:
            built = Path(workplace) / "built.so"
            compile_units(compiler, _FLAGS, _units(), built, deadline - time.monotonic())
            return folder.store(built, name)


def _open(path: Path, folder: Folder) -> ctypes.CDLL:
    """Loads a build, and sees that it has every function."""
    kernels = ctypes.CDLL(str(path))
    exported = [name.decode() for unit in _units() for name in _EXPORTED.findall(unit.read_bytes())]
    missing = [name for name in exported if not hasattr(kernels, name)]
    if missing:
        where = folder.path / path.name
        raise BuildError(f"{where} has no function {missing[0]}: set CXX to another compiler, or delete the file")
    return kernels


def _sources() -> list[Path]:
    """All compiled and included files."""
    return sorted(path for path in _FOLDER.iterdir() if path.suffix in (".cpp", ".h"))


def _units() -> list[Path]:
    return [source for source in _sources() if source.suffix == ".cpp"]


def _fingerprint(compiler: Sequence[str]) -> str:
    """A hash of everything the build depends on: machines of several kinds may share a home folder."""
    inputs = [part for source in _sources() for part in (source.name.encode(), source.read_bytes())]
    inputs += [os.fsencode(part) for part in (*describe_compiler(compiler), *_FLAGS, *describe_cpu())]
    return hashlib.sha256(b"\n".join(inputs)).hexdigest()[:16]
