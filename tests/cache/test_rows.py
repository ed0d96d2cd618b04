"""Rows written into slots against a loop, by both paths: any dtype and shape, and values that are views of columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from negcache_fn._cache.rows import write_rows_
from negcache_fn._kernels.cpu import rows as kernel
from tests.cache.test_reembed import by_native_code

SHAPES = [(), (3,), (2, 2), (0,)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int64]


def numbers(rows: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, (rows, *shape), generator=generator).to(dtype)


def written(columns: list[Tensor], values: list[Tensor], slots: list[int]) -> list[Tensor]:
    expected = [column.clone() for column in columns]
    for column, rows in zip(expected, values, strict=True):
        for slot, row in zip(slots, rows.clone(), strict=True):
            if slot >= 0:
                column[slot] = row.to(column.dtype)
    return expected


@given(data=st.data(), capacity=st.integers(1, 9), native=st.booleans())
def test_rows_are_written_as_by_a_loop(data: st.DataObject, capacity: int, native: bool) -> None:
    """Into distinct slots; -1 writes nothing. Values have any strides, and floats another width."""
    taken = data.draw(st.lists(st.integers(0, capacity - 1), unique=True))
    slots = data.draw(st.permutations(taken + [-1] * data.draw(st.integers(0 if taken else 1, 3))))
    columns: list[Tensor] = []
    values: list[Tensor] = []
    for seed in range(data.draw(st.integers(1, 4))):
        shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(DTYPES))
        given_as = data.draw(st.sampled_from([dtype, torch.float64])) if dtype.is_floating_point else dtype
        rows = numbers(2 * len(slots), shape, given_as, seed + 10)
        rows = data.draw(st.sampled_from([rows[: len(slots)], rows[::2], rows[:1].expand(len(slots), *shape)]))
        columns.append(numbers(capacity, shape, dtype, seed))
        values.append(rows)
    expected, before = written(columns, values, slots), [rows.clone() for rows in values]
    with by_native_code(native):
        write_rows_(columns, values, torch.tensor(slots))
    for found, wanted in zip(columns + values, expected + before, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("native", [True, False])
def test_values_may_be_views_of_the_columns(native: bool) -> None:
    """Of the same one, and of one that is written before."""
    first, second = torch.arange(6), torch.arange(6) + 10
    columns, values, slots = [first, second], [first[:3], first[2:5]], [1, 2, 0]
    expected = written(columns, values, slots)
    with by_native_code(native):
        write_rows_(columns, values, torch.tensor(slots))
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


@pytest.mark.parametrize("native", [True, False])
def test_a_backward_pass_that_needs_the_rows_notices(native: bool) -> None:
    """And a column that is not contiguous is written all the same."""
    column, other = torch.ones(4, 2), torch.zeros(2, 4).t()
    weights = torch.ones(2, requires_grad=True)
    product = (column * weights).sum()
    with by_native_code(native), torch.no_grad():
        write_rows_([column], [torch.zeros(1, 2)], torch.tensor([3]))
        write_rows_([other], [torch.ones(1, 2)], torch.tensor([3]))
    assert other.tolist() == [[0, 0]] * 3 + [[1, 1]]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_the_kernel_takes_a_cache_on_the_cpu() -> None:
    column, slots = torch.zeros(4, 2), torch.zeros(1, dtype=torch.int64)
    assert kernel.supports([column], [column[:1]], slots) == (kernel.library() is not None)
    assert not kernel.supports([column.t()], [column[:, :1].t()], slots)
    assert not kernel.supports([column.to("meta")], [column[:1]], slots)


def test_the_operator_writes_what_its_schema_says() -> None:
    columns, values = [torch.zeros(6, 3), torch.zeros(6)], [torch.ones(2, 3), torch.ones(2)]
    found = torch.library.opcheck(torch.ops.negcache_fn.write_rows.default, (columns, values, torch.tensor([4, -1])))
    assert set(found.values()) == {"SUCCESS"}
