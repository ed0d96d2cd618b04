"""The picture of a training, in a light and a dark variant: what the cache gains, and how stale it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.code_search.methods import METHODS
from examples.pictures.drawing import Theme, canvas, save

__all__ = ["draw"]

_SMOOTHED_STEPS = 50

History = list[dict[str, float]]


def draw(histories: dict[str, History], lexical_mrr: float, folder: Path) -> list[Path]:
    """Writes training_light.svg and training_dark.svg: MRR@10, loss, age and drift over the steps.

    Args:
        histories: by method name, one row a step, as in metrics.jsonl.
        lexical_mrr: validation MRR@10 of tf-idf, for comparison.
        folder: where the files go.
    """
    return save("training", lambda theme: _figure(theme, histories, lexical_mrr), folder)


def _figure(theme: Theme, histories: dict[str, History], lexical_mrr: float) -> Figure:
    colors = {"in_batch": theme.other, "random": theme.accent, "cache": theme.ours}
    figure, (mrr, loss, age, drift) = canvas(height=13.0, heights=(2.2, 1, 1, 1))
    _draw_mrr(mrr, theme, colors, histories, lexical_mrr)
    for method in METHODS:
        _draw_smoothed(loss, histories[method.name], "loss", colors[method.name])
    _draw_smoothed(age, histories["cache"], "cache_age_steps", theme.ours)
    _draw_smoothed(drift, histories["cache"], "drift", theme.ours)
    mrr.set_title("MRR@10, validation queries")
    loss.set_title("Training loss, each over its classes")
    age.set_title("Mean age of the cache, steps")
    drift.set_title("Drift of the drawn documents")
    for axes in (loss, age, drift):
        axes.set_ylim(bottom=0)
        axes.sharex(mrr)
    for axes in (mrr, loss, age, drift):
        axes.grid()
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in (mrr, loss, age):
        axes.tick_params(labelbottom=False)
    drift.set_xlabel("step")
    return figure


def _draw_mrr(
    axes: Axes, theme: Theme, colors: dict[str, str], histories: dict[str, History], lexical_mrr: float
) -> None:
    """A line a method, each with its last value in the legend, highest first."""
    axes.axhline(lexical_mrr, color=theme.ink, linewidth=1.5, linestyle=(0, (4, 3)))
    labels = [(lexical_mrr, "tf-idf", theme.ink)]
    for method in METHODS:
        evaluated = [row for row in histories[method.name] if "mrr@10" in row]
        steps, values = [row["step"] for row in evaluated], [row["mrr@10"] for row in evaluated]
        axes.plot(steps, values, "o-", color=colors[method.name])
        labels.append((values[-1], method.label, colors[method.name]))
    axes.set_xlim(0, max(history[-1]["step"] for history in histories.values()) * 1.02)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.55 * (high - low))  # room for the names
    for place, (value, label, color) in enumerate(sorted(labels, reverse=True)):
        axes.annotate(
            f"{value:.3f}  {label}",
            (0, 1),
            (12, -6 - 24 * place),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            color=color,
            fontweight="bold",
        )


def _draw_smoothed(axes: Axes, history: History, key: str, color: str) -> None:
    """The mean of the last steps, up to _SMOOTHED_STEPS of them."""
    steps = np.array([row["step"] for row in history])
    total = np.cumsum([0.0, *(row[key] for row in history)])
    window = np.minimum(np.arange(1, len(history) + 1), _SMOOTHED_STEPS)
    ends = np.arange(1, len(history) + 1)
    axes.plot(steps, (total[ends] - total[ends - window]) / window, color=color, linewidth=2)
