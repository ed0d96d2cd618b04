"""Two losses of sentence-transformers, one for each data set, while the ranks are at different data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from negcache_fn.integrations.sentence_transformers import NegativeCacheLoss
from tests.support import tiny
from tests.support.builders import same_snapshot, snapshot
from tests.support.processes import run_ranks

TOLD = (
    r"loss differs between the ranks of the group: \[(\d+), (\d+)\] \(numbers in the order .* give these one loss, "
    r"or losses without gather_across_devices and learnable_scale\); expected the same on every rank"
)


def two_losses(rank: int, world: int, *, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Both losses on every rank, then another one on each."""
    model = tiny.transformer(Path(folder), dropout=0.0)
    losses = [NegativeCacheLoss(model, 2048, **options) for _ in range(2)]
    pairs = tiny.pairs(8, 1)[4 * rank : 4 * rank + 4]
    columns = [model.preprocess(list(texts)) for texts in zip(*pairs, strict=True)]
    for loss in losses:
        loss(columns).backward()
    assert losses[0].state is not None
    before = snapshot(losses[rank].state)
    found: dict[str, Any] = {"error": None, "untouched": False}
    try:
        losses[rank](columns).backward()
    except ValueError as error:
        found |= {"error": str(error), "untouched": same_snapshot(before, snapshot(losses[rank].state))}
    for loss in losses:  # and what comes next works
        loss(columns).backward()
    with torch.no_grad():
        losses[rank if not options.get("gather_across_devices") else 0](columns)
    gradients = [None if loss.scaling.logarithm is None else loss.scaling.logarithm.grad for loss in losses]
    return found | {"gradients": gradients}


def test_ranks_in_different_losses(tmp_path: Path) -> None:
    tiny.transformer(tmp_path / "model")
    cases: dict[str, Any] = {
        name: (two_losses, {"folder": str(tmp_path / "model"), "options": options})
        for name, options in {
            "shared": {"gather_across_devices": True},
            "learnable": {"learnable_scale": True},
            "separate": {},
        }.items()
    }
    results = run_ranks(2, cases, tmp_path)
    for name in ("shared", "learnable"):
        for found in results[name]:
            with pytest.raises(ValueError, match=TOLD):
                raise ValueError(found["error"])
            assert "drop_last" not in found["error"]
            assert found["untouched"], name
    first, second = (found["gradients"] for found in results["learnable"])
    assert first == second  # of replicas that stay equal
    assert [found["error"] for found in results["separate"]] == [None, None]
