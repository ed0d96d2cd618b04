"""The pictures: what is drawn against plain Python, that nothing overlaps, and that nothing global is touched."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import matplotlib as mpl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import negcache_fn
from negcache_fn import plots
from tests.support.builders import make_state, same_snapshot, snapshot
from tests.support.checks.steps import METRICS, Tower, documents, warm

TITLES = {
    "exact_loss": "Exact loss",
    "positive_probability": "Share of the softmax",
    "cache_share": "Share of the softmax",
    "occupancy": "Occupancy",
    "cache_age_steps": "Mean age of embeddings",
    "draw_age_steps": "Mean age of embeddings",
    "drift": "Drift of the draws",
    "draw_noise": "Noise of the draws",
    "effective_sample_size": "Effective sample size",
    "unique_draws": "Distinct documents drawn",
    "masked_pairs": "False negatives excluded",
    "non_finite": "Rows not finite",
}


def lines_of(figure: Figure) -> dict[str, list[tuple[list[float], list[float]]]]:
    """The points of every line, by the title of its picture."""
    return {
        axes.get_title(loc="left"): [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
        for axes in figure.axes
    }


def assert_readable(figure: Figure) -> None:
    """Every picture, with its titles and labels, lies inside the figure and off the others."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [axes.get_tightbbox(canvas.get_renderer()) for axes in figure.axes]
    for box in boxes:
        assert box is not None
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


@given(
    names=st.lists(st.sampled_from(sorted(METRICS)), min_size=1, unique=True),
    length=st.sampled_from([1, 2, 99, 100, 101, 250]),
    seed=st.integers(0, 99),
    gap=st.integers(1, 50),
)
@settings(max_examples=25)
def test_lines_are_means_of_stretches(names: list[str], length: int, seed: int, gap: int) -> None:
    """A metric that is logged in some steps only has those; strangers are not shown."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(len(names), length, generator=generator, dtype=torch.float64)
    history: list[dict[str, Any]] = [{"stranger": 1.0} for _ in range(length)]
    expected: dict[str, list[tuple[list[float], list[float]]]] = {}
    for row, name in enumerate(names):
        logged = range(row % 3 if length > 3 else 0, length, 1 + row % 2)
        for step in logged:
            history[step][name] = table[row, step] if row % 2 else float(table[row, step])
    steps = [gap * number for number in range(length)]
    for name in sorted(names, key=list(TITLES).index):
        points = [(steps[n], float(entry[name])) for n, entry in enumerate(history) if name in entry]
        size = math.ceil(len(points) / 100)
        parts = [points[first : first + size] for first in range(0, len(points), size)]
        line = tuple([math.fsum(p[axis] for p in part) / len(part) for part in parts] for axis in (0, 1))
        expected.setdefault(TITLES[name], []).append(line)
    before = snapshot(history)
    found = lines_of(plots.metrics(history, steps=steps))
    assert list(found) == [title for title in dict.fromkeys(TITLES.values()) if title in expected]
    for title, lines in expected.items():
        assert len(found[title]) == len(lines)
        for one, other in zip(found[title], lines, strict=True):
            assert one[0] == pytest.approx(other[0], rel=1e-12)
            assert one[1] == pytest.approx(other[1], rel=1e-12)
    assert same_snapshot(before, snapshot(history))


def test_life_shows_all_that_a_step_measures() -> None:
    tower = Tower()
    state, history = warm(tower, 9), []
    for n in range(3):
        out = negcache_fn.step(state, tower(documents(3, n)), documents(4, n), tower)
        state = out.state
        history.append(out.metrics)
    figure = plots.metrics(history)
    assert sum(len(lines) for lines in lines_of(figure).values()) == len(out.metrics)
    assert out.metrics.keys() == TITLES.keys() - {"unique_draws"}  # that is of draws of each query
    occupancy = [float(metrics["occupancy"]) for metrics in history]
    assert lines_of(figure)["Occupancy"] == [([0.0, 1.0, 2.0], occupancy)]
    assert_readable(figure)


@pytest.mark.parametrize("names", [["drift"], ["exact_loss", "occupancy"], list(METRICS - {"non_finite", "occupancy"})])
def test_life_is_readable(names: list[str]) -> None:
    """Also a single step, one picture, an incomplete last row, and large numbers."""
    figure = plots.metrics([{name: 123456.0 * place for place, name in enumerate(names)}])
    assert_readable(figure)
    assert all(axes.get_ylim()[0] == 0 for axes in figure.axes)
    assert figure.axes[-1].get_xlabel() == "step"


def test_values_that_are_not_finite_leave_a_picture() -> None:
    figure = plots.metrics([{"exact_loss": value} for value in (1.0, math.nan, math.inf, 2.0)])
    assert_readable(figure)
    assert figure.axes[0].get_ylim()[1] >= 2


def test_life_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"history has 0 entries with \[\]; expected metrics of"):
        plots.metrics([])
    with pytest.raises(ValueError, match=r"history has 1 entries with \['loss'\]"):
        plots.metrics([{"loss": 1.0}])
    with pytest.raises(ValueError, match="steps has 3 numbers; expected 1"):
        plots.metrics([{"drift": 1.0}], steps=range(3))


def test_ages_are_counted() -> None:
    """Against a loop: five documents, the second was drawn since it came in."""
    embedded, inserted = torch.tensor([7, 9, -1, 2, 9, 5]), torch.tensor([7, 1, -1, 2, 9, 5])
    state = make_state(torch.ones(6, 2), live=embedded >= 0, embedded_at=embedded, inserted_at=inserted, step=10)
    before = snapshot(state)
    figure = plots.ages(state, bins=4)
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Age of 5 documents in 6 slots"
    drawn = {patch.get_label(): patch.get_data() for patch in axes.patches}
    for label, written_at in (("embedded", embedded), ("came in", inserted)):
        ages = [10 - int(step) for step in written_at if step >= 0]
        edges = [0, 3, 6, 9, 12]
        assert list(drawn[label].edges) == edges
        assert list(drawn[label].values) == [sum(low <= age < low + 3 for age in ages) for low in edges[:-1]]
    assert_readable(figure)
    assert same_snapshot(before, snapshot(state))
    assert_readable(plots.ages(negcache_fn.reset(state)))
    with pytest.raises(ValueError, match="bins is 0"):
        plots.ages(state, bins=0)


def test_nothing_global_is_touched() -> None:
    """No pyplot, so no window, no current figure; the user's settings stay."""
    settings_before, had_pyplot = dict(mpl.rcParams), "matplotlib.pyplot" in sys.modules
    plots.metrics([{"drift": 1.0}])
    plots.ages(make_state(torch.ones(2, 2)))
    assert dict(mpl.rcParams) == settings_before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install negcache-fn\[plots\]"):
        plots.metrics([{"drift": 1.0}])
    with pytest.raises(ImportError, match=r"pip install negcache-fn\[plots\]"):
        plots.ages(make_state(torch.ones(2, 2)))
