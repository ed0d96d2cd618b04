"""A step over ten million documents: ``python -m examples.benchmarks.large``, int8 embeddings and features in files."""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

import negcache_fn
from examples.benchmarks.hardware import describe
from examples.benchmarks.memory import forget_peak, status_bytes, supported
from examples.benchmarks.problem import SCALE, fill_
from examples.benchmarks.report import fill_page
from examples.command_line import CommandParser, positive, run
from negcache_fn import StepOptions

_SEED = 0


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints the table, and fills a page; returns the exit status."""
    parser = CommandParser("benchmarks.large", description=__doc__)
    parser.add_argument("--documents", type=positive, default=10**7, help="slots of the cache, all taken")
    parser.add_argument("--dim", type=positive, default=128, help="dimensions of an embedding")
    parser.add_argument("--tokens", type=positive, default=128, help="int32 features of a document")
    parser.add_argument("--batch", type=positive, default=256, help="queries, and draws for the batch")
    parser.add_argument("--steps", type=positive, default=5, help="timed after one to warm up")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for the files (default: a temporary one)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="fill this page")
    return run(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    if not supported("cpu"):
        raise ValueError("memory is measured by /proc/self, which this system does not have")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        made = {"large": _measure(options, Path(folder))}
    print(made["large"])
    if options.page is not None:
        fill_page(options.page, made)


def _measure(options: argparse.Namespace, folder: Path) -> str:
    generator = torch.Generator().manual_seed(_SEED)
    example = {"tokens": torch.zeros(1, options.tokens, dtype=torch.int32)}
    small = negcache_fn.init_cache(1, options.dim, example, embedding_dtype=torch.int8, seed=_SEED)
    state = negcache_fn.memory_mapped(small, folder, capacity=options.documents)
    fill_(state, options.batch, generator)
    _leave_to_disk(folder, state["items", "features", "tokens"])
    rows = [_row(name, state, chosen, options, generator) for name, chosen in _ways(options.batch).items()]
    hardware, kept = describe("cpu"), _in_memory(state)
    return "\n".join(
        [
            f"{options.documents:,} documents, B={options.batch}, D={options.dim}, {options.tokens} tokens each, "
            f"eager, on {hardware['cpu']}, {hardware['threads']} threads. In memory: {_gigabytes(kept)} of "
            f"embeddings, ids and steps; in files: {_gigabytes(_in_files(folder))} of features.",
            "",
            "| | step | of which the draw | peak memory | of which pages of the files |",
            "| --- | ---: | ---: | ---: | ---: |",
            *rows,
        ]
    )


def _ways(batch: int) -> dict[str, StepOptions]:
    return {
        "a draw per query": StepOptions(draws_per_query=1),
        f"{batch} draws for the batch": StepOptions(num_draws=batch),
    }


def _row(
    name: str, state: TensorDictBase, chosen: StepOptions, options: argparse.Namespace, generator: torch.Generator
) -> str:
    queries = _unit(options.batch, options.dim, generator).requires_grad_()
    features = {"tokens": torch.ones(options.batch, options.tokens, dtype=torch.int32)}
    encoded = _unit(2 * options.batch, options.dim, generator).requires_grad_()
    ids = torch.arange(options.batch) + int(state["items", "id"].max()) + 1

    def step() -> None:
        out = negcache_fn.step_(
            state,
            queries,
            features,
            lambda given: encoded[-given["tokens"].shape[0] :],
            options=chosen,
            scale=SCALE,
            ids=ids,
        )
        out.loss.backward()
        ids.add_(options.batch)

    importance = None if chosen.num_draws is None else torch.full((options.batch,), 0.5)

    def draw() -> None:
        negcache_fn.sample_gumbel(
            state,
            queries.detach(),
            scale=SCALE,
            num_draws=chosen.num_draws,
            draws_per_query=chosen.draws_per_query,
            importance=importance,
        )

    forget_peak()
    stepping = _seconds(step, options.steps, name)
    peak, mapped = status_bytes("VmHWM"), status_bytes("RssFile")
    drawing = _seconds(draw, options.steps, f"{name}: draws alone")
    cells = (name, f"{stepping:.2f} s", f"{drawing:.2f} s", _gigabytes(peak), _gigabytes(mapped))
    return f"| {' | '.join(cells)} |"


def _seconds(call: Callable[[], None], count: int, name: str) -> float:
    """The median, after one call to warm up."""
    seconds: list[float] = []
    for _ in tqdm(range(count + 1), desc=name, unit="call", leave=False):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _unit(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    return normalize(torch.randn(rows, dim, generator=generator))


def _leave_to_disk(folder: Path, mapped: Tensor) -> None:
    """Has the system write the files and forget their pages, so that rows are read from the disk."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(mapped.nbytes), mmap.MADV_DONTNEED)
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _in_memory(state: TensorDictBase) -> int:
    kept = {key: value for key, value in state["items"].items() if key != "features"}
    return sum(value.nbytes for value in kept.values())


def _in_files(folder: Path) -> int:
    return sum(512 * file.stat().st_blocks for file in folder.iterdir())


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
