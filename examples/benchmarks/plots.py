"""Log-log plots of the sweeps: time, and peak memory."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.benchmarks.experiments import Row

__all__ = ["draw"]

_AXES = {
    "capacity": "slots of the cache, C",
    "batch": "queries, B",
    "dim": "dimensions, D",
    "samples": "draws per query, k",
}
_LINES = {
    "product": ("bare product", "#30363d", (0, (4, 3))),
    "ours": ("negcache_fn", "#1668b8", "-"),
    "ours-eager": ("negcache_fn, eager", "#1668b8", ":"),
    "ours-bf16": ("negcache_fn, bfloat16", "#1a9e77", "-"),
    "ours-bf16-eager": ("negcache_fn, bfloat16, eager", "#1a9e77", ":"),
    "softmax": ("full softmax", "#7a828c", "-"),
    "port": ("the port", "#c98500", "-"),
    "port-top64": ("the port, top_k=64", "#c98500", (0, (4, 3))),
    "memory-bank": ("CrossBatchMemory", "#b3402a", "-"),
}
_STYLE = {
    "font.size": 9.5,
    "axes.edgecolor": "#b8bec5",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": "#e6e9ec",
}


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Writes time.png and memory.png, as far as there are rows for them; returns what it wrote."""
    written: list[Path] = []
    swept = [name for name in _AXES if any(row["experiment"] == name for row in rows)]
    if swept:
        written.append(
            _figure(rows, {name: (name, "seconds_median", 1e3, "ms") for name in swept}, folder / "time.png")
        )
    if any(row["experiment"] == "memory" for row in rows):
        panels = {"memory": ("capacity", "peak_bytes", 2**-20, "MiB beyond the state")}
        written.append(_figure(rows, panels, folder / "memory.png"))
    return written


def _figure(rows: list[Row], panels: dict[str, tuple[str, str, float, str]], file: Path) -> Path:
    """One panel an experiment: (field on the x axis, key and factor of the y axis, its unit)."""
    with mpl.rc_context(_STYLE):
        columns = min(2, len(panels))
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(5.2 * columns, 3.9 * lines + 0.9), dpi=140, layout="constrained")
        handles = {}
        for place, (experiment, (field, key, factor, unit)) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(lines, columns, place)
            of_panel = [row for row in rows if row["experiment"] == experiment and key in row]
            handles |= _panel(axes, of_panel, field, key, factor)
            axes.set(xscale="log", yscale="log", xlabel=_AXES[field], ylabel=unit, title=_title(of_panel, field))
            axes.set_xscale("log", base=2)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=1 + columns, frameon=False)
        figure.savefig(file)
    return file


def _panel(axes: Axes, rows: list[Row], field: str, key: str, factor: float) -> dict[str, object]:
    handles: dict[str, object] = {}
    for method, (label, color, style) in _LINES.items():
        points = [(row["shape"][field], row[key] * factor) for row in rows if row["method"] == method]
        if points:
            x, y = zip(*points, strict=True)
            (handles[label],) = axes.plot(x, y, color=color, linestyle=style, marker="o", markersize=3, linewidth=1.6)
    return handles


def _title(rows: list[Row], field: str) -> str:
    """The sizes that stay."""
    if not rows:
        return ""
    names = {"batch": "B", "capacity": "C", "dim": "D", "samples": "k"}
    shape = rows[0]["shape"]
    return ", ".join(f"{letter}={shape[name]:,}" for name, letter in names.items() if name != field)
