"""From results of `compare` to tables and a picture: what each way to find negatives reaches in the same wall time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.experiments.statistics import Interval, mean_of
from examples.pictures.drawing import Theme, canvas

__all__ = ["IN_README", "Row", "picture", "read", "tables"]

LINE_REPLACED = "in-batch, B=256"
IN_README = (
    LINE_REPLACED,
    "in-batch, B=4096",
    "memory of 65,536 stale embeddings, B=256",
    "cache of 65,536, 256 draws for the batch, B=256",
    "cache of 65,536, a draw per query, B=256",
)


@dataclass(frozen=True)
class Row:
    """A method."""

    name: str
    learning_rate: float
    steps: int
    texts_per_second: float
    mrr: list[float]
    """Of each seed."""
    recall: list[float]


def read(files: Sequence[Path]) -> tuple[dict[str, Any], list[Row]]:
    """The first file, and the methods of all, ascending by MRR@10; where two files have a method, the later counts.

    A method counts once every seed has run.
    """
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    runs: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        for name in {run["method"] for run in one["runs"]}:
            of_method = [run for run in one["runs"] if run["method"] == name]
            if len(of_method) == one["options"]["seeds"]:
                runs[name] = of_method
    rows = [_row(name, of_method) for name, of_method in runs.items()]
    return found[0], sorted(rows, key=lambda row: mean_of(row.mrr).mean)


def tables(first: dict[str, Any], rows: Sequence[Row]) -> dict[str, str]:
    """Markdown by name: of all methods, and of those in the README."""
    base = next(row for row in rows if row.name == LINE_REPLACED)
    header = (
        f"| {first['options']['seconds_per_run']:g} seconds on one {first['device']} | steps | texts a second "
        f"| learning rate | MRR@10 | over in-batch, B=256 | Recall@10 |\n| --- |{' ---: |' * 6}"
    )
    untrained = first["untrained"]["test"]
    lines = [header, f"| before training | 0 | | | {untrained['mrr@10']:.3f} | | {untrained['recall@10']:.3f} |"]
    short = ["| | MRR@10 | over in-batch, B=256 |\n| --- | ---: | ---: |"]
    for row in rows:
        over = "" if row is base else _text(_difference(row, base), signed=True)
        lines.append(
            f"| {row.name} | {row.steps:,} | {row.texts_per_second:,.0f} | {row.learning_rate:g} "
            f"| {_text(mean_of(row.mrr))} | {over} | {_text(mean_of(row.recall))} |"
        )
        if row.name in IN_README:
            short.append(f"| {row.name} | {_text(mean_of(row.mrr))} | {over} |")
    return {"encoder_gpu": "\n".join(lines), "encoder_gpu_short": "\n".join(short)}


def picture(rows: Sequence[Row], untrained: float) -> Callable[[Theme], Figure]:
    """A point and an interval for each method, under its name; the caches in colour."""

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = canvas(height=0.84 * len(rows) + 1.4)
        for place, row in enumerate(rows):
            mrr, ours = mean_of(row.mrr), row.name.startswith("cache")
            color = theme.ours if ours else theme.other
            axes.errorbar(mrr.mean, place, xerr=mrr.margin, fmt="o", color=color, markersize=9, capsize=5)
            axes.annotate(row.name, (0, place + 0.36), xycoords=("axes fraction", "data"), va="center", fontsize=15)
            right = mrr.mean < 0.27
            axes.annotate(
                f"{mrr.mean:.3f}",
                (mrr.mean + (1 if right else -1) * mrr.margin, place),
                xytext=(10 if right else -10, 0),
                textcoords="offset points",
                va="center",
                ha="left" if right else "right",
                color=color,
            )
        places = [height for place in range(-1, len(rows)) for height in (place - 0.3, place + 0.2, math.nan)]
        axes.plot([untrained] * len(places), places, color=theme.accent, linestyle=":")  # not through the names
        axes.annotate(
            "before training",
            (untrained, -0.75),
            color=theme.accent,
            ha="left",
            va="center",
            xytext=(8, 0),
            textcoords="offset points",
        )
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-1.1, len(rows) - 0.3)
        axes.set_xlabel("MRR@10")
        axes.grid(axis="x")
        return figure

    return draw


def _row(name: str, runs: list[dict[str, Any]]) -> Row:
    runs = sorted(runs, key=lambda run: run["seed"])
    return Row(
        name,
        runs[0]["learning_rate"],
        round(sum(run["steps"] for run in runs) / len(runs)),
        sum(run["texts_per_second"] for run in runs) / len(runs),
        [run["test"]["mrr@10"] for run in runs],
        [run["test"]["recall@10"] for run in runs],
    )


def _difference(row: Row, base: Row) -> Interval:
    return mean_of([one - other for one, other in zip(row.mrr, base.mrr, strict=True)])


def _text(interval: Interval, *, signed: bool = False) -> str:
    return f"{interval.mean:{'+' if signed else ''}.3f} ± {interval.margin:.3f}"
