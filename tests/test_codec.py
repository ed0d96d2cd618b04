"""Storage dtypes: what a cache holds of an embedding, and in which dtype it is scored."""

from __future__ import annotations

import math

import pytest
import torch

from negcache_fn import _codec

STORAGES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def test_the_documented_dtypes_are_storages() -> None:
    assert list(_codec.STORAGES) == STORAGES
    for dtype in STORAGES:
        _codec.check_storage("embedding_dtype", dtype)
    numbers = [storage.number for storage in _codec.STORAGES.values() if storage.number is not None]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_not(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"embedding_dtype is {dtype}; expected torch\.float32, .* or torch\.float64"):
        _codec.check_storage("embedding_dtype", dtype)


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_stored_errs_by_the_rounding_of_its_dtype(storage: torch.dtype) -> None:
    embeddings = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stored = _codec.encode(embeddings, storage)
    assert stored.dtype == storage
    read = _codec.decode(stored, torch.float64)
    assert read.dtype == torch.float64
    error = (read - embeddings).abs()
    assert bool((error <= torch.finfo(storage).eps / 2 * embeddings.abs()).all())
    assert torch.equal(_codec.encode(read, storage), stored)


@pytest.mark.parametrize(
    ("storage", "expected"), [(torch.float16, [True, False, False, False]), (torch.float32, [True, True, False, False])]
)
def test_storable_asks_what_is_stored(storage: torch.dtype, expected: list[bool]) -> None:
    rows = torch.tensor([[1.0, 65504.0], [65520.0, 1.0], [math.nan, 1.0], [1.0, -math.inf]])
    assert _codec.storable(rows, storage).tolist() == expected


@pytest.mark.parametrize("queries", STORAGES)
@pytest.mark.parametrize("storage", STORAGES)
def test_scores_are_float32_or_wider(queries: torch.dtype, storage: torch.dtype) -> None:
    wide = torch.float64 in (queries, storage)
    assert _codec.softmax_dtype(queries, storage) == (torch.float64 if wide else torch.float32)
