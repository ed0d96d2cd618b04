"""The Lightning example on a small made-up installation: it trains, and goes on to the same result."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="the extra lightning is not installed")

from examples.code_search.features import rows_of
from examples.lightning.__main__ import main
from examples.lightning.data import CodeSearchData, loader

OPTIONS = ["--batch-size=4", "--cache-size=24", "--steps-per-epoch=20"]


def train(installation: Path, out: Path, epochs: int) -> dict[str, torch.Tensor]:
    assert main([f"--root={installation}", f"--out={out}", f"--epochs={epochs}", *OPTIONS]) == 0
    return torch.load(out / "last.ckpt", weights_only=True)["state_dict"]


def test_trains_and_goes_on(installation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uninterrupted = train(installation, tmp_path / "one", 3)
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert "queries of test modules" in printed[0]
    before, after = (float(line.split("MRR@10")[1].split()[0]) for line in printed[1:])
    assert after > before
    assert "after 60 steps" in printed[2]
    with (tmp_path / "one" / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["cache/occupancy"]]
    assert [int(row["step"]) for row in rows] == [19, 39, 59]
    assert [float(row["cache/occupancy"]) for row in rows] == [1, 1, 1]

    train(installation, tmp_path / "two", 1)
    resumed = train(installation, tmp_path / "two", 3)
    assert int(resumed["criterion.cache.step"]) == 60
    torch.testing.assert_close(resumed, uninterrupted, atol=0, rtol=0)


def test_epochs_take_the_next_steps(installation: Path, tmp_path: Path) -> None:
    dataset = CodeSearchData([installation], tmp_path / "corpus.npz", batch_size=4)
    batches = loader(dataset, steps_per_epoch=3)
    batches.sampler.set_epoch(2)
    for step, batch in zip((6, 7, 8), batches, strict=True):
        assert torch.equal(batch["ids"], dataset[step]["ids"])
        assert len(batch["ids"]) == 8
        documents = rows_of(dataset.data.documents, batch["ids"].numpy())
        assert torch.equal(batch["documents"]["tokens"], documents["tokens"])


def test_too_little_code_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--root={tmp_path}", f"--out={tmp_path / 'out'}", *OPTIONS]) == 1
    assert "give more code" in capsys.readouterr().err
