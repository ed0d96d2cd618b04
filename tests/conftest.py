"""Hypothesis is deterministic unless HYPOTHESIS_PROFILE=thorough; torch runs on one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

from tests.support.processes import stop_processes

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("thorough", settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# What is tested is small, and tests run side by side: threads would wait for each other.
torch.set_num_threads(1)


def pytest_sessionfinish() -> None:
    """Lets the processes of `run_ranks` end and write their coverage."""
    stop_processes()


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator for test data."""
    return torch.Generator().manual_seed(20211206)


@pytest.fixture
def group_of_one() -> Iterator[dist.ProcessGroup]:
    """In this process, where a debugger and coverage see it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()
