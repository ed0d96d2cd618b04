"""Storage dtypes: the one place that defines how a cache stores embeddings and which kernels read them.

`STORAGES` is the table of them. A floating storage is a cast. Int8 is symmetric and per row: an embedding is the row of
integers -127 ... 127 times the row's scale, a column `embedding_scale` of the cache. The scale has 16 significant bits.
So a decoded number is exact in float32, decoding in float32 and in float64 is the same, and encoding what was decoded
gives the same bytes.

A new storage dtype needs:

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

__all__ = [
    "STORAGES",
    "Storage",
    "as_sent",
    "check_storage",
    "columns_of",
    "decode",
    "encode",
    "read_as",
    "softmax_dtype",
    "storable",
]

_MOST = 127  # of an int8 number: the range is symmetric
_DROPPED_BITS = 8  # of the 24 of a float32 scale


class Storage(NamedTuple):
    """Which kernels read a storage dtype, and whether its rows have scales."""

    number: int | None  # its number in the C++ kernels; None: they do not read it
    triton: bool  # whether the Triton kernel reads it
    scaled: bool = False  # whether a row is integers times a number of its own


STORAGES = {
    torch.float32: Storage(number=0, triton=True),
    torch.bfloat16: Storage(number=1, triton=True),
    torch.float16: Storage(number=2, triton=True),
    torch.float64: Storage(number=None, triton=False),
    torch.int8: Storage(number=3, triton=True, scaled=True),
}


def check_storage(name: str, dtype: torch.dtype) -> None:
    """Raises a TypeError that names the argument unless a cache can store embeddings in `dtype`.

    Examples:
        >>> check_storage("embedding_dtype", torch.int16)
        Traceback (most recent call last):
        TypeError: embedding_dtype is torch.int16; expected torch.float32, torch.bfloat16, torch.float16, torch.float64 or torch.int8
    """  # noqa: E501 - one line of output
    if dtype not in STORAGES:
        *others, last = map(str, STORAGES)
        raise TypeError(f"{name} is {dtype}; expected {', '.join(others)} or {last}")


def columns_of(storage: torch.dtype) -> tuple[str, ...]:
    """The columns that hold the embeddings of a cache: "embedding" [C, D], and for int8 "embedding_scale" [C]."""
    return ("embedding", "embedding_scale") if _is_scaled(storage) else ("embedding",)


def encode(embeddings: Tensor, storage: torch.dtype) -> dict[str, Tensor]:
    """The rows [N, D] as the `columns_of` a cache hold them: `embeddings.to(storage)`, or integers and scales [N].

    The scale of a row is its largest magnitude over 127, rounded to 16 bits; numbers are rounded to even.

    Examples:
        >>> encode(torch.tensor([[1.0, -0.5, 0.0]]), torch.int8)["embedding"]
        tensor([[127, -64,    0]], dtype=torch.int8)
    """
    if not _is_scaled(storage):
        return {"embedding": embeddings.to(storage)}
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    scale = _rounded((wide.abs().amax(-1) / _MOST).to(torch.float32))
    ratio = wide / scale.masked_fill(scale == 0, 1.0)[..., None].to(wide.dtype)
    # Where a value is NaN, the scale is NaN, see `storable`; the integers have no meaning.
    rows = ratio.nan_to_num(0.0).round().clamp(-_MOST, _MOST)
    return {"embedding": rows.to(storage), "embedding_scale": scale}


def decode(rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows [..., D] of a cache, with their scales [...] if they have any, as embeddings of `dtype`."""
    return rows.to(dtype) if scale is None else rows.to(dtype) * scale[..., None].to(dtype)


def read_as(storage: torch.dtype) -> torch.dtype:
    """The dtype that holds every embedding of a cache exactly: the storage, or float32 for int8."""
    return torch.float32 if _is_scaled(storage) else storage


def as_sent(embeddings: Tensor, storage: torch.dtype) -> Tensor:
    """Rows [N, D] that are stored later, as one tensor that need not be wider than the cache."""
    return embeddings if _is_scaled(storage) else embeddings.to(storage)


def storable(embeddings: Tensor, storage: torch.dtype) -> Tensor:
    """[rows] bool: whether each row [rows, D] is finite once stored and read again.

    Examples:
        >>> storable(torch.tensor([[1e5, 0.0], [1.0, 2.0]]), torch.float16)
        tensor([False,  True])
    """
    encoded = encode(embeddings, storage)
    if _is_scaled(storage):
        return (_MOST * encoded["embedding_scale"]).isfinite()
    # A maximum propagates NaN, and torch computes it in vectors, unlike a norm of order infinity.
    return encoded["embedding"].abs().amax(-1).lt(float("inf"))


def softmax_dtype(queries: torch.dtype, storage: torch.dtype) -> torch.dtype:
    """The dtype of scores of queries against stored embeddings: the wider of the two, float32 at least.

    Examples:
        >>> softmax_dtype(torch.bfloat16, torch.float16), softmax_dtype(torch.float32, torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(torch.promote_types(queries, storage), torch.float32)


def _is_scaled(storage: torch.dtype) -> bool:
    return storage in STORAGES and STORAGES[storage].scaled


def _rounded(scale: Tensor) -> Tensor:
    """Positive float32 numbers, rounded to the nearest with 16 significant bits; infinities and NaN stay so."""
    bits = scale.view(torch.int32)
    nearest = (bits + (1 << (_DROPPED_BITS - 1))) & -(1 << _DROPPED_BITS)
    return torch.where(scale.isfinite(), nearest.view(torch.float32), scale)
