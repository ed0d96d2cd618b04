"""The reverse dictionary on a few made-up entries and a tiny encoder."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the extra examples is not installed")

from examples.reverse_dictionary.__main__ import main
from examples.reverse_dictionary.compare import batches, evaluate
from examples.reverse_dictionary.corpus import Corpus
from examples.reverse_dictionary.data import SPLITS, Entry, read_entries, split_of
from examples.reverse_dictionary.encoder import Encoder
from examples.reverse_dictionary.methods import METHODS, TINY_METHODS
from examples.reverse_dictionary.report import read, tables

ROOT = Path(__file__).parents[2]

DATA = {
    "noun": '  1 the licence\n00001740 03 n 02 lake 0 inland_sea 0 001 @ 1 n 0000 | a body of water; "we swam"  \n',
    "verb": '00001741 29 v 01 rest 0 000 00 | be still; not move: "rest here"\n00001742 29 v 01 rest 0 000 | lie\n',
    "adj": "00001743 00 a 01 asleep(p) 0 000 | in a state of sleep\n",
    "adv": "00001744 02 r 01 out 0 000 | in a state of sleep\n",
}


def archive_of(files: dict[str, str], path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for extension, text in files.items():
            member = tarfile.TarInfo(f"package/dict/data.{extension}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_reads_distinct_entries_without_examples(tmp_path: Path) -> None:
    entries = read_entries(archive_of(DATA, tmp_path / "wordnet.tgz"))
    assert entries == [
        Entry(("lake", "inland sea"), "noun", "a body of water"),
        Entry(("rest",), "verb", "be still; not move"),
        Entry(("asleep",), "adjective", "in a state of sleep"),
    ]
    assert entries[0].document == "lake, inland sea (noun)"


def test_says_what_is_not_wordnet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no file data\.verb; expected the files of WordNet"):
        read_entries(archive_of({"noun": DATA["noun"]}, tmp_path / "wordnet.tgz"))


def test_split_is_of_90_5_and_5_percent() -> None:
    split = split_of(1000)
    assert np.bincount(split).tolist() == [900, 50, 50]
    assert np.array_equal(split, split_of(1000))
    assert not np.array_equal(split, split_of(1000, seed=1))


def test_compares_and_stops_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    arguments = ["compare", "--dry-run", f"--out={out}", "--seconds-per-run=0.1", "--tune-seconds=0.05", "--seeds=1"]
    assert main(arguments) == 0
    found = json.loads(out.read_text())
    assert [run["method"] for run in found["runs"]] == [method.name for method in TINY_METHODS]
    assert len(found["tuning"]) == 2 * len(TINY_METHODS)
    for run in found["runs"]:
        tried = [row for row in found["tuning"] if row["method"] == run["method"]]
        assert run["learning_rate"] == max(tried, key=lambda row: row["validation"]["mrr@10"])["learning_rate"]
        assert run["seconds"] >= 0.1
        assert run["steps"] > 0
        assert 0 < run["test"]["mrr@10"] <= run["test"]["recall@10"] <= 1
    assert "stopped" not in found

    assert main([*arguments, "--total-seconds=0.001", "--learning-rates", "1e-3"]) == 0
    found = json.loads(out.read_text())
    assert found["stopped"] == "total_seconds"
    assert found["runs"] == []
    assert main([*arguments, "--methods", "none"]) == 1
    assert "--methods names ['none']" in capsys.readouterr().err


def test_texts_of_a_step() -> None:
    assert [method.texts_per_step for method in METHODS[:5]] == [512, 2048, 8192, 512, 768]


def test_the_published_comparison_is_that_of_the_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- begin encoder_gpu_short -->\n<!-- end encoder_gpu_short -->\n")
    results = sorted((ROOT / "examples/reverse_dictionary/published").glob("*.json"))
    assert main(["report", *map(str, results), f"--pages={page}", f"--pictures={tmp_path}"]) == 0
    short = page.read_text().split("-->\n")[1].split("<!--")[0].strip()
    assert short in (ROOT / "README.md").read_text()
    assert capsys.readouterr().out.strip() in (ROOT / "docs/evidence.md").read_text()
    assert (tmp_path / "evidence_encoder_gpu_dark.svg").stat().st_size > 0


def test_a_method_counts_once_every_seed_has_run(tmp_path: Path) -> None:
    """Of two files with a method the later counts, if it is whole; differences are taken seed by seed."""

    def run(method: str, seed: int, score: float) -> dict[str, object]:
        measured = {"mrr@10": score, "recall@10": 2 * score}
        return {
            "method": method,
            "seed": seed,
            "learning_rate": 1e-4,
            "steps": 3,
            "texts_per_second": 5.0,
            "test": measured,
        }

    runs = [
        [run("in-batch, B=256", 1, 0.1), run("in-batch, B=256", 2, 0.2), run("b", 2, 0.3), run("b", 1, 0.25)],
        [run("b", 1, 0.9), run("in-batch, B=256", 1, 0.15), run("in-batch, B=256", 2, 0.25)],
    ]
    files = [tmp_path / "1.json", tmp_path / "2.json"]
    for file, some in zip(files, runs, strict=True):
        file.write_text(
            json.dumps(
                {
                    "device": "one",
                    "options": {"seeds": 2, "seconds_per_run": 3.0},
                    "untrained": {"test": {"mrr@10": 0.05, "recall@10": 0.1}},
                    "runs": some,
                }
            )
        )
    first, rows = read(files)
    assert [(row.name, row.mrr) for row in rows] == [("in-batch, B=256", [0.15, 0.25]), ("b", [0.25, 0.3])]
    assert (
        "+0.075 ± 0.318" in tables(first, rows)["encoder_gpu"]
    )  # .1 and .05: t(.975; 1) = 12.7 standard errors of .025


def test_batches_hold_every_row_once_an_epoch() -> None:
    stream = batches(torch.arange(10, 20), 3, seed=0)
    epochs = [torch.cat([next(stream) for _ in range(3)]) for _ in range(2)]
    assert all(len(epoch.unique()) == 9 for epoch in epochs)
    assert not torch.equal(*epochs)


def test_padding_does_not_change_an_embedding() -> None:
    torch.manual_seed(0)
    encoder = Encoder.random(20)
    tokens = torch.tensor([[3, 4, 5]], dtype=torch.int32)
    padded = torch.nn.functional.pad(tokens, (0, 5))
    with torch.no_grad():
        short, long = encoder(tokens), encoder(padded)
    assert torch.allclose(short, long, atol=0.02)
    assert torch.allclose(short.norm(dim=1), torch.ones(1))


def test_evaluation_finds_what_is_equal() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(1, 50, (200, 6), dtype=torch.int32)
    corpus = Corpus(tokens, tokens, torch.from_numpy(split_of(200)))
    assert SPLITS[int(corpus.split[corpus.rows_of("test")[0]])] == "test"
    assert evaluate(Encoder.random(50), corpus, "test")["recall@10"] > 0.9
