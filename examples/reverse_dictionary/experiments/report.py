"""From results to a table: what each loss reaches in the same time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from examples.experiments.statistics import mean_of
from examples.reverse_dictionary.experiments.tasks import DICTIONARY

__all__ = ["tables"]

_HEADER = (
    "| loss | learning rate | steps | seeds | MRR@10 | Recall@10 | MRR@10 over {} |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def tables(results: Sequence[dict[str, Any]], task: str = DICTIONARY) -> dict[str, str]:
    """Markdown by name, a table for each budget, of the runs that asked test queries.

    A method has the learning rate that is best on validation queries, or with which it has run most often. Differences
    are taken seed by seed, to the best method without a cache among those with the most seeds.
    """
    by_budget: dict[float, list[dict[str, Any]]] = defaultdict(list)
    for row in results:
        if row["asked"]["split"] == "test":
            by_budget[row["asked"]["seconds"]].append(row)
    tuned = _best_rates([row for row in results if row["asked"]["split"] == "validation"])
    prefix = "encoder" if task == DICTIONARY else f"encoder_{task}"
    return {f"{prefix}_{seconds:g}": _table(_by_method(rows, tuned)) for seconds, rows in by_budget.items()}


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


def _table(methods: dict[str, dict[int, dict[str, Any]]]) -> str:
    scores = {name: {seed: row["result"]["mrr@10"] for seed, row in rows.items()} for name, rows in methods.items()}
    asked = {name: next(iter(rows.values()))["asked"] for name, rows in methods.items()}
    without = [name for name in methods if asked[name]["method"]["loss"] != "cache"]
    best = max(without or methods, key=lambda name: (len(scores[name]), sum(scores[name].values())))
    lines = [_HEADER.format(f"`{asked[best]['method']['label']}`")]
    for name, rows in methods.items():
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
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(values: list[float], *, sign: str = "") -> str:
    found = mean_of(values)
    return f"{found.mean:{sign}.4f}" + (f" ± {found.margin:.4f}" if len(values) > 1 else "")
