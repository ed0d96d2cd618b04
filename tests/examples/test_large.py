"""The benchmark of a large cache at a small size: it runs, and fills its page."""

import re
from pathlib import Path

import pytest

from examples.benchmarks.large import main
from examples.benchmarks.memory import supported


@pytest.mark.skipif(not supported("cpu"), reason="memory is not measured here")
def test_command_measures_and_fills_its_page(tmp_path: Path) -> None:
    page, files = tmp_path / "page.md", tmp_path / "files"
    files.mkdir()
    page.write_text("<!-- begin large -->\n<!-- end large -->\n", encoding="utf-8")
    size = ["--documents", "5000", "--dim", "16", "--tokens", "64", "--batch", "8", "--steps", "1"]
    assert main([*size, "--folder", str(files), "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "5,000 documents, B=8, D=16, 64 tokens each" in text
    cells = r"\d+\.\d\d s \| \d+\.\d\d s \| \d+\.\d\d GB \| \d+\.\d\d GB"
    assert re.search(rf"a draw per query \| {cells}", text)
    assert re.search(rf"8 draws for the batch \| {cells}", text)
    assert list(files.iterdir()) == []
