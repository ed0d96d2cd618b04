"""Comparing what runs leave behind."""

from __future__ import annotations

from typing import Any

import torch


def assert_same(left: Any, right: Any) -> None:
    """Equal bit for bit, all the way down."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif hasattr(left, "items"):
        assert set(left.keys()) == set(right.keys())
        for key, value in left.items():
            assert_same(value, right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right
