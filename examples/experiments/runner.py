"""Runs the trials of a grid on all cores, and keeps every result as a line of JSON: what is there is not run again."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.experiments.gradients import run_gradients
from examples.experiments.grid import Comparison, GradientStudy, Grid, Trial
from examples.experiments.tasks import Source, Task, load_task
from examples.experiments.trial import run_trial

__all__ = ["Results", "final_trials", "read_results", "run_grid"]

Results = dict[str, dict[str, Any]]
"""What `run_trial` gave, by the key of the trial."""


def run_grid(grid: Grid, out: Path, *, jobs: int) -> Results:
    """Tunes and trains what each comparison asks for; returns all results, those of earlier calls among them.

    Args:
        grid: the comparisons.
        out: where ``results.jsonl`` and the corpus are kept.
        jobs: trials at a time, each in a process with one thread.
    """
    found = read_results(out)
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=_leave_interrupts_to_parent) as pool:
        for comparison in grid.comparisons:
            corpus = _load(comparison.source, out).key  # kept there before all processes ask for it
            _run(pool, comparison.tuning(), out, found, corpus, f"{comparison.name}: tuning")
            _run(pool, final_trials(comparison, found), out, found, corpus, comparison.name)
        for study in grid.gradients:
            corpus = _load(study.source, out).key
            _run(pool, [study], out, found, corpus, f"{study.name}: gradients")
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


def _run(pool: Any, trials: Sequence[Trial | GradientStudy], out: Path, found: Results, corpus: str, name: str) -> None:
    """Runs what is not found, or was found on another corpus."""
    missing = [trial for trial in trials if found.get(trial.key, {}).get("corpus") != corpus]
    progress = tqdm(total=len(trials), initial=len(trials) - len(missing), desc=name, unit="run", dynamic_ncols=True)
    with progress, (out / "results.jsonl").open("a", encoding="utf-8") as file:
        for trial, result in pool.imap_unordered(_run_one, [(trial, out) for trial in missing]):
            file.write(json.dumps({"key": trial.key, "asked": asdict(trial), "result": result}) + "\n")
            file.flush()
            found[trial.key] = result
            progress.update()


def _run_one(work: tuple[Trial | GradientStudy, Path]) -> tuple[Trial | GradientStudy, dict[str, Any]]:
    asked, out = work
    task = _load(asked.source, out)
    result = run_trial(asked, task) if isinstance(asked, Trial) else run_gradients(asked, task)
    return asked, {"corpus": task.key, **result}


@lru_cache(maxsize=2)
def _load(source: Source, out: Path) -> Task:
    return load_task(source, out)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
