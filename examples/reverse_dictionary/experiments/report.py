"""From results to a table: what each loss reaches in the same time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from examples.experiments.statistics import Interval, mean_of

__all__ = ["tables"]

_HEADER = (
    "| loss | learning rate | steps | MRR@10 | Recall@10 | MRR@10 over {} |\n| --- | ---: | ---: | ---: | ---: | ---: |"
)


def tables(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Markdown by name, a table for each budget, of the runs that asked test queries.

    Differences are taken seed by seed, to the best method without a cache, if there is one. A method counts once every
    seed has run.
    """
    by_budget: dict[float, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in results:
        if row["asked"]["split"] == "test":
            by_budget[row["asked"]["seconds"]][row["asked"]["method"]["name"]].append(row)
    return {f"encoder_{seconds:g}": _table(methods) for seconds, methods in by_budget.items()}


def _table(methods: dict[str, list[dict[str, Any]]]) -> str:
    seeds = max(len(rows) for rows in methods.values())
    whole = {
        name: sorted(rows, key=lambda row: row["asked"]["seed"]) for name, rows in methods.items() if len(rows) == seeds
    }
    scores = {name: [row["result"]["mrr@10"] for row in rows] for name, rows in whole.items()}
    without = [name for name, rows in whole.items() if rows[0]["asked"]["method"]["loss"] != "cache"]
    best = max(without or whole, key=lambda name: sum(scores[name]))
    lines = [_HEADER.format(f"`{whole[best][0]['asked']['method']['label']}`")]
    for name, rows in whole.items():
        asked = rows[0]["asked"]
        recall = mean_of([row["result"]["recall@10"] for row in rows])
        difference = [score - other for score, other in zip(scores[name], scores[best], strict=True)]
        cells = [
            asked["method"]["label"],
            f"{asked['rate']:g}",
            f"{asked['steps']:,}",
            _text(mean_of(scores[name])),
            _text(recall),
            "" if name == best else _text(mean_of(difference), signed=True),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(interval: Interval, *, signed: bool = False) -> str:
    return f"{interval.mean:{'+' if signed else ''}.4f} ± {interval.margin:.4f}"
