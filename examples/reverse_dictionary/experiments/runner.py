"""Runs what is missing of the comparison; every result is a line of JSON, and a line that is there is not run again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.reverse_dictionary.experiments.methods import Method
from examples.reverse_dictionary.experiments.tasks import DICTIONARY
from examples.reverse_dictionary.experiments.trial import Setting, Trial, run_trial, seconds_per_step
from examples.whole_files import written_whole

__all__ = ["Plan", "run_plan"]

_ROUNDS = 3


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    methods: tuple[Method, ...]
    seconds: tuple[float, ...]
    """Budgets; each has trainings of its own, whose learning rate falls to 0 at their end."""
    tune_seconds: float
    rates: tuple[float, ...]
    seeds: int


def run_plan(plan: Plan, setting: Setting, out: Path) -> list[dict[str, Any]]:
    """Measures what steps cost, tunes each method on validation queries, runs its seeds; returns the whole file."""
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    costs = _costs(plan, setting, out / "costs.json")
    file = out / "results.jsonl"
    found = {row["key"]: row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    wanted = [*_tuning(plan, costs)]
    for trial in tqdm(wanted, desc="tuning", unit="run"):
        _run(trial, setting, found, file)
    finals = [*_finals(plan, costs, found, setting)]
    for trial in tqdm(finals, desc="comparison", unit="run"):
        _run(trial, setting, found, file)
    return list(found.values())


def _costs(plan: Plan, setting: Setting, file: Path) -> dict[str, float]:
    """Seconds of a step by the name of its method: the least of some rounds, in which the methods take turns."""
    costs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = [method for method in plan.methods if method.name not in costs]
    if not missing:
        return costs
    for _ in tqdm(range(_ROUNDS), desc="cost of a step", unit="round"):
        for method in missing:
            seconds = seconds_per_step(method, setting)
            costs[method.name] = min(seconds, costs.get(method.name, seconds))
    with written_whole(file) as unfinished:
        unfinished.write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")
    return costs


def _tuning(plan: Plan, costs: dict[str, float]) -> Iterator[Trial]:
    if len(plan.rates) > 1:
        for rate in plan.rates:
            for method in plan.methods:
                steps = int(plan.tune_seconds / costs[method.name])
                yield Trial(method, rate, plan.tune_seconds, steps, 0, "validation")


def _finals(plan: Plan, costs: dict[str, float], found: dict[str, dict[str, Any]], setting: Setting) -> Iterator[Trial]:
    tuned = [(trial, found[_key(trial, setting)]["result"]["mrr@10"]) for trial in _tuning(plan, costs)]
    for seconds in plan.seconds:
        for seed in range(1, plan.seeds + 1):
            for method in plan.methods:
                tried = [(mrr, trial.rate) for trial, mrr in tuned if trial.method == method]
                rate = max(tried)[1] if tried else plan.rates[0]
                yield Trial(method, rate, seconds, int(seconds / costs[method.name]), seed, "test")


def _run(trial: Trial, setting: Setting, found: dict[str, dict[str, Any]], file: Path) -> None:
    key = _key(trial, setting)
    if key not in found:
        result = run_trial(trial, setting)
        found[key] = {"key": key, "asked": json.loads(_text(trial)), "result": result}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found[key]) + "\n")


def _key(trial: Trial, setting: Setting) -> str:
    of_setting = [Path(setting.model).name, setting.layers, setting.bf16]
    if setting.task.name != DICTIONARY:
        of_setting.append(setting.task.name)
    text = _text(trial) + json.dumps(of_setting)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _text(trial: Trial) -> str:
    fields = asdict(trial)
    fields["method"] = {name: value for name, value in fields["method"].items() if value is not None}
    return json.dumps(fields, sort_keys=True, default=repr)
