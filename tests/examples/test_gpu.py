"""The GPU's command at tiny sizes, without one: it runs, and the page shows what was published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.gpu.__main__ import main
from examples.gpu.report import PAGE, PUBLISHED, sections

pytest.importorskip("triton")


def test_every_part_runs_without_a_gpu(tmp_path: Path) -> None:
    assert main(["--dry-run", "--out", str(tmp_path)]) == 0
    kernels = [json.loads(line) for line in (tmp_path / "kernels.log").read_text().splitlines() if line[0] == "{"]
    assert len(kernels) > 1
    assert all(row["largest_error"] < 0.05 for row in kernels[1:])
    rows = [json.loads(line) for line in (tmp_path / "steps.log").read_text().splitlines() if line[0] == "{"]
    measured = {row["method"] for row in rows if "skipped" not in row}
    assert measured >= {"product", "ours-eager", "batch-eager", "softmax"}


def test_what_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--only", "kernels", "--seconds", "1", "--out", str(tmp_path)]) == 1
    assert "not done: kernels" in capsys.readouterr().err


def test_the_page_shows_what_was_published() -> None:
    rows = [json.loads(line) for line in PUBLISHED.read_text(encoding="utf-8").splitlines()]
    page = (Path(__file__).parents[2] / PAGE).read_text(encoding="utf-8")
    for name, text in sections(rows).items():
        assert f"<!-- begin {name} -->\n\n{text}\n\n<!-- end {name} -->" in page
