"""The id of a document, made from its features: equal documents have equal ids."""

from collections.abc import Mapping

import torch
from torch import Tensor

from negcache_fn.integrations.sentence_transformers.columns import MASK
from negcache_fn.integrations.sentence_transformers.layout import Layout, count_name

__all__ = ["content_ids"]

# Constants of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), as signed integers.
_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_GOLDEN = -0x61C8864680B583EB
_AT_A_TIME = 16_384  # numbers of each document
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def content_ids(layout: Layout, rows: Mapping[str, Tensor]) -> Tensor:
    """[N] int64, not negative: a function of all features of a document, except its padding and the side of padding.

    Different documents have different ids, up to a chance of 2^-63 for each pair.
    """
    total: Tensor | None = None
    for number, (key, leaf) in enumerate(sorted(layout.leaves.items())):
        if key == MASK:
            continue
        values = rows[key]
        if leaf.kind == "rows":
            values = values.reshape(values.shape[0], -1)
            there = torch.ones((), dtype=torch.bool, device=values.device).expand(values.shape)
            place = torch.arange(values.shape[1], device=values.device).expand(values.shape)
        else:
            there = rows[MASK] if leaf.kind == "tokens" else _pieces(values, rows[count_name(key)])
            place = there.long().cumsum(1)
        of_key = _mixed(_sums(values.flatten(2) if values.ndim > 2 else values[..., None], there, place) + number)
        total = of_key if total is None else _mixed(total * _GOLDEN + of_key)
    assert total is not None  # a layout has a feature that is not a mask
    return total & torch.iinfo(torch.int64).max


def _pieces(values: Tensor, counts: Tensor) -> Tensor:
    """[N, most] bool: which of the pieces exist."""
    return torch.arange(values.shape[1], device=values.device) < counts[:, None]


def _sums(values: Tensor, there: Tensor, place: Tensor) -> Tensor:
    """[N] int64: of values [N, W, k] that are there [N, W], each mixed with its place [N, W]; some at a time."""
    total = there.sum(1)
    within = torch.arange(values.shape[2], device=values.device)
    size = max(_AT_A_TIME // max(values.shape[2], 1), 1)
    for start in range(0, values.shape[1], size):
        part = slice(start, start + size)
        places = place[:, part, None] * values.shape[2] + within
        mixed = _mixed(_bits(values[:, part]) * _GOLDEN + places * _FACTORS[0])
        total = total + (mixed * there[:, part, None].long()).sum((1, 2))
    return total


def _bits(values: Tensor) -> Tensor:
    """int64, different where the values are."""
    if values.is_complex():
        values = torch.view_as_real(values).flatten(-2)
    if values.is_floating_point():
        values = values.contiguous().view(_INTEGERS[values.element_size()])
    return values.long()


def _mixed(values: Tensor) -> Tensor:
    """The finaliser of splitmix64."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        values = (values ^ _shifted(values, shift)) * factor
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    return (values >> bits) & ((1 << (64 - bits)) - 1)  # zeros are shifted in from the left
