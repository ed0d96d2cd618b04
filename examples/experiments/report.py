"""From results to tables: what each method found, at equal steps, at equal documents encoded, in equal time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from examples.experiments.grid import Comparison, GradientStudy
from examples.experiments.methods import Method
from examples.experiments.runner import Results
from examples.experiments.statistics import Interval, mean_of, ratio_of

__all__ = ["Line", "budget_text", "curve_of", "gradient_table", "lexical_text", "lines", "table"]

_TITLES = {"steps": "equal steps", "documents": "equal documents encoded", "seconds": "equal time"}


class Line(NamedTuple):
    """A method at a budget."""

    method: Method
    mrr: Interval
    recall: Interval
    differences: list[Interval]
    """In MRR@10 to each of the methods that all are compared with, seed by seed."""
    gap_closed: Interval | None
    """The first difference over that of the exhaustive softmax; None without one."""
    steps: float
    documents: float
    seconds: float


def lines(comparison: Comparison, budget: str, found: Results) -> list[Line]:
    """All methods of the comparison that have the budget, in the order of the configuration."""
    at = {
        method.name: _at(comparison, method, budget, found)
        for method in comparison.methods
        if budget in comparison.budgets_of(method)
    }
    scores = {name: [row["test"]["mrr@10"] for row in rows] for name, rows in at.items()}
    limits = [scores[method.name] for method in comparison.methods if method.loss == "exhaustive" and method.name in at]
    gap = _paired(limits[0], scores[comparison.against[0]]) if limits else None
    made: list[Line] = []
    for method in comparison.methods:
        if method.name not in at:
            continue
        rows = at[method.name]
        differences = [_paired(scores[method.name], scores[other]) for other in comparison.against]
        made.append(
            Line(
                method=method,
                mrr=mean_of(scores[method.name]),
                recall=mean_of([row["test"]["recall@10"] for row in rows]),
                differences=[mean_of(values) for values in differences],
                gap_closed=None if gap is None else ratio_of(differences[0], gap),
                steps=mean_of([row["steps"] for row in rows]).mean,
                documents=mean_of([row["documents"] for row in rows]).mean,
                seconds=mean_of([row["seconds"] for row in rows]).mean,
            )
        )
    return made


def table(comparison: Comparison, budget: str, found: Results) -> str:
    """Markdown."""
    made = lines(comparison, budget, found)
    has_limit = made[0].gap_closed is not None
    head = ["", "MRR@10", *(f"against {_label(comparison, other)}" for other in comparison.against)]
    head += ["gap closed"] if has_limit else []
    rows = [[*head, "Recall@10", "steps", "documents encoded", "seconds"]]
    for line in made:
        cells = [line.method.label, _interval(line.mrr)]
        for other, difference in zip(comparison.against, line.differences, strict=True):
            cells.append("" if other == line.method.name else _interval(difference, sign="+"))
        if has_limit:
            is_start = line.method.name == comparison.against[0]
            cells.append("" if is_start or line.gap_closed is None else _percent(line.gap_closed))
        cells += [f"{line.recall.mean:.3f}", f"{line.steps:,.0f}", f"{line.documents:,.0f}", f"{line.seconds:.1f}"]
        rows.append(cells)
    return _markdown(rows)


def gradient_table(study: GradientStudy, found: Results) -> str:
    """Markdown: bias and noise of each method at each stop, and the cosine of a single gradient at the last."""
    stops = found[study.key]["stops"]
    rows = [["", *(f"bias, noise at {stop['step']:,}" for stop in stops), f"cosine at {stops[-1]['step']:,}"]]
    for method in study.methods:
        errors = [stop["methods"][method.name] for stop in stops]
        cells = [f"{error['bias']:.2f}, {error['noise']:.2f}" for error in errors]
        rows.append([method.label, *cells, f"{errors[-1]['cosine']:.2f}"])
    rows.append(["drift of the cache", *(f"{stop['drift']:.3f}" for stop in stops), ""])
    rows.append(["age of the cache, steps", *(f"{stop['age']:.0f}" for stop in stops), ""])
    return _markdown(rows)


def budget_text(comparison: Comparison, budget: str) -> str:
    """ "at equal steps (1,000)"."""
    return f"At {_TITLES[budget]} ({comparison.budgets[budget]:,.0f})"


def lexical_text(comparison: Comparison, found: Results) -> str:
    """What tf-idf finds."""
    test = found[comparison.lexical.key]["test"]
    return f"Search by TF-IDF, where nothing is learnt: MRR@10 {test['mrr@10']:.4f}, Recall@10 {test['recall@10']:.3f}."


def curve_of(comparison: Comparison, method: Method, found: Results, budget: str) -> list[list[dict[str, Any]]]:
    """For each seed the points on the way of the trials that count at the budget."""
    trials = comparison.final(method, found)
    return [found[trials[budget, seed].key]["curve"] for seed in range(comparison.seeds)]


def _at(comparison: Comparison, method: Method, budget: str, found: Results) -> list[dict[str, Any]]:
    trials = comparison.final(method, found)
    return [found[trials[budget, seed].key]["at"][budget] for seed in range(comparison.seeds)]


def _label(comparison: Comparison, name: str) -> str:
    return next(method.label for method in comparison.methods if method.name == name)


def _paired(scores: list[float], others: list[float]) -> list[float]:
    return [score - other for score, other in zip(scores, others, strict=True)]


def _interval(value: Interval, sign: str = "") -> str:
    margin = "" if math.isnan(value.margin) else f" ± {value.margin:.4f}"
    return f"{value.mean:{sign}.4f}{margin}"


def _percent(value: Interval) -> str:
    margin = "" if math.isnan(value.margin) else f" ± {100 * value.margin:.0f}"
    return f"{100 * value.mean:.0f}{margin} %"


def _markdown(rows: list[list[str]]) -> str:
    ruler = f"| --- |{' ---: |' * (len(rows[0]) - 1)}"
    head, *others = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([head, ruler, *others])
