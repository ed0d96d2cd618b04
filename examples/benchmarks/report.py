"""From the rows of a run to markdown, and into a page between its markers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.benchmarks.experiments import Row
from examples.benchmarks.methods import BASELINE
from examples.benchmarks.shapes import Shape

__all__ = ["fill_page", "sections"]

Results = dict[str, Any]


def sections(results: Results) -> dict[str, str]:
    """Markdown by name: hardware, sizes, updates, memory."""
    rows: list[Row] = results["rows"]
    by_experiment: dict[str, list[Row]] = {}
    for row in rows:
        by_experiment.setdefault(row["experiment"], []).append(row)
    made = {"hardware": _hardware(results["hardware"])}
    if "sizes" in by_experiment:
        made["sizes"] = _times(by_experiment["sizes"])
        made["roofline"] = _roofline(by_experiment["sizes"])
    if "updates" in by_experiment:
        made["updates"] = _times(by_experiment["updates"], decimals=3)
    if "memory" in by_experiment:
        made["memory"] = _memory(by_experiment["memory"])
    return made


def fill_page(page: Path, made: dict[str, str]) -> None:
    """Puts each section between `<!-- begin NAME -->` and `<!-- end NAME -->` of the page.

    Raises:
        ValueError: the page has no place for a section.
    """
    text = page.read_text(encoding="utf-8")
    for name, markdown in made.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page} has no place for {name}; expected <!-- begin {name} --> and <!-- end {name} -->")
        text = pattern.sub(lambda match, new=markdown: f"{match[1]}\n{new}\n\n{match[2]}", text)
    page.write_text(text, encoding="utf-8")


def _hardware(hardware: dict[str, Any]) -> str:
    flags = ", ".join(f"`{flag}`" for flag in hardware["flags"]) or "none of those that matter here"
    where = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads"
    kernels = "" if "gpu" in hardware else f"; CPU kernels {'built' if hardware['cpu_kernels'] else 'not available'}"
    return f"Measured on: {where}; instructions {flags}; torch {hardware['torch']}{kernels}."


def _times(rows: list[Row], decimals: int = 2) -> str:
    """Per size the median, and the ratio to the baseline with its quartiles."""
    return "\n".join([*_table(rows, lambda row: _time_cell(row, decimals)), *_left_out(rows)])


def _memory(rows: list[Row]) -> str:
    return "\n".join(_table(rows, lambda row: f"{row['peak_bytes'] / 2**20:,.0f} MiB"))


def _table(rows: list[Row], cell: Callable[[Row], str]) -> list[str]:
    """One line a method and one column a size, of the methods that were measured anywhere."""
    shapes = _shapes(rows)
    lines = ["| | " + " | ".join(map(str, shapes)) + " |", "| --- |" + " ---: |" * len(shapes)]
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = {_shape(row): row for row in rows if row["method"] == method}
        measured = {shape: cell(row) for shape, row in of_method.items() if "skipped" not in row}
        if measured:
            label = next(iter(of_method.values()))["label"]
            lines.append(f"| {label} | " + " | ".join(measured.get(shape, "-") for shape in shapes) + " |")
    return lines


def _time_cell(row: Row, decimals: int) -> str:
    text = _duration(row["seconds_median"])
    if "ratio_median" not in row:
        return text
    ratio, low, high = (f"{row[f'ratio_{key}']:.{decimals}f}" for key in ("median", "q25", "q75"))
    return f"{text}, **{ratio}** ({low} to {high})"


def _roofline(rows: list[Row]) -> str:
    """What one pass must do, and the rates at which this machine did it."""
    lines = [
        "| | flops of one pass | bytes, float32 / bfloat16 | bare product, float32 | bare product, bfloat16 "
        "| reading float32 |",
        "| --- |" + " ---: |" * 5,
    ]
    for shape in _shapes(rows):
        seconds = {
            row["method"]: row["seconds_median"] for row in rows if _shape(row) == shape and "skipped" not in row
        }
        size = shape.capacity * shape.dim * 4
        cells = [
            f"{_digits(shape.flops / 1e9)} G",
            f"{_digits(size / 1e6)} / {_digits(size / 2e6)} MB",
            *(
                f"{_digits(work / seconds[name] / 1e9)} {unit}" if name in seconds else "-"
                for name, work, unit in (
                    (BASELINE, shape.flops, "Gflop/s"),
                    ("product-bf16", shape.flops, "Gflop/s"),
                    ("read", size, "GB/s"),
                )
            ),
        ]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _left_out(rows: list[Row]) -> list[str]:
    reasons: dict[str, set[str]] = {}
    for row in rows:
        if "skipped" in row:
            reasons.setdefault(row["label"], set()).add(row["skipped"])
    if not reasons:
        return []
    told = "; ".join(f"{label} ({', '.join(sorted(why))})" for label, why in reasons.items())
    return ["", f"Left out: {told}."]


def _duration(seconds: float) -> str:
    return f"{_digits(seconds * 1e3)} ms" if seconds < 1 else f"{_digits(seconds)} s"


def _digits(number: float) -> str:
    """Three of them, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _shape(row: Row) -> Shape:
    return Shape(**row["shape"])


def _shapes(rows: list[Row]) -> list[Shape]:
    return list(dict.fromkeys(_shape(row) for row in rows))
