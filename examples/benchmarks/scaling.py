"""What a sharded step costs: ``python -m examples.benchmarks.scaling`` measures gloo on this machine, checks the cost
model against it, and carries the model to clusters."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import negcache_fn
from examples.benchmarks.problem import SCALE, Problem
from examples.benchmarks.report import fill_page
from examples.benchmarks.shapes import Shape
from examples.benchmarks.traffic import Step, counted, messages, sent_bytes, watched
from examples.command_line import CommandParser, positive, run
from negcache_fn import StepOptions, distributed

GLOBAL = Shape(256, 2**17, 128)
OPTIONS = StepOptions(draws_per_query=GLOBAL.samples, in_batch="global")
ROUNDS = 15
COLLECTIVES = ("all_gather", "all_to_all", "reduce_scatter", "all_reduce")
SMALL, LARGE = 2**10, 2**22
FEATURE_BYTES = 64

# A cluster of H100s: 400 Gbit/s of network for each, in practice; the pass at half of its bfloat16 rate.
CLUSTER_BYTES_PER_SECOND = 40e9
CLUSTER_SECONDS_PER_MESSAGE = 40e-6
CLUSTER_FLOPS = 400e12


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints the tables, and fills a page; returns the exit status."""
    parser = CommandParser("benchmarks.scaling", description=__doc__)
    parser.add_argument("--page", type=Path, metavar="FILE", help="fill this page")
    parser.add_argument("--worlds", nargs="+", type=positive, default=[2, 4], help="numbers of processes")
    parser.add_argument("--capacity", type=positive, default=GLOBAL.capacity, help="slots of the cache")
    return run(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    shape = replace(GLOBAL, capacity=options.capacity)
    measured = {world: _measure(world, shape) for world in options.worlds}
    made = {
        "messages": _messages_table(),
        "measured": _measured_table(measured),
        "overhead": _overhead_text(measured[options.worlds[0]], options.worlds[0], shape),
        "clusters": _clusters_table(),
    }
    print("\n\n".join(made.values()))
    if options.page is not None:
        fill_page(options.page, made)


def _measure(world: int, shape: Shape) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (world, shape, folder), nprocs=world, join=True, start_method="spawn")
        return json.loads(Path(folder, "measured.json").read_text(encoding="utf-8"))


def _work(rank: int, world: int, shape: Shape, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    timeout = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    group = dist.group.WORLD
    assert group is not None
    line = {name: [_seconds(_message(name, size, world)) for size in (SMALL, LARGE)] for name in COLLECTIVES}
    part = replace(shape, batch=shape.batch // world, capacity=distributed.local_capacity(shape.capacity, group))
    together = _sharded(Problem(part), group)
    alone = _sharded(Problem(shape), None) if rank == 0 else None
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(ROUNDS):
        dist.barrier()
        if alone is not None:
            torch.set_num_threads(world)
            seconds["alone"].append(_time(alone))
            torch.set_num_threads(1)
        dist.barrier()
        seconds["together"].append(_time(together))
    with counted() as buffers:
        together()
    in_collectives = _seconds_in_collectives(together)
    if rank == 0:
        measured = {"line": line, "seconds": seconds, "buffers": buffers, "in_collectives": in_collectives}
        Path(folder, "measured.json").write_text(json.dumps(measured), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads outlive the group, and may abort a process that is being taken down


def _sharded(problem: Problem, group: dist.ProcessGroup | None) -> Callable[[], None]:
    state = problem.state()
    options = StepOptions(draws_per_query=problem.shape.samples, in_batch=True if group is None else "global")
    offset = 0 if group is None else 2**30 * dist.get_rank(group)

    def call() -> None:
        problem.next_batch()
        out = negcache_fn.step_(
            state,
            problem.queries,
            problem.features,
            lambda _: problem.encoded,
            options=options,
            scale=SCALE,
            ids=problem.ids + offset,
            group=group,
        )
        out.loss.backward()

    call()
    return call


def _message(name: str, size: int, world: int) -> Callable[[], object]:
    """A call that sends a rank's buffer of `size` bytes."""
    buffer = torch.zeros(size // 4)
    gathered = [torch.zeros(size // 4) for _ in range(world)]
    part = torch.zeros(size // 4 // world)
    calls: dict[str, Callable[[], object]] = {
        "all_gather": lambda: dist.all_gather(gathered, buffer),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(buffer), buffer),
        "reduce_scatter": lambda: dist.reduce_scatter(part, list(buffer.chunk(world))),
        "all_reduce": lambda: dist.all_reduce(buffer),
    }
    return calls[name]


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        dist.barrier()
        times.append(_time(call))
    return statistics.median(times)


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_in_collectives(step: Callable[[], None]) -> float:
    """Median over rounds of the time that a step spends in them, once all ranks are there."""
    times = []
    for _ in range(ROUNDS):
        spent: list[float] = []

        def timed(_name: str, _buffer: Tensor, call: Callable[[], Any], spent: list[float] = spent) -> Any:
            dist.barrier()
            start = time.perf_counter()
            result = call()
            spent.append(time.perf_counter() - start)
            return result

        dist.barrier()
        with watched(timed):
            step()
        times.append(sum(spent))
    return statistics.median(times)


def _predicted(step: Step, seconds_of: Callable[[str, int, float], float]) -> float:
    return sum(seconds_of(collective, count, size) for _, collective, count, size in messages(step))


def _measured_table(measured: dict[int, dict[str, Any]]) -> str:
    lines = [
        "| ranks | collective | buffers of a step | sent by a rank | 1 KiB takes | 4 MiB take |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for world, found in measured.items():
        for name in COLLECTIVES:
            small, large = found["line"][name]
            size = found["buffers"].get(name, 0)
            lines.append(
                f"| {world} | {name} | {size / 1024:,.1f} KiB | {sent_bytes(name, size, world) / 1024:,.1f} KiB | "
                f"{small * 1e6:,.0f} µs | {large * 1e3:.2f} ms |"
            )
    lines += [
        "",
        "| ranks | model: all collectives of a step | measured, once all ranks are there | whole step |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for world, found in measured.items():
        part = GLOBAL.batch // world
        step = Step(world, part, part, GLOBAL.dim, OPTIONS, feature_bytes=FEATURE_BYTES)

        def seconds_of(name: str, count: int, size: float, line: Any = found["line"]) -> float:
            small, large = line[name]
            return count * small + size * max(0.0, large - small) / (LARGE - SMALL)

        whole = statistics.median(found["seconds"]["together"])
        cells = (_predicted(step, seconds_of), found["in_collectives"], whole)
        lines.append(f"| {world} | " + " | ".join(f"{seconds * 1e3:.1f} ms" for seconds in cells) + " |")
    return "\n".join(lines)


def _overhead_text(found: dict[str, Any], world: int, shape: Shape) -> str:
    alone, together = found["seconds"]["alone"], found["seconds"]["together"]
    ratios = sorted(one / other for one, other in zip(together, alone, strict=True))
    low, middle, high = ratios[len(ratios) // 4], statistics.median(ratios), ratios[-1 - len(ratios) // 4]
    one, many = statistics.median(alone) * 1e3, statistics.median(together) * 1e3
    return (
        f"{shape} in all, float32, eager, alternating: one process with {world} threads {one:.1f} ms, "
        f"{world} processes with one thread each {many:.1f} ms, ratio **{middle:.2f}** ({low:.2f} to {high:.2f})."
    )


def _messages_table() -> str:
    step = Step(64, 64, 64, 768, OPTIONS, feature_bytes=1024, storage_bytes=2)
    lines = ["| what | collective | messages | buffer of a rank | a rank sends |", "| --- | --- | ---: | ---: | ---: |"]
    total = 0.0
    for what, collective, count, size in messages(step):
        sent = sent_bytes(collective, size, step.world)
        total += sent
        lines.append(f"| {what} | {collective} | {count} | {_size(size)} | {_size(sent)} |")
    lines.append(f"| all | | {sum(count for _, _, count, _ in messages(step))} | | {_size(total)} |")
    return "\n".join(lines)


def _clusters_table() -> str:
    lines = [
        "| documents | GPUs | memory of a part | pass over it | messages: latency | bytes | step | largest message |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for capacity in (10**8, 10**9):
        for world in (64, 256, 1024):
            step = Step(world, 64, 64, 768, OPTIONS, feature_bytes=1024, storage_bytes=2)
            sent = [(sent_bytes(collective, size, world), what) for what, collective, _, size in messages(step)]
            passing = 2 * step.batch * capacity * step.dim / CLUSTER_FLOPS
            latency = sum(count for _, _, count, _ in messages(step)) * CLUSTER_SECONDS_PER_MESSAGE
            moving = sum(size for size, _ in sent) / CLUSTER_BYTES_PER_SECOND
            size, what = max(sent)
            memory = capacity / world * (step.storage_bytes * step.dim + step.feature_bytes + 28)
            cells = (
                f"10^{len(str(capacity)) - 1}",
                str(world),
                _size(memory),
                *(f"{seconds * 1e3:.{digits}f} ms" for seconds, digits in ((passing, 0), (latency, 1), (moving, 1))),
                f"{(passing + latency + moving) * 1e3:.0f} ms",
                f"{what}, {_size(size)}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


if __name__ == "__main__":
    sys.exit(main())
