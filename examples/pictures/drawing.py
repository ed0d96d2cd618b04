"""How the pictures look: two colour schemes, large type, and files that are the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["THEMES", "Theme", "canvas", "save"]


class Theme(NamedTuple):
    """Colours on a transparent ground: `ink` for words, `faint` for lines and boxes, the rest for what is shown."""

    ink: str
    faint: str
    ours: str
    other: str
    accent: str


THEMES = {
    "light": Theme(ink="#30363d", faint="#d3d8de", ours="#1668b8", other="#7a828c", accent="#b86e00"),
    "dark": Theme(ink="#dfe3ea", faint="#454b57", ours="#6cb2f0", other="#9aa3af", accent="#f0b357"),
}

_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 17,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 17,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "lines.linewidth": 3,
    "lines.markersize": 8,
    "svg.fonttype": "path",
    "svg.hashsalt": "negcache_fn",  # names of clip paths are random otherwise
}


def save(name: str, draw: Callable[[Theme], Figure], folder: Path) -> list[Path]:
    """Writes NAME_light.svg and NAME_dark.svg; returns what it wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for scheme, theme in THEMES.items():
        file = folder / f"{name}_{scheme}.svg"
        with mpl.rc_context(_STYLE | _colors(theme)):
            draw(theme).savefig(file, transparent=True, metadata={"Date": None, "Creator": None})
        # matplotlib leaves blanks at the ends of lines
        lines = file.read_text(encoding="utf-8").splitlines()
        file.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")
        written.append(file)
    return written


def canvas(
    width: float = 7.2, height: float = 4.0, rows: int = 1, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with ``rows`` plots, one above the other, or one for each of the relative ``heights``.

    At the width of a phone its labels have the size of small print.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    ratios = [1.0] * rows if heights is None else list(heights)
    grid = figure.add_gridspec(len(ratios), 1, height_ratios=ratios)
    return figure, [figure.add_subplot(grid[row]) for row in range(len(ratios))]


def _colors(theme: Theme) -> dict[str, str]:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), theme.ink)
    return ink | dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), theme.faint)
