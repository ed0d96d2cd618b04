"""The pictures with axes, each a figure of numbers from `measures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter, ScalarFormatter

from examples.pictures.drawing import Theme, canvas
from examples.pictures.measures import Correction, Drift, Gradients, Life, Mass
from examples.pictures.training import BATCH

__all__ = ["correction", "drift", "gradients", "life", "mass"]


def mass(theme: Theme, found: Mass) -> Figure:
    figure, (axes,) = canvas(height=3.6)
    bars = {
        f"the {BATCH} hardest\nof all": (found.hardest, theme.other),
        f"{found.capacity:,} in\nthe cache": (found.cache, theme.ours),
        f"{BATCH - 1} in the\nbatch": (found.batch, theme.accent),
    }
    for place, (value, color) in enumerate(bars.values()):
        axes.barh(place, value, color=color, height=0.62)
        axes.text(value + 0.015, place, f"{value:.1%}", va="center", fontweight="bold", fontsize=20)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(f"share of the softmax over {found.documents:,} documents")
    axes.tick_params(axis="y", length=0)
    return figure


def gradients(theme: Theme, found: Gradients) -> Figure:
    figure, (axes,) = canvas()
    axes.plot(found.draws, found.shared, "o-", color=theme.ours, clip_on=False)
    axes.axhline(found.in_batch, color=theme.accent)
    for draws, value in zip(found.draws, found.shared, strict=True):
        _note(axes, f"{value:.2f}", (draws, value), (0, -26), ha="center", color=theme.ours)
    _note(axes, "with the cache", (found.draws[-1], found.shared[-1]), (0, -68), color=theme.ours)
    _note(axes, f"batch alone  {found.in_batch:.2f}", (found.draws[-1], found.in_batch), (0, 8), color=theme.accent)
    _log_ticks(axes, found.draws)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("draws per query, k")
    axes.set_ylabel("cosine to exact gradient")
    axes.grid(axis="y")
    return figure


def life(theme: Theme, lives: Mapping[str, Sequence[Life]]) -> Figure:
    """A line a document, from its arrival to its end; a dot where it was drawn, and so embedded anew."""
    figure, panels = canvas(height=6.6, rows=len(lives))
    last = max(life.left or 0 for of_kind in lives.values() for life in of_kind)
    for axes, (evict, of_kind) in zip(panels, lives.items(), strict=True):
        ends = [last + 1 if life.left is None else life.left for life in of_kind]
        in_order = sorted(range(len(ends)), key=lambda number: (ends[number], number))
        axes.barh(range(len(ends)), [ends[number] for number in in_order], height=0.3, color=theme.other)
        dots = [(step, place) for place, number in enumerate(in_order) for step in of_kind[number].drawn]
        axes.scatter(*zip(*dots, strict=True), s=60, color=theme.ours, zorder=3)
        axes.set_title(f'evict="{evict}"')
        axes.set_xlim(0, last + 1)
        axes.set_ylim(-0.8, len(ends) - 0.2)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    panels[0].annotate(
        "● drawn", (1, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", ha="right", color=theme.ours
    )
    panels[-1].set_xlabel("steps since the document came")
    return figure


def drift(theme: Theme, found: Mapping[int, Drift]) -> Figure:
    """Medians as lines, quartiles as bands."""
    figure, (axes,) = canvas()
    oldest = max(age for of_step in found.values() for age in of_step.ages)
    places = ((theme.accent, (-28, -2)), (theme.ours, (0, 10)))
    for (color, offset), (step, (ages, quartiles)) in zip(places, sorted(found.items()), strict=True):
        low, middle, high = zip(*quartiles, strict=True)
        axes.fill_between(ages, low, high, color=color, alpha=0.25, linewidth=0)
        axes.plot(ages, middle, color=color)
        _note(axes, f"step {step}", (ages[-1], high[-1]), offset, color=color)
    axes.set_xlim(0, oldest)
    axes.set_ylim(0)
    axes.set_xlabel("age of the embedding, steps")
    axes.set_ylabel("drift |fresh - stale|²")
    axes.grid(axis="y")
    return figure


def correction(theme: Theme, found: Correction) -> Figure:
    figure, (axes,) = canvas()
    for kind, color, offset in (("self_normalized", theme.ours, (0, 14)), ("none", theme.accent, (-16, -8))):
        cosines = found.cosine[kind]
        axes.plot(found.ages, cosines, "o-", color=color, clip_on=False)
        _note(axes, f"{kind}  {cosines[-1]:.2f}", (found.ages[-1], cosines[-1]), offset, color=color)
    axes.set_ylim(min(0.6, *found.cosine["none"]), 1.04)
    axes.set_xlim(0)
    axes.set_xlabel("age of all embeddings, steps")
    axes.set_ylabel("cosine to exact gradient")
    axes.grid(axis="y")
    return figure


def _note(
    axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], *, color: str, ha: str = "right"
) -> None:
    axes.annotate(text, point, offset, textcoords="offset points", ha=ha, color=color, fontweight="bold")


def _log_ticks(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
