"""Builds the C++ kernels once with the machine's compiler, and loads them.

They need no header of torch, so building takes a few seconds and one build serves every version of torch.
(`torch.utils.cpp_extension.load` is not used: it also needs ninja, and a build that is killed leaves a lock that later
builds wait for.) Without a compiler, or with NEGCACHE_FN_NATIVE=0 in the environment, plain torch computes the same in
two to three times the time.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from negcache_fn._kernels.blocks import BLOCK

__all__ = ["library"]

_FOLDER = Path(__file__).parent
_FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fvisibility=hidden", "-w"),
    f"-DNEGCACHE_BLOCK={BLOCK}",
)
_LOGGER = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if need be; None where they cannot be had."""
    if os.environ.get("NEGCACHE_FN_NATIVE", "1") == "0":
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        _LOGGER.info("no C++ compiler: the streaming passes run in plain torch")
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        _LOGGER.info("the CPU kernels could not be built, the streaming passes run in plain torch: %s", error)
        return None


def _build(compiler: str) -> Path:
    """The path of the compiled kernels. A build is renamed to it when complete, so that nobody loads half of one."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "negcache_fn"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="negcache_fn_"))
    path = folder / f"cpu-{_fingerprint(compiler)}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as workplace:
            built = Path(workplace) / path.name
            units = [str(source) for source in _sources() if source.suffix == ".cpp"]
            subprocess.run([compiler, *_FLAGS, "-o", str(built), *units], check=True, capture_output=True)
            built.replace(path)
    return path


def _sources() -> list[Path]:
    """All that is compiled or included."""
    return sorted(path for path in _FOLDER.iterdir() if path.suffix in (".cpp", ".h"))


def _fingerprint(compiler: str) -> str:
    """Covers all that the build depends on: machines of several kinds may share a home folder."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    features = next((line for line in lines if line.startswith("flags")), "")
    sources = [part for source in _sources() for part in (source.name, source.read_text())]
    parts = [*sources, compiler, *_FLAGS, platform.platform(), features]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
