"""Real processes: a case is a module-level function of (rank, world) that returns something picklable.

Processes stay, and take the cases of the next test, since starting one takes seconds. Each call has a process group of
its own, and after an error the next call starts new processes.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from coverage import Coverage

SECONDS = 120
Case = Callable[..., Any]
Cases = dict[str, tuple[Case, dict[str, Any]]]


def run_ranks(world: int, cases: Cases, folder: Path, *, fresh: bool = False) -> dict[str, list[Any]]:
    """Runs cases one after the other on `world` gloo processes; what each rank returned, by case.

    Args:
        world: number of processes.
        cases: each a function and its keywords, by name.
        folder: for what they exchange, new for each call.
        fresh: whether to start new processes, for software that keeps a state of its own in a process.

    Raises:
        AssertionError: a case raised, with its traceback; a process died.
    """
    if fresh:
        stop_processes()
    while len(_WORKERS) < world:
        _WORKERS.append(_Worker())
    try:
        for rank, worker in enumerate(_WORKERS[:world]):
            worker.connection.send((rank, world, cases, str(folder)))
        for rank, worker in enumerate(_WORKERS[:world]):
            worker.wait(rank)
        results: dict[str, list[Any]] = {}
        for name in cases:
            of_ranks = [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(world)]
            for rank, (error, _) in enumerate(of_ranks):
                assert error is None, f"rank {rank} of {world}, {name}:\n{error}"
            results[name] = [value for _, value in of_ranks]
    except BaseException:
        stop_processes()
        raise
    if fresh:
        stop_processes()
    return results


def stop_processes() -> None:
    """Lets all processes end, and write their coverage."""
    for worker in _WORKERS:
        worker.connection.close()
    for worker in _WORKERS:
        worker.process.join(10)
        worker.process.kill()
        worker.process.join()
    _WORKERS.clear()


@contextmanager
def without_coverage() -> Iterator[None]:
    """For a case that compiles: `pytest.mark.no_cover` is for the process of the test alone."""
    measured = Coverage.current()
    if measured is None:
        yield
        return
    measured.stop()
    try:
        yield
    finally:
        measured.start()


class _Worker:
    """A process that waits for cases, to be any of the ranks."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def wait(self, rank: int) -> None:
        """Until it is done."""
        wait([self.connection, self.process.sentinel])
        assert self.connection.poll(), f"the process of rank {rank} died, with exit code {self.process.exitcode}"
        self.connection.recv()


_WORKERS: list[_Worker] = []


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    try:
        while True:
            given = connection.recv()
            # A process that waits for ever prints where, and dies, which the test is told.
            faulthandler.dump_traceback_later(4 * SECONDS, exit=True)
            _run(*given)
            faulthandler.cancel_dump_traceback_later()
            connection.send(None)
    except EOFError:  # no more cases
        pass
    finally:
        # Gloo's threads outlive the group, and one that lets go of its last tensor while the interpreter is being taken
        # down aborts the process (pytorch/pytorch#179291).
        os._exit(0)


def _run(rank: int, world: int, cases: Cases, folder: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
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
