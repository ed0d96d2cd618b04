"""Storage dtypes: the one place that defines how a cache stores embeddings and which kernels read them.

`STORAGES` is the table of them. A new storage dtype needs:

- a row in `STORAGES`, and `encode` and `decode` if a plain cast is not enough: every other module reads and writes rows
  through these two;
- for the C++ kernels: a number, a case for it in `with_storage` (`_kernels/cpu/problem.h`), a `load` of its numbers
  (`vectors.h`), and the number of bfloat16 parts that hold one exactly (`kExactParts` in `by_tiles.h`);
- for the Triton kernel: `triton=True`, an entry for its element size in `_TUNED`
  (`_kernels/triton/block_logsumexp.py`), and queries split into parts that multiply it (`_split` in
  `_kernels/triton/call.py`).

Plain torch reads the dtypes that a kernel does not support.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["STORAGES", "Storage", "check_storage", "decode", "encode", "softmax_dtype", "storable"]


class Storage(NamedTuple):
    """Which kernels read a storage dtype."""

    number: int | None  # its number in the C++ kernels; None: they do not read it
    triton: bool  # whether the Triton kernel reads it


STORAGES = {
    torch.float32: Storage(number=0, triton=True),
    torch.bfloat16: Storage(number=1, triton=True),
    torch.float16: Storage(number=2, triton=True),
    torch.float64: Storage(number=None, triton=False),
}


def check_storage(name: str, dtype: torch.dtype) -> None:
    """Raises a TypeError that names the argument unless a cache can store embeddings in `dtype`.

    Examples:
        >>> check_storage("embedding_dtype", torch.int8)
        Traceback (most recent call last):
        TypeError: embedding_dtype is torch.int8; expected torch.float32, torch.bfloat16, torch.float16 or torch.float64
    """
    if dtype not in STORAGES:
        *others, last = map(str, STORAGES)
        raise TypeError(f"{name} is {dtype}; expected {', '.join(others)} or {last}")


def encode(embeddings: Tensor, storage: torch.dtype) -> Tensor:
    """The rows [..., D] as a cache of dtype `storage` holds them: `embeddings.to(storage)`."""
    return embeddings.to(storage)


def decode(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [..., D] of a cache as embeddings of `dtype`: `stored.to(dtype)`."""
    return stored.to(dtype)


def storable(embeddings: Tensor, storage: torch.dtype) -> Tensor:
    """[rows] bool: whether each row [rows, D] is finite once stored: `encode(embeddings, storage).isfinite().all(-1)`.

    Examples:
        >>> storable(torch.tensor([[1e5, 0.0], [1.0, 2.0]]), torch.float16)
        tensor([False,  True])
    """
    return encode(embeddings, storage).isfinite().all(-1)


def softmax_dtype(queries: torch.dtype, storage: torch.dtype) -> torch.dtype:
    """The dtype of scores of queries against stored embeddings: the wider of the two, float32 at least.

    Examples:
        >>> softmax_dtype(torch.bfloat16, torch.float16), softmax_dtype(torch.float32, torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(torch.promote_types(queries, storage), torch.float32)
