"""Runs the trials of a grid on all cores, and keeps every result as a line of JSON: what is there is not run again."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.experiments.gradients import run_gradients
from examples.experiments.grid import Comparison, GradientStudy, Grid, Lexical, Trial
from examples.experiments.keys import described
from examples.experiments.tasks import Source, Task, load_task
from examples.experiments.trial import run_lexical, run_trial
from examples.interruptions import leave_interrupts_to_parent

__all__ = ["Results", "final_trials", "read_results", "run_grid"]

Results = dict[str, dict[str, Any]]
"""What `run_trial` gave, by the key of the trial; so for what else is asked."""

_Asked = Trial | GradientStudy | Lexical


def run_grid(grid: Grid, out: Path, *, jobs: int) -> Results:
    """Tunes and trains what each comparison asks for; returns all results, those of earlier calls among them.

    Args:
        grid: the comparisons.
        out: where ``results.jsonl`` and the corpus are kept.
        jobs: trials at a time, each in a process with one thread.
    """
    found = read_results(out)
    with _processes(jobs) as pool:
        for comparison in grid.comparisons:
            corpus = _load(comparison.source, out).key  # kept there before all processes ask for it
            _run(pool, [comparison.lexical], out, found, corpus, f"{comparison.name}: tf-idf")
            _run(pool, comparison.tuning(), out, found, corpus, f"{comparison.name}: tuning")
            _run(pool, final_trials(comparison, found), out, found, corpus, comparison.name)
        for study in grid.gradients:
            _run(pool, [study], out, found, _load(study.source, out).key, f"{study.name}: gradients")
    return found


def final_trials(comparison: Comparison, found: Results) -> list[Trial]:
    """Those whose test figures count, seed by seed."""
    trials = [trial for method in comparison.methods for trial in comparison.final(method, found).values()]
    return sorted({trial.key: trial for trial in trials}.values(), key=lambda trial: trial.seed)


def read_results(out: Path) -> Results:
    """What ``results.jsonl`` holds; a line that an interrupted run left unfinished is dropped."""
    file = out / "results.jsonl"
    if not file.exists():
        return {}
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return {row["key"]: row["result"] for row in map(json.loads, whole.splitlines())}


def _run(pool: Executor, wanted: Sequence[_Asked], out: Path, found: Results, corpus: str, name: str) -> None:
    """Runs what is not found, or was found on another corpus."""
    missing = [asked for asked in wanted if found.get(asked.key, {}).get("corpus") != corpus]
    progress = tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=name, unit="run", dynamic_ncols=True)
    with progress, (out / "results.jsonl").open("a", encoding="utf-8") as file:
        for done in as_completed([pool.submit(_run_one, asked, out) for asked in missing]):
            asked, result = done.result()
            found[asked.key] = _rounded(result)
            file.write(json.dumps({"key": asked.key, "asked": described(asked), "result": found[asked.key]}) + "\n")
            file.flush()
            progress.update()


def _run_one(asked: _Asked, out: Path) -> tuple[_Asked, dict[str, Any]]:
    task = _load(asked.source, out)
    match asked:
        case Trial():
            result = run_trial(asked, task)
        case GradientStudy():
            result = run_gradients(asked, task)
        case Lexical():
            result = run_lexical(task)
    return asked, {"corpus": task.key, **result}


def _rounded(value: Any) -> Any:
    """Six digits, so that lines can be read and a file of them published."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


@contextmanager
def _processes(count: int) -> Iterator[Executor]:
    """So many; what they are at when an error or an interruption comes is given up."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=leave_interrupts_to_parent) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


@lru_cache(maxsize=2)
def _load(source: Source, out: Path) -> Task:
    return load_task(source, out)
