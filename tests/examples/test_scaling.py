"""The scaling benchmark at a small size: it runs, and fills its page."""

from pathlib import Path

import pytest

from examples.benchmarks.scaling import main


def test_command_measures_and_fills_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    names = ("messages", "measured", "overhead", "clusters")
    page.write_text("".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in names), encoding="utf-8")
    assert main(["--worlds", "2", "--capacity", "2048", "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "| 2 | all_gather | 273.8 KiB | 273.8 KiB |" in text
    assert "| all | | 15 | |" in text
    assert "2 processes with one thread each" in capsys.readouterr().out
