"""A sharded step compiles into one graph, and works with encoders wrapped by FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.distributed.harness import run_ranks
from tests.distributed.test_equivalence import DOUBLE, assert_same
from tests.distributed.training import train

COMPILED: dict[str, dict[str, Any]] = {
    "global": DOUBLE | {"steps": 5, "in_batch": "global", "num_samples": 2, "refresh_stalest": 3},
    "distinct": DOUBLE | {"steps": 3, "in_batch": "global", "num_samples": 2, "replacement": False},
    "top-k": DOUBLE | {"steps": 3, "in_batch": False, "top_k": 40, "share_draws": False},
    "fewer": DOUBLE | {"steps": 3, "in_batch": "global", "num_draws": 4},
}


def compare(rank: int, world: int, **options: Any) -> int:
    torch._dynamo.reset()
    eager = train(rank, world, wrap="none", **options)
    compiled = train(rank, world, wrap="none", compiled=True, **options)
    assert_same("compiled", compiled, eager)
    return compiled.graphs


def test_compiled_equals_eager_in_one_graph(tmp_path: Path) -> None:
    cases = {name: (compare, options) for name, options in COMPILED.items()}
    for name, graphs in run_ranks(2, cases, tmp_path).items():
        assert graphs == [1, 1], name


def test_fsdp(tmp_path: Path) -> None:
    options = DOUBLE | {"steps": 4, "in_batch": "global"}
    (record, _) = run_ranks(2, {"fsdp": (train, options | {"wrap": "fsdp"})}, tmp_path)["fsdp"]
    assert_same("fsdp", record, train(0, 1, alone=True, **options))
