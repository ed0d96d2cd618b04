"""The example with sentence-transformers on the small made-up installation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="the extra sentence-transformers is not installed")

from examples.sentence_transformers.__main__ import main
from examples.sentence_transformers.data import split

DOCUMENTED = '''
def {verb}_{noun}():
    """{Verb} the {noun} that was given before.

    It takes any {noun} which can {verb} at all, and leaves {noun} behind when it could {verb}.
    """
'''


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for verb in ("parse", "format", "count", "merge", "sort", "rotate"):
        functions = (
            DOCUMENTED.format(verb=verb, Verb=verb.title(), noun=noun)
            for noun in ("date", "header", "matrix", "polygon", "socket", "token", "ledger", "orbit")
        )
        (root / f"{verb}.py").write_text("".join(functions), encoding="utf-8")
    return root


@pytest.mark.parametrize("loss", ["cache", "ranking"])
def test_runs_and_goes_on(sources: Path, tmp_path: Path, loss: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--root={sources}", f"--out={tmp_path}", f"--loss={loss}", "--cache-size=64", "--dim=16"]
    assert main([*options, "--epochs=2"]) == 0
    printed = capsys.readouterr().out
    found = re.search(rf"{loss}: MRR@10 (0\.\d+) untrained, ([01]\.\d+) trained", printed)
    assert found is not None, printed
    assert "44 pairs; 4 queries search 48 documents" in printed
    assert main([*options, "--epochs=3", "--resume"]) == 0


def test_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have 0 docstrings of two paragraphs; expected at least 10"):
        split([tmp_path])
