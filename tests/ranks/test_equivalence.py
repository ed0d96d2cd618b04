"""The sharded run is the single run, split: the same draws, losses, gradients and state on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import run_ranks
from tests.support.sharded_training import Record, train

DOUBLE: dict[str, Any] = {"dtype": torch.float64, "steps": 8}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "long": DOUBLE | {"steps": 50, "in_batch": "global", "draws_per_query": 2},
    "own-draws-fifo": DOUBLE
    | {"in_batch": False, "share_draws": False, "draws_per_query": 4, "evict": "fifo", "refresh_stalest": 3},
    "top-k": DOUBLE | {"in_batch": False, "top_k": 40, "draws_per_query": 3, "staleness_correction": "none"},
    "weights-anonymous": DOUBLE | {"in_batch": "global", "with_ids": False, "with_weights": True, "draws_per_query": 4},
    "replicated": DOUBLE | {"in_batch": "global", "placement": "replicated", "draws_per_query": 2, "evict": "fifo"},
    "replicated-top-k": DOUBLE | {"in_batch": False, "placement": "replicated", "top_k": 40, "refresh_stalest": 3},
    "false-negatives": DOUBLE | {"in_batch": "global", "draws_per_query": 2, "margin": 2.0},
    "false-negatives-of-own": DOUBLE | {"in_batch": False, "with_ids": False, "top_k": 40, "margin": -1.0},
    "replicated-false-negatives": DOUBLE | {"in_batch": "global", "placement": "replicated", "margin": 0.0},
    "positives": DOUBLE
    | {"in_batch": "global", "num_draws": 24, "positives": 2, "with_weights": True}
    | {"weigh_positives": False},
    "hardness": DOUBLE | {"in_batch": "global", "num_draws": 24, "margin": 2.0, "hardness": 3.0, "with_weights": True},
    "positives-of-own": DOUBLE | {"in_batch": False, "draws_per_query": 2, "positives": 2},
    "positives-limited": DOUBLE
    | {"num_draws": 12, "positives": 1, "margin": 1.0}
    | {"in_batch": "global", "placement": "replicated"},
    "labels": DOUBLE | {"in_batch": "global", "num_draws": 24, "labels": True, "with_ids": False},
    "labels-of-own": DOUBLE | {"in_batch": False, "draws_per_query": 2, "labels": True},
    "labels-replicated": DOUBLE
    | {"in_batch": "global", "placement": "replicated", "draws_per_query": 2, "labels": True}
    | {"positives": 2, "reduction": "sum", "top_k": 40},
    "batch": DOUBLE | {"in_batch": "global", "num_draws": 24, "refresh_stalest": 3},
    "batch-default": DOUBLE | {"in_batch": False, "margin": 2.0, "with_weights": True},
    "batch-long": DOUBLE | {"steps": 50, "in_batch": "global", "num_draws": 12, "evict": "fifo"},
    "batch-uncorrected": DOUBLE | {"in_batch": False, "num_draws": 12, "staleness_correction": "none"},
    "batch-top-k": DOUBLE | {"in_batch": False, "num_draws": 12, "top_k": 40, "margin": 2.0},
    "batch-few": DOUBLE | {"in_batch": "global", "num_draws": 120, "empty": True},
    "batch-replicated": DOUBLE | {"in_batch": "global", "placement": "replicated", "num_draws": 24, "margin": 2.0},
    "batch-replicated-top-k": DOUBLE
    | {"in_batch": False, "placement": "replicated", "num_draws": 12, "top_k": 40, "refresh_stalest": 3},
    "batch-float32": {"dtype": torch.float32, "steps": 8, "in_batch": "global", "num_draws": 24},
    "int8": DOUBLE | {"in_batch": "global", "storage": torch.int8, "num_draws": 24, "refresh_stalest": 3},
    "int8-own-draws": DOUBLE
    | {"in_batch": False, "storage": torch.int8, "draws_per_query": 3, "top_k": 40, "margin": 2.0},
    "int8-replicated": DOUBLE | {"in_batch": "global", "storage": torch.int8, "placement": "replicated"},
    "float32": {"dtype": torch.float32, "steps": 8, "in_batch": "global", "draws_per_query": 2},
    "float32-long": {"dtype": torch.float32, "steps": 50, "in_batch": False},
}


@pytest.fixture(scope="module")
def alone() -> dict[str, Record]:
    """The run of one process without a group."""
    records = {}
    for name, options in CONFIGURATIONS.items():
        options = {key: value for key, value in options.items() if key != "placement"}
        if "refresh_stalest" in options:
            continue
        records[name] = train(0, 1, alone=True, **options)
    return records


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks(world: int, alone: dict[str, Record], tmp_path: Path) -> None:
    cases = {
        name: (train, options | ({"refresh_stalest": 12 // world} if "refresh_stalest" in options else {}))
        for name, options in CONFIGURATIONS.items()
    }
    for name, of_ranks in run_ranks(world, cases, tmp_path).items():
        if name not in alone:
            options = {key: value for key, value in CONFIGURATIONS[name].items() if key != "placement"}
            alone[name] = train(0, 1, alone=True, **options | {"refresh_stalest": 12})
        for record in of_ranks:
            assert_same(name, record, alone[name], tolerance=1e-5 if "float32" in name else 1e-12)


def assert_same(name: str, record: Record, expected: Record, *, tolerance: float = 1e-12) -> None:
    """Equal draws and slots, and all that is computed within the tolerance, relative or absolute."""
    assert len(record.slots) == len(expected.slots)
    for found, wanted in zip(record.slots, expected.slots, strict=True):
        assert torch.equal(found, wanted), name
    assert record.losses == pytest.approx(expected.losses, rel=tolerance, abs=tolerance), name
    for key, gradient in expected.gradients.items():
        _assert_close(f"{name} {key}", record.gradients[key], gradient, tolerance)
    for key, value in expected.metrics.items():
        _assert_close(f"{name} {key}", record.metrics[key], value, 1e-5)
    for key, value in expected.state.items(include_nested=True, leaves_only=True):
        found = record.state[key]
        if key == ("items", "embedding"):
            _assert_close(f"{name} {key}", found, value, tolerance)
        else:
            assert torch.equal(found, value), (name, key)


def _assert_close(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")
