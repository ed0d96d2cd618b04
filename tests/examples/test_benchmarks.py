"""The benchmarks at tiny sizes: they run, and what they report is what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.benchmarks import memory
from examples.benchmarks.__main__ import main
from examples.benchmarks.experiments import Experiments
from examples.benchmarks.methods import BASELINE, Method, UnavailableError
from examples.benchmarks.problem import Problem
from examples.benchmarks.registry import METHODS, select
from examples.benchmarks.report import fill_page, sections
from examples.benchmarks.shapes import Shape, parse_size
from examples.benchmarks.timing import Rounds, interleave, summarize

SHAPE = Shape(4, 256, 8)
EXPERIMENTS = Experiments("cpu", None, compiled=False, rounds=Rounds(seconds=0.0, least=2, most=2))


def test_command_measures_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["4x256x8", "4x128x8x2"]
    assert main(["--eager", "--quick", "--only", "sizes", "--sizes", *sizes, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    measured = [row for row in results["rows"] if "skipped" not in row]
    assert {row["method"] for row in measured} >= {BASELINE, "ours-eager", "ours-bf16-eager", "softmax"}
    assert all(row["ratio_median"] == 1.0 for row in measured if row["method"] == BASELINE)
    table = (tmp_path / "table.md").read_text()
    assert "B=4, C=128, D=8, k=2" in table
    assert table.strip() in capsys.readouterr().out


def test_bad_arguments_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "sizes", "--reference", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert main(["--report-only", "--out", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("error:") == 2
    with pytest.raises(ValueError, match="no size"):
        parse_size("4x8")


def test_sweeps_updates_and_plots(tmp_path: Path) -> None:
    rows = EXPERIMENTS.sweep("capacity", [SHAPE, replace(SHAPE, capacity=512)]) + EXPERIMENTS.updates(SHAPE)
    rows += [
        {"experiment": "memory", "shape": vars(SHAPE), "method": "ours", "label": "x", "peak_bytes": 2**20},
        {"experiment": "memory", "shape": vars(SHAPE), "method": "port", "label": "y", "skipped": "does not fit"},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"hardware": _hardware(), "rows": rows}))
    page = tmp_path / "page.md"
    names = ("hardware", "updates", "memory", "time_pictures", "memory_picture")
    page.write_text("".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->\n" for name in names))
    for _ in range(2):  # filling again replaces
        assert main(["--report-only", "--out", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert "old" not in text
    assert text.count("1 MiB") == 1
    assert "`update_` alone, eager" in text
    pictures = {f"benchmark_{name}_{scheme}.svg" for name in ("capacity", "memory") for scheme in ("light", "dark")}
    assert {file.name for file in (tmp_path / "images").iterdir()} == pictures
    assert set(re.findall(r"\(images/(\w+\.svg)#only-(?:light|dark)\)", text)) == pictures
    documented = (Path(__file__).parents[2] / "docs/performance.md").read_text(encoding="utf-8")
    assert all(f"<!-- begin {name} -->" in documented for name in names)
    with pytest.raises(ValueError, match="no place for sizes"):
        fill_page(page, {"sizes": ""})


def test_slow_and_unavailable_methods_are_left_out() -> None:
    def unavailable(problem: Problem) -> None:
        raise UnavailableError("not here")

    methods = [METHODS[BASELINE], Method("none", "none", unavailable)]
    methods += [replace(METHODS["softmax"], bytes_needed=lambda shape: 2**60), METHODS["ours-eager"]]
    rows = EXPERIMENTS._times("capacity", SHAPE, methods, {"ours-eager": 1.0})
    reasons = {row["method"]: row.get("skipped") for row in rows}
    assert reasons[BASELINE] is None
    assert reasons["none"] == "not here"
    assert reasons["softmax"] is not None
    assert reasons["softmax"].startswith("needs about")
    assert reasons["ours-eager"] == "over 8 s"
    assert (
        "Left out"
        in sections({"hardware": _hardware(), "rows": [{**row, "experiment": "sizes"} for row in rows]})["sizes"]
    )


def test_rounds_are_interleaved_and_paired() -> None:
    order: list[str] = []
    calls = {name: (lambda: None) for name in "abc"}
    seconds = interleave(calls, Rounds(seconds=0.0, least=30, most=30), order.append)
    assert order[:6] == list("aabbcc")
    rounds = ["".join(order[start : start + 3]) for start in range(6, len(order), 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) == 6  # every order: nobody always follows the same one
    assert {len(values) for values in seconds.values()} == {30}
    summary = summarize({"base": [1.0, 2.0, 4.0], "other": [3.0, 4.0, 4.0]}, baseline="base")
    assert summary["other"]["ratio_median"] == 2.0
    assert summary["other"]["seconds_median"] == 4.0


@pytest.mark.skipif(not memory.supported("cpu"), reason="needs /proc/self/clear_refs")
def test_peak_memory_sees_the_matrix_and_forgets_it() -> None:
    """In processes of their own: what earlier tests have freed would hold the matrix, unseen."""
    shape = Shape(64, 200_000, 4)
    matrix = 4 * shape.scores
    peaks = {name: memory.measure(METHODS[name], [shape], "cpu", None)[shape] for name in (BASELINE, "ours-eager")}
    assert matrix * 0.9 < peaks[BASELINE] < matrix * 1.5
    assert peaks["ours-eager"] < matrix / 2


@pytest.mark.skipif(not memory.supported("cpu"), reason="needs /proc/self/clear_refs")
def test_a_compiled_draw_for_the_batch_copies_few_groups_at_a_time() -> None:
    """Of a cache of several segments, where the 257 groups that it scores again have 129 MiB of embeddings."""
    shape = Shape(256, 2**19 + 1024, 128)
    assert memory.measure(METHODS["batch"], [shape], "cpu", None)[shape] < 40 * 2**20


def test_memory_process_gives_one_line_per_size(capsys: pytest.CaptureFixture[str]) -> None:
    if not memory.supported("cpu"):
        pytest.skip("needs /proc/self/clear_refs")
    assert memory.main([BASELINE, "8x2048x8", "8x4096x8"]) == 0
    assert [set(json.loads(line)) for line in capsys.readouterr().out.splitlines()] == [{"bytes"}] * 2


def test_every_step_changes_the_cache_by_a_batch() -> None:
    problem = Problem(SHAPE)
    state = problem.state()
    assert bool((state["items", "embedded_at"] >= 0).all())
    before = state["items", "id"].clone()
    METHODS["ours-eager"].make(problem)()
    assert int((state["items", "id"] != before).sum()) == SHAPE.batch
    assert problem.queries.grad is not None
    assert problem.encoded.grad is not None
    torch.testing.assert_close(problem.encoded.norm(dim=1), torch.ones(2 * SHAPE.batch))


def test_selection() -> None:
    assert not any(method.compiled for method in select(reference=None, compiled=False))
    assert not any(method.name.startswith("port") for method in select(reference=None, compiled=True))


def _hardware() -> dict[str, object]:
    return {"flags": [], "cpu": "x", "cores": 1, "threads": 1, "torch": "2", "cpu_kernels": True}
