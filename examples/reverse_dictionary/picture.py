"""The picture of a training: what it gains, and what the cache is like on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["draw"]

_INK, _GRID, _BLUE = "#30363d", "#e6e9ec", "#1668b8"
_SMALL = (
    ("loss", "Training loss, over batch and cache"),
    ("cache/cache_age_steps", "Mean age of the cache (steps)"),
    ("cache/drift", "Drift of the drawn documents"),
)


def draw(untrained: Mapping[str, float], log: Sequence[Mapping[str, Any]], documents: int, file: Path) -> None:
    """Draws MRR@10 of validation queries, loss, age and drift over the steps.

    Args:
        untrained: the measures before the first step.
        log: the trainer's ``log_history``.
        documents: how many are searched.
        file: the PNG to write.
    """
    figure = Figure(figsize=(11, 5.4), dpi=150, layout="constrained")
    names = [name for name, _ in _SMALL]
    axes = figure.subplot_mosaic([["mrr", name] for name in names], width_ratios=[1.5, 1])
    measured = [(0, untrained["mrr@10"])]
    measured += [(row["step"], row["eval_mrr@10"]) for row in log if "eval_mrr@10" in row]
    axes["mrr"].plot(*zip(*measured, strict=True), color=_BLUE, linewidth=2.2, marker="o", markersize=5)
    for (step, value), (shift, side) in ((measured[0], ((10, -4), "left")), (measured[-1], ((0, 9), "center"))):
        axes["mrr"].annotate(f"{value:.3f}", (step, value), shift, textcoords="offset points", ha=side, color=_INK)
    axes["mrr"].margins(x=0.06, y=0.12)
    _style(axes["mrr"], f"MRR@10 of held-out definitions over {documents:,} entries")
    for name, title in _SMALL:
        points = [(row["step"], row[name]) for row in log if name in row]
        axes[name].plot(*(zip(*points, strict=True) if points else ((), ())), color=_BLUE, linewidth=1.6)
        axes[name].set_ylim(bottom=0)
        axes[name].sharex(axes["mrr"])
        _style(axes[name], title)
    for name in ("mrr", names[-1]):
        axes[name].set_xlabel("step", color=_INK)
    for name in names[:-1]:
        axes[name].tick_params(labelbottom=False)
    figure.savefig(file)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
