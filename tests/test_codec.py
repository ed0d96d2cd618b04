"""Storage dtypes: what a cache holds of an embedding, and in which dtype it is scored."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from negcache_fn import _codec

FLOATING = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STORAGES = [*FLOATING, torch.int8]


def test_the_documented_dtypes_are_storages() -> None:
    assert list(_codec.STORAGES) == STORAGES
    for dtype in STORAGES:
        _codec.check_storage("embedding_dtype", dtype)
    numbers = [storage.number for storage in _codec.STORAGES.values() if storage.number is not None]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_not(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"embedding_dtype is {dtype}; expected torch\.float32, .* or torch\.int8"):
        _codec.check_storage("embedding_dtype", dtype)


@pytest.mark.parametrize("storage", FLOATING)
def test_what_is_stored_errs_by_the_rounding_of_its_dtype(storage: torch.dtype) -> None:
    embeddings = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stored = _codec.encode(embeddings, storage)["embedding"]
    assert stored.dtype == storage
    read = _codec.decode(stored, None, torch.float64)
    assert read.dtype == torch.float64
    error = (read - embeddings).abs()
    assert bool((error <= torch.finfo(storage).eps / 2 * embeddings.abs()).all())
    assert torch.equal(_codec.encode(read, storage)["embedding"], stored)


def naive_int8(row: list[float]) -> tuple[list[int], float]:
    """The integers of a row and its scale, in Python: the largest magnitude over 127 as 16 bits of mantissa."""
    mantissa, exponent = math.frexp(max(map(abs, row)) / 127)
    scale = math.ldexp(round(mantissa * 2**16), exponent - 16)
    return [max(-127, min(127, round(number / scale))) if scale else 0 for number in row], scale


@given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    dtype=st.sampled_from(FLOATING),
)
def test_int8_is_the_nearest_integer_of_a_scale_for_each_row(
    rows: list[list[float]], size: float, dtype: torch.dtype
) -> None:
    embeddings = (torch.tensor(rows, dtype=torch.float64) * size).to(dtype).nan_to_num(0.0, 0.0, 0.0)
    embeddings[embeddings.abs() < 1e-34] = 0.0  # scales are normal numbers
    encoded = _codec.encode(embeddings, torch.int8)
    integers, scale = encoded["embedding"], encoded["embedding_scale"]
    assert integers.dtype == torch.int8 and scale.dtype == torch.float32
    for row, found, its_scale in zip(embeddings.double().tolist(), integers.tolist(), scale.tolist(), strict=True):
        expected, expected_scale = naive_int8(row)
        assert its_scale == pytest.approx(expected_scale, rel=2.0**-15)  # the division may round the other way
        for number, here, there in zip(row, found, expected, strict=True):
            assert abs(here - there) <= 1
            # Half a step, and 2^-16 of the largest number.
            assert abs(here * its_scale - number) <= its_scale * (0.5 + 127 * 2.0**-15)


@given(seed=st.integers(0, 2**20), size=st.floats(1e-30, 1e30), dim=st.integers(1, 40))
def test_int8_is_read_exactly_and_encoded_back(seed: int, size: float, dim: int) -> None:
    """In float32 as in float64: so draws, normalisers and stale scores have one value of a row."""
    embeddings = torch.randn(7, dim, generator=torch.Generator().manual_seed(seed)) * size
    embeddings[3] = 0.0
    encoded = _codec.encode(embeddings, torch.int8)
    single, double = (_codec.decode(*encoded.values(), dtype) for dtype in (torch.float32, torch.float64))
    assert torch.equal(single.double(), double)
    assert torch.equal(double, encoded["embedding"].double() * encoded["embedding_scale"].double()[:, None])
    for again in (_codec.encode(single, torch.int8), _codec.encode(double, torch.int8)):
        assert all(torch.equal(again[name], column) for name, column in encoded.items())


def test_int8_columns() -> None:
    for storage in FLOATING:
        assert _codec.columns_of(storage) == ("embedding",) == tuple(_codec.encode(torch.zeros(1, 1), storage))
        assert _codec.read_as(storage) == storage
    assert _codec.columns_of(torch.int8) == tuple(_codec.encode(torch.zeros(1, 1), torch.int8))
    assert _codec.read_as(torch.int8) == torch.float32


def test_int8_takes_what_it_can_give_back() -> None:
    rows = torch.tensor([[1.0, 3e38], [3.4e38, 1.0], [math.nan, 1.0], [1.0, -math.inf], [0.0, 0.0], [1e300, 0.0]])
    wide = torch.tensor([1e300, 0.0], dtype=torch.float64)[None]
    assert _codec.storable(rows, torch.int8).tolist() == [True, True, False, False, True, False]
    assert _codec.storable(wide, torch.int8).tolist() == [False]
    encoded = _codec.encode(rows, torch.int8)
    assert bool(_codec.decode(*encoded.values(), torch.float32)[[0, 1, 4]].isfinite().all())


@pytest.mark.parametrize(
    ("storage", "expected"), [(torch.float16, [True, False, False, False]), (torch.float32, [True, True, False, False])]
)
def test_storable_asks_what_is_stored(storage: torch.dtype, expected: list[bool]) -> None:
    rows = torch.tensor([[1.0, 65504.0], [65520.0, 1.0], [math.nan, 1.0], [1.0, -math.inf]])
    assert _codec.storable(rows, storage).tolist() == expected


@pytest.mark.parametrize("queries", FLOATING)
@pytest.mark.parametrize("storage", STORAGES)
def test_scores_are_float32_or_wider(queries: torch.dtype, storage: torch.dtype) -> None:
    wide = torch.float64 in (queries, storage)
    assert _codec.softmax_dtype(queries, storage) == (torch.float64 if wide else torch.float32)
