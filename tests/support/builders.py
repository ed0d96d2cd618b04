"""States and batches made directly from the schema, without the package's own functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

Snapshot = list[tuple[str, Any]]


def make_state(
    embedding: Tensor,
    *,
    live: Sequence[bool] | Tensor | None = None,
    ids: Sequence[int] | Tensor | None = None,
    log_weight: Tensor | None = None,
    embedded_at: Tensor | None = None,
    inserted_at: Tensor | None = None,
    features: Any = None,
    step: int = 1,
    seed: int = 0,
    lock: bool = True,
) -> TensorDict:
    """A state holding `embedding` [C, D]; empty slots keep whatever bytes are given there."""
    capacity = embedding.shape[0]
    alive = torch.ones(capacity, dtype=torch.bool) if live is None else torch.as_tensor(live, dtype=torch.bool)
    empty = torch.full((capacity,), -1, dtype=torch.int64)
    at = torch.zeros(capacity, dtype=torch.int64) if embedded_at is None else embedded_at.long()
    inside = at if inserted_at is None else inserted_at.long()
    if features is None:
        features = {"x": torch.arange(capacity, dtype=torch.int64)[:, None].repeat(1, 2)}
    if isinstance(features, dict):
        features = TensorDict(features, batch_size=[capacity])
    items = TensorDict(
        {
            "embedding": embedding.clone(),
            "features": features.clone(),
            "id": torch.where(alive, empty if ids is None else torch.as_tensor(ids, dtype=torch.int64), empty),
            "embedded_at": torch.where(alive, at, empty),
            "log_weight": torch.zeros(capacity) if log_weight is None else log_weight.float().clone(),
            "inserted_at": torch.where(alive, inside, empty),
        },
        batch_size=[capacity],
    )
    state = TensorDict({"items": items, "step": torch.tensor(step), "seed": torch.tensor(seed)}, batch_size=[])
    return state.lock_() if lock else state


def at_step(state: TensorDictBase, step: int) -> TensorDictBase:
    """The same state with another step counter, so with other noise."""
    moved = state.clone(recurse=False)
    moved["step"] = torch.tensor(step)
    return moved.lock_()


def unit(rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[rows, dim]` random unit vectors."""
    vectors = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1).to(dtype)


def snapshot(*values: Any) -> Snapshot:
    """The bytes, flags and structure of every tensor in nested arguments."""
    out: Snapshot = []

    def visit(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            out.append((path, (value.dtype, tuple(value.shape), value.requires_grad, value.detach().clone())))
        elif isinstance(value, TensorDictBase):
            out.append((path, ("locked", value.is_locked, sorted(map(str, value.keys())))))
            for key in list(value.keys()):
                visit(f"{path}.{key}", value.get(key))
        elif isinstance(value, dict):
            out.append((path, sorted(map(str, value))))
            for key, item in value.items():
                visit(f"{path}.{key}", item)
        elif isinstance(value, (list, tuple)):
            for n, item in enumerate(value):
                visit(f"{path}[{n}]", item)
        elif not isinstance(value, Callable):
            out.append((path, value))

    for n, value in enumerate(values):
        visit(str(n), value)
    return out


def same_snapshot(before: Snapshot, after: Snapshot) -> bool:
    """Whether two snapshots agree byte for byte (NaN equals NaN)."""
    if len(before) != len(after):
        return False
    for (path, a), (other, b) in zip(before, after, strict=True):
        if path != other or type(a) is not type(b):
            return False
        if isinstance(a, tuple) and isinstance(a[-1], Tensor):
            if a[:3] != b[:3] or not same_bits(a[-1], b[-1]):
                return False
        elif a != b:
            return False
    return True


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    raw = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return bool(torch.equal(*raw))


def assert_same_state(a: TensorDictBase, b: TensorDictBase) -> None:
    """Two states are one value: keys, dtypes and bytes."""
    left, right = dict(a.items(True, True)), dict(b.items(True, True))
    assert set(left) == set(right)
    for key, value in left.items():
        assert same_bits(value, right[key]), f"{key} differs: {value} against {right[key]}"


def relative_error(given: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude (or 1e-300 of it)."""
    difference = (given.detach().double() - expected.detach().double()).abs().max()
    size = expected.detach().double().abs().max()
    return float(difference) / max(float(size), 1e-300) if float(difference) else 0.0


def is_close(given: Tensor, expected: Tensor, tolerance: float, size: float = 1.0) -> bool:
    """Elementwise within `tolerance * (size + |expected|)`, with infinities equal and NaN never."""
    given, expected = given.detach().double(), expected.detach().double()
    if given.shape != expected.shape or bool(torch.isnan(given).any()):
        return False
    same_infinity = (given == expected) & torch.isinf(expected)
    near = (given - expected).abs() <= tolerance * (size + expected.abs())
    return bool((same_infinity | near).all())


MINUS_INFINITY = -math.inf
