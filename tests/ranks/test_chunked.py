"""An encoder in chunks under DistributedDataParallel: the gradients of one piece, synchronised once."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import negcache_fn
from tests.support.processes import run_ranks
from tests.support.sharded_training import Tower, features


def encode(rank: int, world: int) -> tuple[Tensor, int]:
    """The average gradient, and how often it was synchronised."""
    wrapped = DistributedDataParallel(negcache_fn.chunked(Tower(torch.float64, 1), 3))
    calls: list[int] = []

    def hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        calls.append(1)
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(dist.group.WORLD, hook)
    wrapped(features(torch.arange(10) + 10 * rank, torch.float64)).square().sum().backward()
    gradient = next(wrapped.parameters()).grad
    assert gradient is not None
    return gradient, len(calls)


def test_synchronised_once(tmp_path: Path) -> None:
    tower = Tower(torch.float64, 1)
    tower(features(torch.arange(20), torch.float64)).square().sum().backward()
    for gradient, calls in run_ranks(2, {"encode": (encode, {})}, tmp_path)["encode"]:
        assert calls == 1
        torch.testing.assert_close(2 * gradient, tower.weight.grad, rtol=1e-12, atol=1e-12)
