"""The pictures of the evidence, each a figure of numbers from the results."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from examples.experiments.grid import Comparison, GradientStudy
from examples.experiments.report import curve_of, lines
from examples.experiments.runner import Results
from examples.pictures.drawing import Theme, canvas, save

__all__ = ["draw_comparison", "draw_gradients"]


def draw_comparison(comparison: Comparison, found: Results, folder: Path) -> list[Path]:
    """One picture a budget, time left out: validation MRR@10 as it is used up; none where no method is to be shown."""
    written: list[Path] = []
    for budget in comparison.budgets:
        if budget != "seconds" and comparison.picture:
            draw = partial(_curves, comparison=comparison, found=found, budget=budget)
            written += save(f"evidence_{comparison.name}_{budget}", draw, folder)
    return written


def draw_gradients(study: GradientStudy, found: Results, folder: Path) -> list[Path]:
    """Bias and noise at the last stop, and drift on the way."""
    stops = found[study.key]["stops"]
    return [
        *save(f"evidence_gradients_{study.name}", lambda theme: _bias_and_noise(theme, study, stops), folder),
        *save(f"evidence_drift_{study.name}", lambda theme: _drift(theme, stops), folder),
    ]


def _curves(theme: Theme, comparison: Comparison, found: Results, budget: str) -> Figure:
    figure, (axes,) = canvas(height=5.0)
    most = comparison.budgets[budget]
    ends: list[tuple[float, float, str, str]] = []
    for line in lines(comparison, budget, found):
        method = line.method
        if method.name not in comparison.picture:
            continue
        runs = [_points(curve, budget, most) for curve in curve_of(comparison, method, found, budget)]
        shortest = min(map(len, runs))
        if shortest == 0:
            continue
        mean = np.mean([run[:shortest] for run in runs], axis=0)
        color = _color(theme, method.loss, method.name)
        axes.plot(mean[:, 0], mean[:, 1], color=color, linestyle="--" if method.loss == "exhaustive" else "-")
        ends.append((mean[-1, 0], mean[-1, 1], method.label, color))
    axes.set_xscale("log")
    _label_ends(axes, ends, most)
    axes.set_xlabel({"steps": "steps", "documents": "documents encoded"}[budget])
    axes.set_title("MRR@10, validation queries", pad=16)
    return figure


def _points(curve: list[dict[str, Any]], budget: str, most: float) -> list[tuple[float, float]]:
    return [(point[budget], point["validation"]["mrr@10"]) for point in curve if point[budget] <= most]


def _color(theme: Theme, loss: str, name: str) -> str:
    if loss == "cache":
        return theme.accent if "port" in name else theme.ours
    return theme.ink if loss == "exhaustive" else theme.other


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]], most: float) -> None:
    """Names right of the lines, moved apart; there is room for them inside the axes, but no scale."""
    left, _ = axes.get_xlim()
    low, high = axes.get_ylim()
    height = low - (high - low)
    for _, y, label, color in sorted(ends, key=lambda end: end[1]):
        height = max(y, height + (high - low) * 0.06)
        place: Any = {"textcoords": "offset points", "xytext": (6, 0), "va": "center", "fontsize": 14}
        axes.annotate(label, (most, height), color=color, **place).set_in_layout(False)
    axes.set_xlim(left, most * (most / left) ** 0.85)
    axes.set_ylim(low, max(high, height))
    ticks = [tick for tick in 10.0 ** np.arange(1, 9) if left <= tick <= most]
    axes.xaxis.set_major_locator(FixedLocator(ticks or [most]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _bias_and_noise(theme: Theme, study: GradientStudy, stops: list[dict[str, Any]]) -> Figure:
    stop = stops[-1]
    methods = sorted(study.methods, key=lambda method: -_error(stop["methods"][method.name]))
    figure, (axes,) = canvas(height=0.42 * len(methods) + 1.5)
    for place, method in enumerate(methods):
        row = stop["methods"][method.name]
        color = _color(theme, method.loss, method.name)
        axes.barh(place + 0.2, row["bias"], color=color, height=0.38)
        axes.barh(place - 0.2, row["noise"], color=color, height=0.38, alpha=0.45)
    axes.set_yticks(range(len(methods)), [method.label for method in methods], fontsize=14)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("bias (dark) and noise (light)")
    axes.set_title(f"Error of a gradient, step {stop['step']:,}", loc="right")
    return figure


def _error(row: dict[str, float]) -> float:
    return row["bias"] ** 2 + row["noise"] ** 2


def _drift(theme: Theme, stops: list[dict[str, Any]]) -> Figure:
    figure, (axes,) = canvas(height=3.4)
    steps = [stop["step"] for stop in stops]
    axes.plot(steps, [stop["drift"] for stop in stops], "o-", color=theme.ours, clip_on=False)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(FixedLocator(steps))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step")
    axes.set_title("|fresh - stale|² / |fresh|², mean over the cache")
    return figure
