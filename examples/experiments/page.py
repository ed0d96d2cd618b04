"""The report of a grid: tables and pictures into a folder, and into a page between its markers."""

from __future__ import annotations

from pathlib import Path

from examples.benchmarks.report import fill_page
from examples.experiments.figures import draw_comparison, draw_gradients
from examples.experiments.grid import Comparison, Grid
from examples.experiments.report import budget_text, gradient_table, lexical_text, table
from examples.experiments.runner import Results, final_trials

__all__ = ["tables", "write_report"]


def write_report(grid: Grid, found: Results, out: Path, page: Path | None) -> str:
    """Writes ``tables.md`` and the pictures; fills the page if one is given. Returns the tables.

    What has not been run to the end is left out.
    """
    images = out if page is None else page.parent / "images"
    made = tables(grid, found)
    for comparison in grid.comparisons:
        if comparison.name in made:
            draw_comparison(comparison, found, images)
    for study in grid.gradients:
        if study.key in found:
            draw_gradients(study, found, images)
    text = "\n\n".join(f"## {name}\n\n{markdown}" for name, markdown in made.items())
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    if page is not None:
        fill_page(page, made)
    return text


def tables(grid: Grid, found: Results) -> dict[str, str]:
    """Markdown by the name of the comparison or study, of those that have been run to the end."""
    made: dict[str, str] = {}
    for comparison in grid.comparisons:
        if _is_complete(comparison, found):
            of_budgets = [f"{budget_text(comparison, b)}:\n\n{table(comparison, b, found)}" for b in comparison.budgets]
            made[comparison.name] = "\n\n".join([*of_budgets, lexical_text(comparison, found)])
    for study in grid.gradients:
        if study.key in found:
            made[f"gradients_{study.name}"] = gradient_table(study, found)
    return made


def _is_complete(comparison: Comparison, found: Results) -> bool:
    if any(asked.key not in found for asked in (comparison.lexical, *comparison.tuning())):
        return False
    return all(trial.key in found for trial in final_trials(comparison, found))
