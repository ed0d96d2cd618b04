"""Hypothesis is deterministic unless HYPOTHESIS_PROFILE=thorough; torch runs on one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

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
settings.register_profile("device", settings.get_profile("ci"), max_examples=12)  # kernels are compiled
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# What is tested is small, and tests run side by side: threads would wait for each other, as would the processes that
# inductor compiles with. Here, and in every process that a test starts.
torch.set_num_threads(1)
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
    os.environ.setdefault(variable, "1")

# The files that take longest, longest first: begun first, so that two processes of pytest end together.
LONGEST = (
    "properties/test_compile.py",
    "ranks/test_wrapped_and_compiled.py",
    "ranks/test_equivalence.py",
    "examples/test_experiments.py",
    "ranks/test_checkpoints.py",
    "kernels/test_triton.py",
    "integrations/test_sentence_transformers_trainer.py",
    "examples/test_code_search_distributed.py",
    "integrations/test_lightning.py",
    "integrations/test_hugging_face.py",
    "properties/test_precision.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of these files first, in their order."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


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
