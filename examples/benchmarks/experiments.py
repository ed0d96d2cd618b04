"""The experiments: the main sizes with every method, the sweeps, the updates, the peak memory."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.benchmarks import memory
from examples.benchmarks.hardware import available_bytes, others_cpu_seconds
from examples.benchmarks.methods import BASELINE, Call, Method, UnavailableError
from examples.benchmarks.problem import TOKENS, Problem
from examples.benchmarks.registry import select
from examples.benchmarks.shapes import Shape
from examples.benchmarks.timing import Rounds, interleave, summarize
from examples.benchmarks.updates import UPDATES

__all__ = ["Experiments", "Row"]

Row = dict[str, Any]
"""experiment, shape, method, label, and either the figures or the reason why there are none ("skipped")."""

_LONGEST_CALL_SECONDS = 8.0
_SHARE_OF_MEMORY = 0.6
_QUIET_CORES = 0.1  # more than this and every parallel operation waits for a core: times are several times too long


@dataclass(frozen=True)
class Experiments:
    """Runs them; every method returns rows."""

    device: str
    reference: Path | None
    compiled: bool
    rounds: Rounds

    def sizes(self, shapes: Iterable[Shape]) -> list[Row]:
        """Every method at every size."""
        return [row for shape in shapes for row in self._times("sizes", shape, self._methods(), {})]

    def sweep(self, name: str, shapes: Iterable[Shape]) -> list[Row]:
        """The methods that are swept, over ascending sizes; what took long at one size is left out at larger ones."""
        methods = [method for method in self._methods() if method.swept]
        rows: list[Row] = []
        seconds_per_flop: dict[str, float] = {}
        for shape in shapes:
            rows += self._times(name, shape, methods, seconds_per_flop)
        return rows

    def updates(self, shape: Shape) -> list[Row]:
        """What writing costs, relative to the compiled step where there is one, else to the eager one."""
        methods = [method for method in UPDATES if self.compiled or not method.compiled]
        return self._times("updates", shape, methods, {}, baseline=methods[0].name)

    def memory(self, shapes: list[Shape]) -> list[Row]:
        """Peak memory of the swept methods beyond their state, over ascending sizes."""
        if not memory.supported(self.device):
            return []
        methods = [method for method in self._methods() if method.swept]
        rows: list[Row] = []
        for method in tqdm(methods, desc="memory", unit="process"):
            fitting = [shape for shape in shapes if self._fits(method, shape) is None]
            measured = memory.measure(method, fitting, self.device, self.reference)
            for shape in shapes:
                figures = {"peak_bytes": measured[shape]} if shape in measured else {"skipped": "does not fit"}
                rows.append(_row("memory", shape, method, figures))
        return rows

    def _methods(self) -> list[Method]:
        return select(reference=self.reference, compiled=self.compiled)

    def _times(
        self,
        experiment: str,
        shape: Shape,
        methods: list[Method],
        seconds_per_flop: dict[str, float],
        baseline: str = BASELINE,
    ) -> list[Row]:
        calls: dict[str, Call] = {}
        skipped: dict[str, str] = {}
        problem = Problem(shape, self.device)
        for method in methods:
            reason = self._fits(method, shape)
            if reason is None and seconds_per_flop.get(method.name, 0.0) * shape.flops > _LONGEST_CALL_SECONDS:
                reason = f"over {_LONGEST_CALL_SECONDS:.0f} s"
            try:
                if reason is None:
                    calls[method.name] = method.make(problem)
            except UnavailableError as error:
                reason = str(error)
            if reason is not None:
                skipped[method.name] = reason
        with tqdm(desc=f"{experiment}: {shape}", unit="call", file=sys.stderr, leave=False) as progress:

            def on_call(name: str) -> None:
                progress.set_postfix_str(name, refresh=False)
                progress.update()

            start, others_start = time.perf_counter(), others_cpu_seconds()
            seconds = interleave(calls, self.rounds, on_call)
            others = (others_cpu_seconds() - others_start) / (time.perf_counter() - start)
        if others > _QUIET_CORES:
            print(f"{experiment}: {shape}: not a quiet machine, others took {others:.1f} cores", file=sys.stderr)
        figures = summarize(seconds, baseline)
        for name in figures:
            seconds_per_flop[name] = figures[name]["seconds_median"] / shape.flops
        del calls, problem
        gc.collect()
        return [
            _row(
                experiment,
                shape,
                method,
                {"skipped": skipped[method.name]}
                if method.name in skipped
                else figures[method.name] | {"seconds": seconds[method.name], "others_cores": round(others, 2)},
            )
            for method in methods
        ]

    def _fits(self, method: Method, shape: Shape) -> str | None:
        """None, or why the method is left out at this size."""
        tables = 3 if method.name in ("port", "port-top64", "memory-bank") else 2
        state = tables * shape.capacity * (4 * shape.dim + 8 * TOKENS + 32)
        needed = state + method.bytes_needed(shape)
        limit = _SHARE_OF_MEMORY * available_bytes(self.device)
        return f"needs about {needed / 2**30:.0f} GiB" if needed > limit else None


def _row(experiment: str, shape: Shape, method: Method, figures: Row) -> Row:
    return {
        "experiment": experiment,
        "shape": asdict(shape),
        "method": method.name,
        "label": method.label,
        **figures,
    }


def reset_compiler() -> None:
    """Forgets what was compiled, so that an experiment does not depend on the ones before."""
    torch.compiler.reset()
