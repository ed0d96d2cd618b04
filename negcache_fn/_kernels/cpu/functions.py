"""The C++ functions through ctypes: tensors as pointers to their first elements, integers as int64."""

import ctypes
import functools
from typing import Any

from negcache_fn._kernels.cpu.build import library

__all__ = ["PassedProblem", "function", "run"]


class PassedProblem(ctypes.Structure):
    """The same fields, in the same order, as `Problem` in `problem.h`."""

    _fields_ = (
        ("embeddings", ctypes.c_void_p),
        ("storage", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("queries", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("excluded", ctypes.c_void_p),
        ("exclusions", ctypes.c_int64),
        ("max_score", ctypes.c_void_p),
        ("row_labels", ctypes.c_void_p),
        ("slot_labels", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
    )


_IN, _TENSOR, _SIZE, _INT = ctypes.POINTER(PassedProblem), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_NO_MEMORY = 2
_ARGUMENTS = {
    "negcache_has_amx": (),
    "negcache_score_blocks": (_IN, _TENSOR, _SIZE, _TENSOR),
    "negcache_block_logsumexp": (_IN, _INT, _INT, _TENSOR),
    "negcache_blocks_and_sums": (_IN, _INT, _INT, _TENSOR, _TENSOR, _TENSOR),
    "negcache_slot_masses": (_IN, _INT, _INT, _TENSOR, _TENSOR, _TENSOR),
    "negcache_logsumexp": (_TENSOR, _SIZE, _SIZE, _TENSOR),
    "negcache_sum_of_rows": (_TENSOR, _TENSOR, _SIZE, _SIZE, _TENSOR),
    "negcache_hardest": (_IN, _INT, _INT, _SIZE, _TENSOR, _TENSOR),
    "negcache_lowest": (_TENSOR, _TENSOR, _SIZE, _SIZE, _TENSOR),
    "negcache_find_slots": (_TENSOR, _SIZE, _TENSOR, _TENSOR, _SIZE, _TENSOR),
    "negcache_last_of_each": (_TENSOR, _SIZE, _TENSOR),
    "negcache_bias_without": (_TENSOR, _SIZE, _TENSOR, _TENSOR, _TENSOR, _SIZE, _TENSOR),
    "negcache_assign_slots": (_TENSOR, _TENSOR, _SIZE, _TENSOR, _TENSOR, _TENSOR, _SIZE, _TENSOR),
    "negcache_write_rows": (_TENSOR, _SIZE, _TENSOR, _SIZE),
    "negcache_uniform": (_SIZE, _SIZE, _TENSOR, _TENSOR, _SIZE, _SIZE, _TENSOR),
    "negcache_choose_groups": (
        *(_SIZE, _SIZE, _SIZE, _TENSOR, _SIZE, _SIZE, _TENSOR, _SIZE, _SIZE, _SIZE),
        *(_TENSOR, _TENSOR, _TENSOR, _TENSOR),
    ),
    "negcache_choose_children": (
        *(_SIZE, _SIZE, _SIZE, _TENSOR, _TENSOR, _TENSOR, _SIZE, _SIZE),
        *(_TENSOR, _TENSOR),
    ),
    "negcache_largest_groups": (
        *(_SIZE, _SIZE, _SIZE, _TENSOR, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE),
        *(_TENSOR, _TENSOR, _TENSOR),
    ),
    "negcache_largest_children": (
        *(_SIZE, _SIZE, _SIZE, _TENSOR, _SIZE, _SIZE, _SIZE, _TENSOR, _TENSOR, _SIZE),
        *(_TENSOR, _TENSOR, _TENSOR),
    ),
}


def run(name: str, *arguments: Any) -> int:
    """The status that a kernel returns, see `failure.h`."""
    status = function(name)(*arguments)
    if status == _NO_MEMORY:
        raise MemoryError(f"{name} ran out of memory; it needs less for fewer rows at a time")
    return status


def function(name: str) -> Any:
    """The function of that name, with the types of its arguments."""
    kernels = library()
    if kernels is None:
        raise RuntimeError("the CPU kernels are not available: ask `supports` first")
    return _typed(kernels, name)


@functools.cache
def _typed(kernels: ctypes.CDLL, name: str) -> Any:
    function = kernels[name]
    function.argtypes = _ARGUMENTS[name]
    return function
