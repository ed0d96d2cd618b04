"""The frequency that ranks observe together is that of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDictBase

from negcache_fn.frequency import init_frequency, observe
from tests.support.builders import assert_same_state
from tests.support.processes import run_ranks


def observe_part(rank: int, world: int, *, alone: bool = False) -> TensorDictBase:
    """This rank's part of each of six batches; all of them if alone."""
    frequency, group = init_frequency(20, hashes=2), None if alone else dist.group.WORLD
    ids = torch.randint(-1, 30, (6, 4), generator=torch.Generator().manual_seed(3))
    mask = ids % 5 != 0
    for one, kept in zip(ids, mask, strict=True):
        own, own_mask = one.view(world, -1)[rank], kept.view(world, -1)[rank]
        frequency = observe(frequency, own, rate=0.3, mask=own_mask, group=group)
    if not alone:
        with pytest.raises(ValueError, match="rate differs"):
            observe(frequency, own, rate=0.1 * (rank + 1), group=group)
        with pytest.raises(ValueError, match="documents differs"):
            observe(frequency, own[: rank + 1], rate=0.3, group=group)
        with pytest.raises(ValueError, match=r"rate is 2;"):
            observe(frequency, own, rate=2 if rank else 1, group=group)
    return frequency


def test_ranks_observe_the_batch_of_all(tmp_path: Path) -> None:
    """Two processes, each with its part of the ids, have the frequency of one that has all."""
    expected = observe_part(0, 1, alone=True)
    for found in run_ranks(2, {"observe": (observe_part, {})}, tmp_path)["observe"]:
        assert_same_state(found, expected)
