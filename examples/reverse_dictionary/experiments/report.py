"""From results to a table: what each loss reaches in the same time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from examples.experiments.statistics import mean_of
from examples.reverse_dictionary.experiments.tasks import DICTIONARY

__all__ = ["tables"]

_COLUMNS = ("loss", "learning rate", "steps", "seeds", "MRR@10", "Recall@10", "MRR@10 over `{}`", "drift")


def tables(results: Sequence[dict[str, Any]], task: str = DICTIONARY) -> dict[str, str]:
    """Markdown by name, of the runs that asked test queries.

    Each budget has a table of the methods with several seeds, and one of those with one seed, if there are both.

    A method has the learning rate that is best on validation queries, or with which it has run most often. Differences
    are taken seed by seed, to the best method without a cache among those with the most seeds.
    """
    by_budget: dict[float, list[dict[str, Any]]] = defaultdict(list)
    for row in results:
        if row["asked"]["split"] == "test":
            by_budget[row["asked"]["seconds"]].append(row)
    tuned = _best_rates([row for row in results if row["asked"]["split"] == "validation"])
    prefix = "encoder" if task == DICTIONARY else f"encoder_{task}"
    made: dict[str, str] = {}
    for seconds, rows in by_budget.items():
        methods = _by_method(rows, tuned)
        repeated = [name for name, seeds in methods.items() if len(seeds) > 1]
        once = [name for name in methods if name not in repeated]
        made[f"{prefix}_{seconds:g}"] = _table(methods, repeated or once)
        if repeated and once:
            made[f"{prefix}_{seconds:g}_others"] = _table(methods, once)
    return made


def _best_rates(validations: Sequence[dict[str, Any]]) -> dict[str, float]:
    best: dict[str, dict[str, Any]] = {}
    for row in validations:
        name = row["asked"]["method"]["name"]
        if name not in best or row["result"]["mrr@10"] > best[name]["result"]["mrr@10"]:
            best[name] = row
    return {name: row["asked"]["rate"] for name, row in best.items()}


def _by_method(rows: Sequence[dict[str, Any]], tuned: dict[str, float]) -> dict[str, dict[int, dict[str, Any]]]:
    """The runs of each method with its learning rate, by seed."""
    by_rate: dict[str, dict[float, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        asked = row["asked"]
        by_rate[asked["method"]["name"]][asked["rate"]][asked["seed"]] = row
    return {
        name: dict(sorted(max(rates.items(), key=lambda item: (item[0] == tuned.get(name), len(item[1])))[1].items()))
        for name, rates in by_rate.items()
    }


def _table(methods: dict[str, dict[int, dict[str, Any]]], shown: Sequence[str]) -> str:
    scores = {name: {seed: row["result"]["mrr@10"] for seed, row in rows.items()} for name, rows in methods.items()}
    asked = {name: next(iter(rows.values()))["asked"] for name, rows in methods.items()}
    without = [name for name in methods if asked[name]["method"]["loss"] != "cache"]
    best = max(without or methods, key=lambda name: (len(scores[name]), sum(scores[name].values())))
    lines: list[list[str]] = []
    for name in sorted(shown, key=lambda name: mean_of(list(scores[name].values())).mean):
        rows = methods[name]
        common = scores[name].keys() & scores[best].keys()
        difference = [scores[name][seed] - scores[best][seed] for seed in sorted(common)]
        cells = [
            asked[name]["method"]["label"],
            f"{asked[name]['rate']:g}",
            f"{asked[name]['steps']:,}",
            str(len(rows)),
            _text(list(scores[name].values())),
            _text([row["result"]["recall@10"] for row in rows.values()]),
            "" if name == best or not difference else _text(difference, sign="+"),
            _drift([row["result"] for row in rows.values()]),
        ]
        lines.append(cells)
    count = len(_COLUMNS) if any(cells[-1] for cells in lines) else len(_COLUMNS) - 1
    header = [column.format(asked[best]["method"]["label"]) for column in _COLUMNS]
    grid = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(cells[:count])} |" for cells in grid)


def _text(values: list[float], *, sign: str = "") -> str:
    found = mean_of(values)
    return f"{found.mean:{sign}.4f}" + (f" ± {found.margin:.4f}" if len(values) > 1 else "")


def _drift(results: Sequence[dict[str, Any]]) -> str:
    found = [result["drift"] for result in results if "drift" in result]
    return f"{mean_of(found).mean:.2f}" if found else ""
