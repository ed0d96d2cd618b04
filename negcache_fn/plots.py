"""Pictures of a cache: its metrics over a training run, and the ages of its current documents.

They need matplotlib (`pip install negcache-fn[plots]`), which is imported on the first call. A picture is a new
`matplotlib.figure.Figure`: `pyplot` and its settings stay unchanged, `figure.savefig("metrics.png")` writes it, and a
notebook shows it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.state import check_state, scalar, stored
from negcache_fn._checks import check_size
from negcache_fn._monitor.ages import bin_width, count_ages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ages", "metrics"]

_INK, _GRID, _SPINE = "#30363d", "#e6e9ec", "#b8bec5"
_COLORS = ("#1668b8", "#c98500")
_COLUMNS = 3
_POINTS = 100  # of a line, at most


class _Panel(NamedTuple):
    """One of the small pictures."""

    title: str
    unit: str
    lines: dict[str, str]  # metric: label, shown where there are two


_PANELS = (
    _Panel("Exact loss", "nats", {"exact_loss": ""}),
    _Panel("Share of the softmax", "probability", {"positive_probability": "positive", "cache_share": "cache"}),
    _Panel("Occupancy", "share of slots", {"occupancy": ""}),
    _Panel("Mean age of embeddings", "steps", {"cache_age_steps": "in the cache", "draw_age_steps": "drawn"}),
    _Panel("Drift of the draws", "|fresh - stale|² / |fresh|²", {"drift": ""}),
    _Panel("Noise of the draws", "share of the gradient", {"draw_noise": ""}),
    _Panel("Effective sample size", "draws per query", {"effective_sample_size": ""}),
    _Panel("Distinct documents drawn", "share of draws", {"unique_draws": ""}),
    _Panel("False negatives excluded", "share of pairs", {"masked_pairs": ""}),
    _Panel("Rows not finite", "rows per step, not written", {"non_finite": ""}),
)


def metrics(history: Sequence[Mapping[str, float | Tensor]], *, steps: Sequence[int] | None = None) -> "Figure":
    """A training run: each known metric over the steps, in a panel of its own.

    Args:
        history: the `metrics` of each step, or of every n-th; the values are numbers or 0-d tensors. Names that `step`
            does not have are ignored, and a metric may be missing in some entries.
        steps: the step number of each entry; 0, 1, 2, ... by default.

    Returns:
        The figure. In a long history each point is the mean over several steps.

    Raises:
        ValueError: an empty history, one without a known metric, or another number of steps.
        ImportError: matplotlib is not installed.

    Examples:
        >>> history = [{"exact_loss": 2.0, "occupancy": torch.tensor(0.5)}, {"exact_loss": 1.5, "occupancy": 1.0}]
        >>> figure = metrics(history)
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['Exact loss', 'Occupancy']
    """
    numbers = list(range(len(history))) if steps is None else list(steps)
    if len(numbers) != len(history):
        raise ValueError(f"steps has {len(numbers)} numbers; expected {len(history)}, one for each entry of history")
    series = {name: _series(history, numbers, name) for panel in _PANELS for name in panel.lines}
    panels = [panel for panel in _PANELS if any(series[name][0] for name in panel.lines)]
    if not panels:
        found = sorted({key for entry in history for key in entry})
        raise ValueError(f"history has {len(history)} entries with {found}; expected metrics of negcache_fn.step(...)")
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(width=3.5 * columns, height=2.3 * rows)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        _style(axes, panel.title, panel.unit)
        drawn = [name for name in panel.lines if series[name][0]]
        for name, color in zip(drawn, _COLORS, strict=False):
            x, y = _thinned(*series[name])
            marker = "o" if len(x) == 1 else None
            axes.plot(x, y, color=color, linewidth=1.6, marker=marker, clip_on=False, zorder=3, label=panel.lines[name])
        if len(panel.lines) > 1:
            axes.legend(frameon=False, fontsize="small", labelcolor=_INK)
        _start_at_zero(axes)
        axes.set_xlim(min(numbers), max(*numbers, min(numbers) + 1))
        if place > len(panels) - columns:
            axes.set_xlabel("step", color=_INK, fontsize="small")
    return figure


def ages(state: TensorDictBase, *, bins: int = 30) -> "Figure":
    """How long ago the documents of a cache were embedded, and how long ago they were inserted.

    Args:
        state: the cache; of a sharded one, this rank's part.
        bins: number of bins, as in `age_histogram`.

    Returns:
        The figure.

    Raises:
        ValueError, TypeError: as `age_histogram`.
        ImportError: matplotlib is not installed.

    Examples:
        >>> figure = ages(update(init_cache(8, 4, torch.zeros(1, 3)), torch.ones(2, 3), torch.ones(2, 4)))
        >>> figure.axes[0].get_title(loc="left")
        'Age of 2 documents in 8 slots'
    """
    check_state(state)
    check_size("bins", bins)
    now, inserted_at = scalar(state, "step").view(1), stored(state, "inserted_at")
    width = bin_width(inserted_at, now, bins)  # no document is embedded before it is inserted
    edges = [int(width) * place for place in range(bins + 1)]
    embedded, inserted = (
        [int(count) for count in count_ages(written_at, now, width, bins)]
        for written_at in (stored(state, "embedded_at"), inserted_at)
    )
    figure = _figure(width=6.4, height=3.4)
    axes = figure.add_subplot()
    _style(axes, f"Age of {sum(inserted):,} documents in {inserted_at.shape[0]:,} slots", "documents")
    axes.stairs(embedded, edges, fill=True, color=_COLORS[0], alpha=0.75, label="embedded")
    axes.stairs(inserted, edges, color=_COLORS[1], linewidth=1.8, label="came in")
    axes.set_xlim(0, edges[-1])
    _start_at_zero(axes)
    axes.set_xlabel("steps ago", color=_INK, fontsize="small")
    axes.legend(frameon=False, fontsize="small", labelcolor=_INK)
    return figure


def _series(
    history: Sequence[Mapping[str, float | Tensor]], numbers: list[int], name: str
) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it was logged."""
    there = [(number, entry[name]) for number, entry in zip(numbers, history, strict=True) if name in entry]
    return [number for number, _ in there], [float(value) for _, value in there]


def _thinned(steps: list[int], values: list[float]) -> tuple[list[float], list[float]]:
    """At most `_POINTS` points, each the mean of equally many neighbours."""
    size = -(-len(steps) // _POINTS)
    parts = [slice(first, first + size) for first in range(0, len(steps), size)]
    return [_mean(steps[part]) for part in parts], [_mean(values[part]) for part in parts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _figure(*, width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("negcache_fn.plots draws with matplotlib: pip install negcache-fn[plots]") from error
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Figure(figsize=(width, height), dpi=100, layout=layout, facecolor="white")


def _style(axes: "Axes", title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize="medium", fontweight="bold", color=_INK)
    axes.set_ylabel(unit, color=_INK, fontsize="small")
    axes.set_axisbelow(True)
    axes.grid(color=_GRID)
    axes.tick_params(colors=_INK, labelsize="small")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_SPINE)
    for axis in ("x", "y"):
        axes.locator_params(axis=axis, nbins=5)


def _start_at_zero(axes: "Axes") -> None:
    """From 0 to a little above the highest value; to 1 where all are 0."""
    highest = max(axes.dataLim.y1, 0.0)
    axes.set_ylim(0, 1.08 * highest if 0 < highest < float("inf") else 1)
