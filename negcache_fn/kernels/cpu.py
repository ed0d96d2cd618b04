"""The CPU kernels of `cpu.cpp`: built once by the machine's C++ compiler, called through ctypes.

They need no header of torch, so that building takes a few seconds and one build serves every version of it. (That is
why `torch.utils.cpp_extension.load` is not used: it needs ninja besides, and a build that is killed leaves a lock that
later ones wait for.) Where there is no compiler, or with NEGCACHE_FN_NATIVE=0 in the environment, plain torch computes
the same, in two to three times the time.
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
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "block_logsumexp",
    "find_slots",
    "finds_hardest",
    "hardest",
    "library",
    "lowest",
    "score_blocks",
    "supports",
    "supports_scans",
]

_SOURCE = Path(__file__).with_name("cpu.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w")
_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FEW_QUERIES = 64  # up to so many, rearranging the embeddings into tiles takes longer than tiles save
_BLOCK = 64
_MOST_HARDEST = 1024  # above it, candidates take more memory than they save time
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


def supports(queries: Tensor, embeddings: Tensor) -> bool:
    """Whether the kernels take these: CPU, float32 queries, contiguous float32, bfloat16 or float16 embeddings."""
    return (
        queries.device.type == "cpu"
        and queries.dtype == torch.float32
        and embeddings.dtype in _STORAGE
        and embeddings.is_contiguous()
        and library() is not None
    )


def finds_hardest(n: int) -> bool:
    """Whether `hardest` is there, for `n` documents per query."""
    return n <= _MOST_HARDEST


def block_logsumexp(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None
) -> Tensor:
    """[B, ceil(C / BLOCK)]: the log-sum-exp of every block of scores; arguments as the fields of `ScoreMatrix`."""
    out = queries.new_empty(queries.shape[0], -(-embeddings.shape[0] // _BLOCK))
    problem = _problem(queries, embeddings, bias, excluded, max_score)
    _call("negcache_block_logsumexp", *problem, *_arithmetic(queries, embeddings), out)
    return out


def score_blocks(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None, blocks: Tensor
) -> Tensor:
    """[B, m, BLOCK]: the scores in the blocks [B, m], read where they lie."""
    out = queries.new_empty(*blocks.shape, _BLOCK)
    problem = _problem(queries, embeddings, bias, excluded, max_score)
    _call("negcache_score_blocks", *problem, blocks.contiguous(), blocks.shape[1], out)
    return out


def hardest(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None, n: int
) -> tuple[Tensor, Tensor]:
    """The `n` highest scores of each query and their slots, ties by slot; (-inf, -1) if there are fewer."""
    scores = queries.new_empty(queries.shape[0], n)
    slots = torch.empty_like(scores, dtype=torch.int64)
    problem = _problem(queries, embeddings, bias, excluded, max_score)
    _call("negcache_hardest", *problem, *_arithmetic(queries, embeddings), n, scores, slots)
    return scores, slots


def supports_scans(key: Tensor) -> bool:
    """Whether `lowest` and `find_slots` take tensors like this one."""
    return key.device.type == "cpu" and library() is not None


def lowest(key: Tensor, skip: Tensor, n: int) -> Tensor:
    """[n] slots of the smallest `key` [C], ascending, ties by slot, without those to skip [C]; -1 if too few."""
    slots = key.new_empty(n)
    _call("negcache_lowest", key.contiguous(), skip.contiguous(), key.shape[0], n, slots)
    return slots


def find_slots(ids: Tensor, cached: Tensor, embedded_at: Tensor) -> Tensor:
    """[P] the live slot of each id [P] among those cached [C], -1 where it is not there."""
    slots = torch.empty_like(ids)
    known = (cached.contiguous(), embedded_at.contiguous(), cached.shape[0])
    _call("negcache_find_slots", ids.contiguous(), ids.shape[0], *known, slots)
    return slots


@functools.cache
def _multiplies_tiles() -> bool:
    kernels = library()
    return kernels is not None and bool(kernels.negcache_has_amx())


def _arithmetic(queries: Tensor, embeddings: Tensor) -> tuple[ctypes.c_int, ctypes.c_int]:
    """Whether to multiply by tiles; of how many bfloat16 parts, as `torch.set_float32_matmul_precision` asks."""
    tiles = queries.shape[0] > _FEW_QUERIES and _multiplies_tiles()
    parts = {"highest": 3, "high": 2, "medium": 1}[torch.get_float32_matmul_precision()]
    if embeddings.dtype == torch.float16:
        parts = max(parts, 2)  # one bfloat16 has less precision than what is stored
    return ctypes.c_int(tiles), ctypes.c_int(parts)


_Argument: TypeAlias = Tensor | ctypes.c_int | int | None


def _problem(
    queries: Tensor, embeddings: Tensor, bias: Tensor, excluded: Tensor, max_score: Tensor | None
) -> tuple[_Argument, ...]:
    return (
        embeddings,
        ctypes.c_int(_STORAGE[embeddings.dtype]),
        embeddings.shape[0],
        embeddings.shape[1],
        queries.contiguous(),
        queries.shape[0],
        bias.contiguous(),
        excluded.contiguous(),
        excluded.shape[1],
        None if max_score is None else max_score.contiguous(),
    )


def _call(name: str, *arguments: _Argument) -> None:
    """Calls a kernel: tensors as pointers to their first element (None as a null pointer), integers as int64."""
    converted = [
        ctypes.c_void_p(None if argument is None else argument.data_ptr())
        if argument is None or isinstance(argument, Tensor)
        else ctypes.c_int64(argument)
        if isinstance(argument, int)
        else argument
        for argument in arguments
    ]
    kernels = library()
    if kernels is None:
        raise RuntimeError("the CPU kernels are not available: ask `supports` first")
    kernels[name](*converted)


def _build(compiler: str) -> Path:
    """The path of the compiled kernels. A build has a name of its own until it is whole, so that none is seen half."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "negcache_fn"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="negcache_fn_"))
    path = folder / f"cpu-{_fingerprint(compiler)}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as workplace:
            built = Path(workplace) / path.name
            subprocess.run([compiler, *_FLAGS, "-o", str(built), str(_SOURCE)], check=True, capture_output=True)
            built.replace(path)
    return path


def _fingerprint(compiler: str) -> str:
    """Of all that the build depends on: a home folder may be shared by machines of several kinds."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    features = next((line for line in lines if line.startswith("flags")), "")
    parts = [_SOURCE.read_text(), compiler, *_FLAGS, platform.platform(), features]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
