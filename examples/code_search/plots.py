"""The picture of a training: what the cache gains, and how stale it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from examples.code_search.methods import METHODS

__all__ = ["draw"]

_COLORS = {"in_batch": "#7a828c", "random": "#c98500", "cache": "#1668b8"}
_INK = "#30363d"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": "#b8bec5",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "grid.color": "#e6e9ec",
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_SMOOTHED_STEPS = 50

History = list[dict[str, float]]


def draw(histories: dict[str, History], lexical_mrr: float, file: Path) -> None:
    """Draws MRR@10, loss, age and drift over the steps.

    Args:
        histories: by method name, one row a step, as in metrics.jsonl.
        lexical_mrr: validation MRR@10 of tf-idf, for comparison.
        file: the PNG to write.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 5.4), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        axes: dict[str, Axes] = figure.subplot_mosaic(
            [["mrr", "loss"], ["mrr", "age"], ["mrr", "drift"]], width_ratios=[1.5, 1]
        )
        _draw_mrr(axes["mrr"], histories, lexical_mrr)
        for method in METHODS:
            _draw_smoothed(axes["loss"], histories[method.name], "loss", _COLORS[method.name])
        _draw_smoothed(axes["age"], histories["cache"], "cache_age_steps", _COLORS["cache"])
        _draw_smoothed(axes["drift"], histories["cache"], "drift", _COLORS["cache"])
        axes["loss"].set_title("Training loss, over each run's classes")
        axes["age"].set_title("Mean age of the cache (steps)")
        axes["drift"].set_title("Drift of the drawn documents")
        for name in ("loss", "age", "drift"):
            axes[name].set_ylim(bottom=0)
            axes[name].sharex(axes["mrr"])
            axes[name].xaxis.set_major_locator(MaxNLocator(5))
        for name in ("loss", "age"):
            axes[name].tick_params(labelbottom=False)
        for name in ("mrr", "drift"):
            axes[name].set_xlabel("step")
        figure.savefig(file)


def _draw_mrr(axes: Axes, histories: dict[str, History], lexical_mrr: float) -> None:
    axes.set_title("MRR@10 of held-out queries over all functions (validation modules)")
    axes.axhline(lexical_mrr, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    labels = [(lexical_mrr, f"tf-idf {lexical_mrr:.3f}", _INK)]
    for method in METHODS:
        evaluated = [row for row in histories[method.name] if "mrr@10" in row]
        steps, values = [row["step"] for row in evaluated], [row["mrr@10"] for row in evaluated]
        axes.plot(steps, values, color=_COLORS[method.name], linewidth=2.2, marker="o", markersize=4.5)
        labels.append((values[-1], f"{method.label} {values[-1]:.3f}", _COLORS[method.name]))
    last = max(history[-1]["step"] for history in histories.values())
    axes.set_xlim(0, last * 1.02)
    low, high = axes.get_ylim()
    labels.sort()
    heights = _spread([value for value, _, _ in labels], gap=(high - low) * 0.045)
    for height, (_, text, color) in zip(heights, labels, strict=True):
        axes.annotate(text, (last, height), (8, 0), textcoords="offset points", color=color, va="center", weight="bold")


def _spread(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved apart until neighbours are at least ``gap`` from each other."""
    spread: list[float] = []
    for height in heights:
        spread.append(max(height, spread[-1] + gap) if spread else height)
    return spread


def _draw_smoothed(axes: Axes, history: History, key: str, color: str) -> None:
    """The mean of the last steps, up to _SMOOTHED_STEPS of them."""
    steps = np.array([row["step"] for row in history])
    total = np.cumsum([0.0, *(row[key] for row in history)])
    window = np.minimum(np.arange(1, len(history) + 1), _SMOOTHED_STEPS)
    ends = np.arange(1, len(history) + 1)
    axes.plot(steps, (total[ends] - total[ends - window]) / window, color=color, linewidth=1.6)
