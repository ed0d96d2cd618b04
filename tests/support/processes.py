"""Real processes: a case is a module-level function of (rank, world) that returns something picklable."""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120
Case = Callable[..., Any]


def run_ranks(world: int, cases: dict[str, tuple[Case, dict[str, Any]]], folder: Path) -> dict[str, list[Any]]:
    """Runs cases one after the other on `world` gloo processes; what each rank returned, by case.

    Raises:
        AssertionError: a case raised, with its traceback.
    """
    mp.start_processes(_work, (world, cases, str(folder)), nprocs=world, join=True, start_method="spawn")
    results: dict[str, list[Any]] = {}
    for name in cases:
        of_ranks = [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(world)]
        for rank, (error, _) in enumerate(of_ranks):
            assert error is None, f"rank {rank} of {world}, {name}:\n{error}"
        results[name] = [value for _, value in of_ranks]
    return results


def _work(rank: int, world: int, cases: dict[str, tuple[Case, dict[str, Any]]], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    store = dist.FileStore(f"{folder}/store", world)
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    for name, (case, options) in cases.items():
        try:
            outcome = (None, case(rank, world, **options))
        except Exception:
            outcome = (traceback.format_exc(), None)
        torch.save(outcome, f"{folder}/{name}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()
    # What is of interest is on disk. Gloo's threads outlive the group, and one that lets go of its last tensor while
    # the interpreter is being taken down aborts the process (pytorch/pytorch#179291).
    os._exit(0)
