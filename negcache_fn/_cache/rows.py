"""Writing rows of a batch into slots of the cache."""

import torch
from torch import Tensor

from negcache_fn._features import moved
from negcache_fn._kernels import dispatch
from negcache_fn._operators import operator

__all__ = ["write_rows_"]


def write_rows_(columns: list[Tensor], values: list[Tensor], slots: Tensor) -> None:
    """Writes the rows `values` [M, ...] into each of the `columns` [C, ...], cast to their dtypes.

    All values are read before any is written, so they may be views of the columns.

    Args:
        columns: on any devices.
        values: one of each column.
        slots: [M] the slot of each row, all distinct, except for -1: the row is not written.
    """
    values = [rows.to(column.dtype) for rows, column in zip(values, columns, strict=True)]
    # A compiler makes a kernel of several writes; in a graph, the operator's columns might be copied.
    if not torch.compiler.is_compiling() and dispatch.writes_rows(columns, values, slots):
        return _write_rows_op(columns, values, slots)
    return _write_rows(columns, values, slots)


def _write_rows(columns: list[Tensor], values: list[Tensor], slots: Tensor) -> None:
    """A row without a slot repeats the write of a row with one; if there is none, all rewrite slot 0 as it is."""
    somewhere = slots >= 0
    source = torch.where(somewhere, torch.arange(slots.shape[0], device=slots.device), slots.argmax())
    places = slots[source].clamp(min=0), source, somewhere.any()
    to_write: list[tuple[Tensor, Tensor]] = []
    for column, rows in zip(columns, values, strict=True):
        slot, source, any_ = (moved(part, column.device) for part in places)
        to_write.append((slot, torch.where(any_, moved(rows, column.device)[source], column[:1])))
    for column, (slot, rows) in zip(columns, to_write, strict=True):
        column.index_copy_(0, slot, rows)


def _nothing(columns: list[Tensor], values: list[Tensor], slots: Tensor) -> None:
    """Of tensors that have no numbers none are written."""


@operator("write_rows", fake=_nothing, schema="(Tensor(a!)[] columns, Tensor[] values, Tensor slots) -> ()")
def _write_rows_op(columns: list[Tensor], values: list[Tensor], slots: Tensor) -> None:
    dispatch.write_rows(columns, values, slots)
    # As any operator of torch that writes into a tensor: a backward pass that needs what was there must notice.
    torch.autograd.graph.increment_version([column for column in columns if not column.is_inference()])
