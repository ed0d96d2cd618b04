"""Interleaved runs: a round calls every method once, in random order, so that a slow machine is slow for all."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from examples.benchmarks.methods import BASELINE, Call

__all__ = ["Rounds", "interleave", "summarize"]


@dataclass(frozen=True)
class Rounds:
    """How many: as many as `seconds` allow, within bounds."""

    seconds: float
    least: int = 5
    most: int = 30


def interleave(calls: dict[str, Call], rounds: Rounds, on_call: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds of every call in every round, after two calls of each to warm up.

    Args:
        calls: by name.
        rounds: how many.
        on_call: told the name before each call.
    """
    warm: dict[str, float] = {}
    for name, call in calls.items():
        for _ in range(2):
            on_call(name)
            warm[name] = _seconds(call)
    count = int(rounds.seconds / max(sum(warm.values()), 1e-9))
    names, order = list(calls), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(min(max(count, rounds.least), rounds.most)):
        # What ran before decides what the caches hold: nobody always follows the same one.
        for name in order.sample(names, len(names)):
            on_call(name)
            seconds[name].append(_seconds(calls[name]))
    return seconds


def summarize(seconds: dict[str, list[float]], baseline: str = BASELINE) -> dict[str, dict[str, float]]:
    """Per name: quartiles of the seconds, and of the ratio to the baseline in the same round where there is one."""
    summary: dict[str, dict[str, float]] = {}
    for name, values in seconds.items():
        summary[name] = {f"seconds_{key}": value for key, value in _quartiles(values).items()}
        if baseline in seconds:
            ratios = [value / base for value, base in zip(values, seconds[baseline], strict=True)]
            summary[name] |= {f"ratio_{key}": value for key, value in _quartiles(ratios).items()}
    return summary


def _quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"q25": low, "median": middle, "q75": high}


def _seconds(call: Call) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
