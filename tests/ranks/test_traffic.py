"""The formula of docs/scaling.md gives the bytes that a step sends."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import negcache_fn
from examples.benchmarks.traffic import Step, counted, messages
from negcache_fn import StepOptions, distributed
from tests.support.processes import run_ranks

ONE_DRAW = StepOptions(draws_per_query=1, in_batch="global")
STEPS = {
    "shared": Step(2, 4, 4, 16, ONE_DRAW, feature_bytes=8 * 5 + 2),
    "extras, bfloat16": Step(
        2, 4, 9, 32, replace(ONE_DRAW, draws_per_query=3, refresh_stalest=5), feature_bytes=42, storage_bytes=2
    ),
    "own": Step(2, 6, 8, 8, StepOptions(draws_per_query=2, in_batch=False, share_draws=False), feature_bytes=42),
    "for the batch": Step(2, 4, 4, 16, StepOptions(num_draws=12, in_batch="global"), feature_bytes=42),
    "for the batch by default": Step(2, 4, 9, 32, StepOptions(refresh_stalest=5), feature_bytes=42, storage_bytes=2),
    "own batch": Step(2, 6, 8, 8, StepOptions(draws_per_query=1), feature_bytes=42),
}


def measure(rank: int, world: int, *, step: Step) -> Counter[str]:
    group = dist.group.WORLD
    assert group is not None
    features = {
        "tokens": torch.ones(step.documents, 5, dtype=torch.int64),
        "flags": torch.ones(step.documents, 2, dtype=torch.bool),
    }
    dtype = torch.float32 if step.storage_bytes == 4 else torch.bfloat16
    slots = distributed.local_capacity(4096, group)
    state = negcache_fn.init_cache(slots, step.dim, features, embedding_dtype=dtype)
    encoder = torch.nn.Linear(5, step.dim)
    with counted() as counter:
        negcache_fn.step_(
            state,
            torch.ones(step.batch, step.dim, requires_grad=True),
            features,
            lambda batch: encoder(batch["tokens"].float()),
            options=step.options,
            ids=torch.arange(step.documents) + rank * 100,
            group=group,
        ).loss.backward()
    return counter


def test_bytes_by_collective(tmp_path: Path) -> None:
    for world in (2, 4):
        folder = tmp_path / str(world)
        folder.mkdir()
        steps = {name: replace(step, world=world) for name, step in STEPS.items()}
        results = run_ranks(world, {name: (measure, {"step": step}) for name, step in steps.items()}, folder)
        for name, step in steps.items():
            expected: Counter[str] = Counter()
            for _, collective, _, size in messages(step):
                expected[collective] += size
            for counter in results[name]:
                assert counter == expected, name
