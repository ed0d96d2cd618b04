"""Log-log plots of the sweeps, each in a light and a dark variant: time, and peak memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from examples.benchmarks.experiments import Row
from examples.pictures.drawing import THEMES, Theme, canvas, save

__all__ = ["draw", "markdown"]


class _Panel(NamedTuple):
    """The field on the x axis and its name; the key, factor and unit of the y axis."""

    field: str
    label: str
    key: str
    factor: float
    unit: str


_TIME = ("seconds_median", 1e3, "ms")
_PANELS = {
    "capacity": _Panel("capacity", "slots of the cache, C", *_TIME),
    "batch": _Panel("batch", "queries, B", *_TIME),
    "dim": _Panel("dim", "dimensions, D", *_TIME),
    "samples": _Panel("samples", "draws per query, k", *_TIME),
    "memory": _Panel("capacity", "slots of the cache, C", "peak_bytes", 2**-20, "MiB beyond the state"),
}
_SECTIONS = {"time_pictures": ("capacity", "batch", "dim", "samples"), "memory_picture": ("memory",)}
# Two more colours than a theme has; they can be read on a light and on a dark ground.
_GREEN, _RED = "#1a9e77", "#d0563c"
_DASHED = (0, (4, 2))
_LINES = {
    "product": ("bare product", "ink", _DASHED),
    "batch": ("negcache_fn, draws for the batch", "ours", _DASHED),
    "ours": ("negcache_fn, draws per query", "ours", "-"),
    "ours-eager": ("… eager", "ours", ":"),
    "ours-int8": ("… int8 storage", _GREEN, "-"),
    "softmax": ("full softmax", "other", "-"),
    "port": ("the port", "accent", "-"),
    "port-top64": ("the port, top_k=64", "accent", _DASHED),
    "memory-bank": ("CrossBatchMemory", _RED, "-"),
}


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Writes benchmark_NAME_light.svg and _dark.svg for every sweep that has rows; returns their paths."""
    written: list[Path] = []
    for name in _measured(rows):
        written += save(f"benchmark_{name}", partial(_figure, rows=rows, name=name), folder)
    return written


def markdown(rows: list[Row]) -> dict[str, str]:
    """The links to the pictures in images/, by section of the page."""
    measured = _measured(rows)
    made: dict[str, str] = {}
    for section, names in _SECTIONS.items():
        blocks = [
            "\n".join(f"![{_alt(name)}](images/benchmark_{name}_{scheme}.svg#only-{scheme})" for scheme in THEMES)
            for name in names
            if name in measured
        ]
        if blocks:
            made[section] = "\n\n".join(blocks)
    return made


def _measured(rows: list[Row]) -> list[str]:
    return [name for name, panel in _PANELS.items() if any(_is_point(row, name, panel) for row in rows)]


def _is_point(row: Row, name: str, panel: _Panel) -> bool:
    return row["experiment"] == name and panel.key in row


def _alt(name: str) -> str:
    what = "Peak memory" if name == "memory" else "Time"
    return f"{what} of each method over the {_PANELS[name].label}, both axes logarithmic"


def _figure(theme: Theme, rows: list[Row], name: str) -> Figure:
    figure, (axes,) = canvas(height=6.6)
    panel = _PANELS[name]
    of_panel = [row for row in rows if _is_point(row, name, panel)]
    for method, (label, color, style) in _LINES.items():
        points = [
            (row["shape"][panel.field], row[panel.key] * panel.factor) for row in of_panel if row["method"] == method
        ]
        if points:
            shown = getattr(theme, color, color)
            axes.plot(*zip(*points, strict=True), color=shown, linestyle=style, marker="o", markersize=5, label=label)
    axes.set(xlabel=panel.label, ylabel=panel.unit)
    axes.set_title(_title(of_panel[0], panel.field), pad=12)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid()
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=14, columnspacing=1.2, handlelength=1.6)
    return figure


def _title(row: Row, field: str) -> str:
    """The sizes that stay the same."""
    names = {"batch": "B", "capacity": "C", "dim": "D", "samples": "k"}
    return ", ".join(f"{letter}={row['shape'][name]:,}" for name, letter in names.items() if name != field)
