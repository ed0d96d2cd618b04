"""The call of the kernel that writes rows."""

import ctypes

from torch import Tensor

from negcache_fn._kernels.cpu.build import library
from negcache_fn._kernels.cpu.functions import run

__all__ = ["supports", "write_rows"]


def supports(columns: list[Tensor], values: list[Tensor], slots: Tensor) -> bool:
    """Whether it takes them: all on the CPU, contiguous columns."""
    return (
        slots.is_cpu
        and all(column.is_cpu and column.is_contiguous() for column in columns)
        and all(rows.is_cpu for rows in values)
        and library() is not None
    )


def write_rows(columns: list[Tensor], values: list[Tensor], slots: Tensor) -> None:
    """Writes rows [M, ...] into the slots [M] of each of the columns [C, ...], of the same dtypes; -1: into none."""
    count, slots = slots.shape[0], slots.contiguous()
    if count == 0:
        return
    values = [rows.contiguous() for rows in values]
    fields = [
        number
        for column, rows in zip(columns, values, strict=True)
        for number in (column.data_ptr(), rows.data_ptr(), rows.nbytes // count)
    ]
    run("negcache_write_rows", (ctypes.c_int64 * len(fields))(*fields), len(columns), slots.data_ptr(), count)
