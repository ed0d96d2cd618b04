"""The pictures of the documentation: they are drawn, and what the pages read off them is so."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import negcache_fn
from examples.pictures import charts
from examples.pictures.__main__ import PICTURES, main
from examples.pictures.drawing import THEMES, Theme, save
from examples.pictures.flow import diagram, sizes_of_a_step
from examples.pictures.measures import (
    Correction,
    Drift,
    Gradients,
    Life,
    Mass,
    correction_by_age,
    drift_by_age,
    gradients_by_draws,
    lives,
    softmax_mass,
)
from examples.pictures.training import BATCH, SCALE, Run, train

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def run() -> Run:
    return train(60, capacity=256)


def test_command_writes_both_schemes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = dict(mpl.rcParams)
    assert main(["--only", "flow", "--out", str(tmp_path)]) == 0
    files = [tmp_path / f"concept_flow_{scheme}.svg" for scheme in ("light", "dark")]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    for file, theme in zip(files, THEMES.values(), strict=True):
        assert ElementTree.parse(file).getroot().tag.endswith("svg")
        assert theme.ink in file.read_text(encoding="utf-8")
    assert dict(mpl.rcParams) == settings


def test_pages_show_every_picture_in_both_schemes() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    for name in PICTURES:
        for scheme in THEMES:
            assert (DOCS / "images" / f"concept_{name}_{scheme}.svg").is_file()
            assert f"images/concept_{name}_{scheme}.svg#only-{scheme})" in pages


DRAWN: dict[str, Callable[[Theme], Figure]] = {
    "flow": lambda theme: diagram(theme, sizes_of_a_step(capacity=64, steps=5)),
    "mass": lambda theme: charts.mass(theme, Mass(0.004, 0.257, 0.747, 1024, 4096)),
    "gradients": lambda theme: charts.gradients(theme, Gradients([1, 4, 16], [0.7] * 3, [0.7, 0.9, 0.98], 0.24)),
    "life": lambda theme: charts.life(theme, {"fifo": [Life(32, [3, 31])], "lru": [Life(21, []), Life(None, [2])]}),
    "drift": lambda theme: charts.drift(
        theme, {step: Drift([2.5, 6.5], [(0.01, 0.02, 0.03), (0.1 / step, 0.2, 0.3)]) for step in (100, 400)}
    ),
    "correction": lambda theme: charts.correction(
        theme, Correction([0, 64], [0.0, 0.1], {"none": [0.99, 0.7], "self_normalized": [0.99, 0.98]})
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_within_their_frame_and_the_same_twice(name: str, tmp_path: Path) -> None:
    assert set(DRAWN) == set(PICTURES)
    figures: list[Figure] = []

    def draw(theme: Theme) -> Figure:
        figures.append(DRAWN[name](theme))
        return figures[-1]

    first = [file.read_bytes() for file in save(name, draw, tmp_path)]
    assert [file.read_bytes() for file in save(name, draw, tmp_path)] == first
    assert first[0] != first[1]
    canvas = FigureCanvasAgg(figures[0])
    canvas.draw()
    box, frame = figures[0].get_tightbbox(canvas.get_renderer()), figures[0].bbox_inches
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= frame.x1 + 0.01 and box.y1 <= frame.y1 + 0.01


def test_mass_is_that_of_the_softmax(run: Run) -> None:
    """Against sums over one query at a time in float64; the batch's is that of a random sample."""
    found = softmax_mass(run, queries=32)
    rows = torch.randperm(4096, generator=torch.Generator().manual_seed(3))[:32].tolist()
    documents = run.documents(run.corpus.documents).double().detach()
    cached = set(run.state["items", "id"].tolist())
    in_cache, hardest = [], []
    for row in rows:
        query = _embed(run, row)
        weights = [0.0 if n == row else math.exp(SCALE * score) for n, score in enumerate((documents @ query).tolist())]
        total = math.fsum(weights)
        in_cache.append(math.fsum(weight for n, weight in enumerate(weights) if n in cached) / total)
        hardest.append(math.fsum(sorted(weights)[-BATCH:]) / total)
    assert found.cache == pytest.approx(math.fsum(in_cache) / 32, rel=1e-4)
    assert found.hardest == pytest.approx(math.fsum(hardest) / 32, rel=1e-4)
    assert found.batch < found.cache < found.hardest


def _embed(run: Run, row: int) -> torch.Tensor:
    return run.queries(run.corpus.questions[row : row + 1])[0].double().detach()


def test_more_draws_come_nearer_than_the_batch(run: Run) -> None:
    found = gradients_by_draws(run, [1, 4, 64], batches=4)
    assert found.in_batch < found.shared[0] < found.shared[1] < found.shared[2]
    assert found.shared[2] > 0.97
    assert found.own[2] > 0.97


def test_correction_keeps_the_direction() -> None:
    found = correction_by_age(60, [0, 40], capacity=256, batches=4, repeats=4)
    assert found.drift[0] == pytest.approx(0, abs=1e-10)
    assert found.drift[1] > 0.01
    assert found.cosine["none"][0] == pytest.approx(found.cosine["self_normalized"][0], abs=0.02)
    assert found.cosine["none"][1] < found.cosine["self_normalized"][1] - 0.05


def test_old_embeddings_have_drifted() -> None:
    drift = drift_by_age([60], capacity=512)[60]
    medians = [median for _, median, _ in drift.quartiles]
    assert drift.ages[-1] > 20
    assert medians[0] < medians[len(medians) // 2] < medians[-1]
    assert all(low <= median <= high for low, median, high in drift.quartiles)


def test_lives_end_as_the_page_says() -> None:
    fifo, lru = (lives(evict, steps=170) for evict in ("fifo", "lru"))
    assert [life.left for life in fifo] == [32] * 12  # C / N
    assert len(lru) == 12
    never = [life.left for life in lru if not life.drawn]
    drawn = [life.left for life in lru if life.drawn and life.left is not None]
    assert never and drawn
    assert all(left is not None and 16 <= left <= 32 for left in never)  # C / (N + B k) to C / N
    assert min(drawn) > max(left for left in never if left is not None)


def test_flow_counts_what_a_step_encodes_and_writes() -> None:
    encoded: list[int] = []

    class Counting(torch.nn.Linear):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            encoded.append(len(features))
            return super().forward(features)

    state = negcache_fn.init_cache(64, 4, features=torch.zeros(1, 3))
    encoder = Counting(3, 4)
    options = negcache_fn.StepOptions(draws_per_query=2)
    for _ in range(2):
        state = negcache_fn.step(state, torch.randn(4, 4), torch.randn(4, 3), encoder, options=options).state
    assert encoded == [4 + 8, 4 + 8]
    sizes = sizes_of_a_step(capacity=64, draws_per_query=2, steps=6)
    assert sizes._replace(written=0) == (BATCH, 64, 2 * BATCH, 3 * BATCH, 0)
    assert BATCH < sizes.written < 3 * BATCH
