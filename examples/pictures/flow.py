"""The diagram of a step, with the sizes of one that was run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

import negcache_fn
from examples.pictures.drawing import Theme
from examples.pictures.training import Run, train
from negcache_fn import StepOptions

__all__ = ["Sizes", "diagram", "sizes_of_a_step"]


class Sizes(NamedTuple):
    """What a step read and wrote, counted."""

    queries: int
    capacity: int
    drawn: int
    encoded: int
    written: int


def sizes_of_a_step(*, capacity: int = 1024, draws_per_query: int = 4, steps: int = 80) -> Sizes:
    """Of the last of so many steps: how much was encoded and how many slots have another embedding after it."""
    encoded: list[int] = []
    before: list[torch.Tensor] = []
    found: list[Sizes] = []

    def look(step: int, run: Run, out: negcache_fn.StepOutput) -> None:
        if step == 0:
            run.documents.register_forward_hook(lambda _, __, embeddings: encoded.append(len(embeddings)))
        embeddings = run.state["items", "embedding"]
        if step == steps - 1:
            changed = int((embeddings != before[-1]).any(1).sum())
            found.append(Sizes(len(out.draw.slot), capacity, out.draw.slot.numel(), encoded[-1], changed))
        before[:] = [embeddings.clone()]

    train(steps, capacity=capacity, options=StepOptions(draws_per_query=draws_per_query), look=look)
    return found[0]


def diagram(theme: Theme, sizes: Sizes) -> Figure:
    """Boxes from top to bottom, so that it is as narrow as a phone."""
    figure = Figure(figsize=(7.2, 8.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 72), ylim=(0, 86))
    axes.axis("off")
    _box(axes, (22, 76), (40, 14), theme.ours, f"cache: {sizes.capacity:,} slots", "features, embeddings")
    _box(axes, (59, 76), (23, 14), theme.other, f"{sizes.queries} queries", "encoded")
    _box(axes, (36, 54), (50, 13), theme.ours, "1  draw", f"{sizes.drawn} slots, by the softmax")
    batch = f"{sizes.encoded - sizes.drawn} of the batch, {sizes.drawn} drawn"
    _box(axes, (36, 37), (50, 13), theme.accent, f"2  encode {sizes.encoded} documents", batch)
    _box(axes, (36, 20), (50, 13), theme.other, "3  loss", "over batch and whole cache")
    _box(axes, (36, 5), (50, 8), theme.ours, f"4  write {sizes.written} slots")
    for path in (
        [(22, 69), (22, 60.5)],
        [(54, 69), (54, 60.5)],
        [(36, 47.5), (36, 43.5)],
        [(36, 30.5), (36, 26.5)],
        [(36, 13.5), (36, 9)],
        [(11, 5), (5, 5), (5, 69)],
    ):
        _arrow(axes, path, theme.ink)
    _arrow(axes, [(61, 20), (67, 20), (67, 37), (61, 37)], theme.accent, linestyle="dashed")
    for x, y, words, color in ((2.2, 37, "fresh embeddings", theme.ink), (69.8, 28.5, "gradient", theme.accent)):
        axes.text(x, y, words, rotation=90, ha="center", va="center", color=color)
    return figure


def _box(
    axes: Axes, middle: tuple[float, float], size: tuple[float, float], color: str, title: str, below: str = ""
) -> None:
    corner = (middle[0] - size[0] / 2, middle[1] - size[1] / 2)
    style = "round,pad=0,rounding_size=1.5"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, facecolor="none", edgecolor=color, linewidth=3))
    axes.text(middle[0], middle[1] + (2.6 if below else 0), title, ha="center", va="center", weight="bold", size=19)
    axes.text(middle[0], middle[1] - 2.8, below, ha="center", va="center", size=16)


def _arrow(axes: Axes, points: list[tuple[float, float]], color: str, *, linestyle: str = "solid") -> None:
    """Along straight lines from the first point to the last."""
    axes.add_patch(
        FancyArrowPatch(
            path=Path(points), arrowstyle="-|>", mutation_scale=22, color=color, linewidth=2.5, linestyle=linestyle
        )
    )
