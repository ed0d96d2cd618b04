"""The experiments: a reduced grid from an empty folder, and that what they count and compare is so."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import negcache_fn
from examples.code_search.evaluate import encode_corpus
from examples.code_search.features import rows_of
from examples.experiments.__main__ import GRID, main
from examples.experiments.encoders import DualEncoder
from examples.experiments.gradients import run_gradients
from examples.experiments.grid import Setting, Trial, read_grid
from examples.experiments.keys import described
from examples.experiments.methods import CacheLearner, Method, exhaustive_loss, in_batch_loss, learner
from examples.experiments.page import tables
from examples.experiments.report import lines
from examples.experiments.runner import final_trials, read_results
from examples.experiments.statistics import mean_of, ratio_of
from examples.experiments.tasks import MINED, Source, Task, load_task
from examples.experiments.trial import evaluate, run_trial
from negcache_fn import StepOptions

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
PUBLISHED = GRID.parent / "published"
REDUCED = """
[tasks.tiny]
data = "{data}"

[methods.exhaustive]
label = "exhaustive"
loss = "exhaustive"
batch = 8

[methods.in_batch]
label = "in-batch"
loss = "in_batch"
batch = 8

[methods.cache]
label = "cache"
loss = "cache"
batch = 8
options.draws_per_query = 2

[comparisons.reduced]
task = "tiny"
encoder = "light"
methods = ["exhaustive", "in_batch", "cache"]
against = ["in_batch", "cache"]
steps = 60
documents = 1200
rates = [0.5, 1.0]
scales = [10.0]
seeds = 2

[gradients.reduced]
task = "tiny"
encoder = "light"
trained_by = "cache"
rate = 1.0
scale = 10.0
steps = [1, 5]
methods = ["in_batch", "cache"]
batches = 1
replicates = 4
"""


@pytest.fixture(scope="module")
def source(installation: Path) -> Source:
    return Source("tiny", str(installation))


@pytest.fixture(scope="module")
def task(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(source, tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return DualEncoder("light", seed=0, scale=10.0)


def cache(*, batch: int = 8, **options: Any) -> Method:
    return Method("cache", "cache", "cache", batch=batch, options=StepOptions(**options))


def trial(source: Source, method: Method, **budgets: float) -> Trial:
    return Trial(source, "light", method, Setting(1.0, 10.0), 0, budgets, tuple(budgets))


def test_reduced_grid_from_an_empty_folder(
    installation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, page, out = tmp_path / "grid.toml", tmp_path / "docs" / "page.md", tmp_path / "out"
    grid.write_text(REDUCED.format(data=installation), encoding="utf-8")
    page.parent.mkdir()
    marks = [f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("reduced", "gradients_reduced")]
    page.write_text("".join(marks), encoding="utf-8")
    command = [f"--grid={grid}", f"--out={out}", f"--page={page}", "--jobs=1"]

    assert main(command) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    asked = [row["asked"] for row in rows if "budgets" in row["asked"]]
    assert len(rows) == len({row["key"] for row in rows}), "nothing is run twice"
    assert sum(not each["test_at"] for each in asked) == 6, "each setting of each method is tried"
    assert all(
        ("test" in point) == (budget in row["asked"]["test_at"])
        for row in rows
        if "at" in row["result"]
        for budget, point in row["result"]["at"].items()
    ), "trials that tune never ask the test queries"
    assert "| exhaustive |" in printed
    assert "Search by TF-IDF, where nothing is learnt: MRR@10 " in printed
    assert "| against in-batch | against cache | gap closed |" in printed
    assert all(line in page.read_text(encoding="utf-8") for line in printed.splitlines() if line.startswith("|"))
    images = {file.name for file in (page.parent / "images").iterdir()}
    assert {f"evidence_reduced_{budget}_light.svg" for budget in ("steps", "documents")} <= images

    before = (out / "results.jsonl").read_bytes()
    with (out / "results.jsonl").open("ab") as file:
        file.write(b'{"key": "unfinished')
    assert main([*command, "--report-only"]) == 0
    assert capsys.readouterr().out == printed
    assert (out / "results.jsonl").read_bytes() == before, "an unfinished line goes, nothing is run again"


def test_results_of_another_corpus_do_not_count(installation: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    text = REDUCED[: REDUCED.index("[gradients")].format(data=installation)
    text = text.replace('against = ["in_batch", "cache"]', 'against = ["in_batch"]')
    grid.write_text(text.replace('"exhaustive", "in_batch", "cache"', '"in_batch"').replace("0.5, ", ""), "utf-8")
    command = [f"--grid={grid}", f"--out={tmp_path}", "--jobs=1"]
    assert main(command) == 0
    file = tmp_path / "results.jsonl"
    count = len(file.read_text().splitlines())
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["result"]["corpus"] = "another"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(command) == 0
    assert len(file.read_text().splitlines()) == count + 1


def test_trial_is_a_function_of_its_fields(source: Source, task: Task) -> None:
    asked = trial(source, cache(draws_per_query=2), steps=20, documents=900)
    first, second = run_trial(asked, task), run_trial(asked, task)
    for result in (first, second):
        for point in (*result["at"].values(), *result["curve"]):
            del point["seconds"]
    assert first == second
    assert asked.key == replace(asked, method=replace(asked.method, label="other", name="other")).key
    assert asked.key != replace(asked, seed=1).key


@pytest.mark.parametrize(
    ("method", "each_step"),
    [
        (Method("in", "in", "in_batch", batch=8), 8),
        (Method("chunked", "chunked", "in_batch", batch=8, chunk=4), 16),
        (Method("random", "random", "in_batch", batch=8, random=5), 13),
        (Method("mined", "mined", "in_batch", batch=8, mined=2), 24),
        (Method("memory", "memory", "memory", batch=8), 8),
        (cache(draws_per_query=3), 8 + 24),
        (cache(draws_per_query=1, refresh_stalest=0.1), 8 + 8 + 10),
        (Method("exhaustive", "exhaustive", "exhaustive", batch=8), None),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "",
)
def test_every_encoded_document_is_counted(source: Source, task: Task, method: Method, each_step: int | None) -> None:
    at_first = len(task.train_documents) if method.loss in ("memory", "cache") else 0
    if each_step is None:
        each_step = len(task.train_documents)
    elif method.options.refresh_stalest:
        each_step = 16 + math.ceil(method.options.refresh_stalest * len(task.train_documents))
    result = run_trial(trial(source, method, steps=3), task)
    assert result["at"]["steps"]["documents"] == at_first + 3 * each_step


def test_chunks_learn_the_same(source: Source, task: Task) -> None:
    whole = Method("in", "in", "in_batch", batch=8)
    found = [run_trial(trial(source, method, steps=30), task) for method in (whole, replace(whole, chunk=3))]
    assert found[0]["scale"] == pytest.approx(found[1]["scale"], rel=1e-5)


def test_held_out_documents_are_never_trained_on(task: Task) -> None:
    seen = np.concatenate([task.batch(0, step, 8, random=4, mined=2).ids.numpy() for step in range(40)])
    assert set(seen) <= set(task.train_documents)
    for name in ("validation", "test"):
        assert not set(task.splits[name].positives.flatten()) & set(task.train_documents)


def test_mined_documents_are_similar_and_do_not_answer(task: Task) -> None:
    train = task.splits["train"]
    assert task.mined.shape == (len(train.queries), MINED)
    assert not (task.mined == train.positives[:, :1]).any()
    documents = {int(row): set(task.documents["tokens"][row].tolist()) - {0} for row in task.train_documents}
    shared = [
        [len(documents[int(row)] & set(task.queries["tokens"][query].tolist())) for row in rows]
        for query, rows in zip(train.queries, task.mined, strict=True)
    ]
    assert np.mean([row[0] for row in shared]) > np.mean([row[-1] for row in shared])


def test_other_documents_change_and_queries_do_not(task: Task) -> None:
    one, same, other = (task.batch(3, 4, 8, random=6, others=others) for others in (0, 0, 1))
    assert torch.equal(one.ids, same.ids)
    assert torch.equal(one.ids[:8], other.ids[:8])
    assert torch.equal(one.queries["tokens"], other.queries["tokens"])
    assert not torch.equal(one.ids[8:], other.ids[8:])


def test_losses_agree_with_the_library(task: Task, model: DualEncoder) -> None:
    """The exhaustive softmax is the exact loss of a cache of all documents, the in-batch one that of an empty cache."""
    batch = task.batch(0, 0, 8, random=30)
    filled = learner(cache(), model, task, 0)
    assert isinstance(filled, CacheLearner)
    empty = negcache_fn.reset(filled.state)
    queries, documents = model.encode_queries(batch.queries), model.encode_documents(batch.documents)
    options: dict[str, Any] = {"scale": model.scale, "ids": batch.ids}
    exhaustive = exhaustive_loss(
        model, batch, model.encode_documents(rows_of(task.documents, task.train_documents)), task
    )
    for in_batch in (True, False):
        exact = negcache_fn.exact_loss(filled.state, queries, documents, in_batch=in_batch, **options)
        assert exhaustive.item() == pytest.approx(exact.item(), abs=1e-5)
    expected = negcache_fn.exact_loss(empty, queries, documents, **options)
    assert in_batch_loss(queries, documents, batch, model.scale, in_batch=True).item() == pytest.approx(
        expected.item(), abs=1e-5
    )
    alone = in_batch_loss(queries, documents[:8], task.batch(0, 0, 8), model.scale, in_batch=False)
    assert alone.item() == 0.0, "without other documents the positive is the only class"


def test_evaluation_ranks_among_all_documents(task: Task, model: DualEncoder) -> None:
    pairs = task.splits["test"]
    documents = encode_corpus(model, task.documents)
    queries = model.encode_queries(rows_of(task.queries, pairs.queries)).detach()
    reciprocal = []
    for query, positive in zip(queries, pairs.positives[:, 0], strict=True):
        scores = (documents @ query).tolist()
        rank = sum(score >= scores[positive] for score in scores)
        reciprocal.append(1 / rank if rank <= 10 else 0.0)
    assert evaluate(model, task, pairs)["mrr@10"] == pytest.approx(np.mean(reciprocal), abs=1e-9)


def test_gradients_tell_bias_from_noise(source: Source, task: Task, tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(REDUCED.format(data=source.data).replace("replicates = 4", "replicates = 40"), encoding="utf-8")
    study = read_grid(file).gradients[0]
    cached = study.methods[1]
    uncorrected = replace(cached, name="uncorrected", options=replace(cached.options, staleness_correction="none"))
    stops = run_gradients(replace(study, methods=(*study.methods, uncorrected), steps=(0,)), task)["stops"]
    assert stops[0]["drift"] == pytest.approx(0, abs=1e-10)
    found = stops[0]["methods"]
    assert found["in_batch"]["noise"] < 1e-3
    assert found["in_batch"]["bias"] > 0.1
    # Nothing is stale yet: without correction the estimate is unbiased.
    assert found["uncorrected"]["bias"] < 0.4 * found["uncorrected"]["noise"]
    assert found["uncorrected"]["noise"] > 0.05


def test_intervals_are_student_s() -> None:
    values = [0.1, 0.4, 0.25, 0.3]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    found = mean_of(values)
    assert (found.mean - found.margin, found.mean + found.margin) == pytest.approx((low, high))
    assert math.isnan(mean_of([1.0]).margin)
    ratio = ratio_of([0.2, 0.3, 0.4], [0.4, 0.6, 0.8])
    assert ratio.mean == pytest.approx(0.5)
    assert ratio.margin == pytest.approx(0, abs=1e-12)


def test_settings_are_chosen_by_validation_alone(installation: Path, tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(REDUCED.format(data=installation), encoding="utf-8")
    comparison = read_grid(file).comparisons[0]
    found: dict[str, Any] = {}
    for one in comparison.tuning():
        better = one.setting.rate == (1.0 if one.method.name == "cache" else 0.5)
        point = {"validation": {"mrr@10": 0.5 if better else 0.4}}
        found[one.key] = {"at": dict.fromkeys(one.budgets, point)}
    rates = {
        method.name: {setting.rate for setting in comparison.chosen(method, found).values()}
        for method in comparison.methods
    }
    assert rates == {"exhaustive": {0.5}, "in_batch": {0.5}, "cache": {1.0}}
    for method in comparison.methods:
        for (budget, seed), one in comparison.final(method, found).items():
            score = 0.1 * seed + {"exhaustive": 0.2, "in_batch": 0.1, "cache": 0.18}[method.name]
            point = {"steps": 1, "documents": 1, "seconds": 1, "test": {"mrr@10": score, "recall@10": 0.5}}
            found.setdefault(one.key, {"at": {}})["at"][budget] = point
    made = {line.method.name: line for line in lines(comparison, "steps", found)}
    assert made["cache"].gap_closed is not None
    assert made["cache"].gap_closed.mean == pytest.approx(0.8)
    assert made["cache"].differences[0].margin == pytest.approx(0, abs=1e-12), "seed by seed the difference is the same"
    assert "exhaustive" not in {line.method.name for line in lines(comparison, "documents", found)}


@pytest.mark.parametrize("with_dev", [True, False])
def test_beir_folder(tmp_path: Path, with_dev: bool) -> None:
    write_beir(tmp_path, with_dev=with_dev)
    task = load_task(Source("beir", str(tmp_path)), tmp_path)
    sizes = {name: len(pairs.queries) for name, pairs in task.splits.items()}
    assert sizes == (
        {"train": 20, "validation": 5, "test": 5} if with_dev else {"train": 18, "validation": 2, "test": 5}
    )
    assert task.splits["train"].positives.shape[1] == 2
    batch = task.batch(0, 0, 4)
    for row, answers in zip(batch.ids, batch.positives, strict=True):
        assert int(row) in answers.tolist()
    result = run_trial(trial(Source("beir", str(tmp_path)), cache(batch=4), steps=5), task)
    assert 0 <= result["at"]["steps"]["test"]["mrr@10"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('loss = "cache"', 'loss = "cache"\nsamples = 2'), "cache has the keys ['samples'], which a Method has not"),
        (("options.draws", "options.k = 2\noptions.draws"), "cache has the keys ['k'], which a StepOptions has not"),
        (("_per_query = 2", "_per_query = 0"), "cache: draws_per_query is 0; expected"),
        (('encoder = "light"', 'encoder = "heavy"'), "reduced has encoder 'heavy'; expected one of"),
        (('"in_batch", "cache"]\nagainst', '"in_batch", "port"]\nagainst'), "reduced names the methods ['port']"),
        (('against = ["in_batch", "cache"]', 'against = ["port"]'), "reduced is against ['port']; expected some of"),
        (("seeds = 2", ""), "seeds"),
    ],
)
def test_mistakes_in_a_grid_are_named(
    tmp_path: Path, change: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(REDUCED.format(data="x").replace(*change), encoding="utf-8")
    assert main([f"--grid={file}", f"--out={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(file) in error


def test_unknown_comparison_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nothing", f"--out={tmp_path}"]) == 1
    assert "--only names ['nothing']; expected some of" in capsys.readouterr().err


def test_unknown_loss_is_named(task: Task, model: DualEncoder) -> None:
    with pytest.raises(ValueError, match="loss of x is 'other'; expected one of"):
        learner(Method("x", "x", "other"), model, task, 0)


def test_empty_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("def f(x):\n    return x\n")
    with pytest.raises(ValueError, match="split has no queries"):
        load_task(Source("x", str(tmp_path)), tmp_path / "store")


def test_page_shows_the_published_results() -> None:
    """Tables and pictures of the page are those that the command makes of the runs that are kept beside it."""
    grid, found, text = read_grid(GRID), read_results(PUBLISHED), PAGE.read_text(encoding="utf-8")
    made = tables(grid, found)
    assert {"methods", "options", "gradients_light"} <= made.keys()
    for name, markdown in made.items():
        between = text.split(f"<!-- begin {name} -->")[1].split(f"<!-- end {name} -->")[0]
        assert between.strip() == markdown, name
    for image in re.findall(r"images/(evidence_\w+\.svg)", text):
        assert (PAGE.parent / "images" / image).is_file()


def test_only_the_first_table_of_the_page_is_open() -> None:
    """A folded block has its summary, and blank lines around its markdown."""
    text = PAGE.read_text(encoding="utf-8")
    block = r'<details markdown="1">\n<summary>Table: [^<]+</summary>\n\n<!-- begin .*?-->\n\n</details>\n'
    folded = re.findall(block, text, re.DOTALL)
    assert len(folded) == text.count("<details") == text.count("<!-- begin ") - 1
    opened = re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL)
    assert re.findall(r"<!-- begin (\w+) -->", opened) == ["encoder_gpu"]
    assert "\n|" not in opened.split("<!-- end encoder_gpu -->")[1]


def test_published_results_are_named_as_their_trials_are() -> None:
    """Every line that a trial of the grid finds describes that trial, so that a new line is like the published ones."""
    grid, found = read_grid(GRID), read_results(PUBLISHED)
    lines = map(json.loads, (PUBLISHED / "results.jsonl").read_text(encoding="utf-8").splitlines())
    published = {line["key"]: line["asked"] for line in lines}
    asked: list[Any] = list(grid.gradients)
    for comparison in grid.comparisons:
        asked += [comparison.lexical, *comparison.tuning(), *final_trials(comparison, found)]
    assert {one.key for one in asked} == set(published)
    for one in asked:
        assert _nameless(described(one)) == _nameless(published[one.key])


def _nameless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nameless(inner) for key, inner in value.items() if key not in ("name", "label")}
    return [_nameless(inner) for inner in value] if isinstance(value, list) else value


def test_an_option_that_no_published_line_has_makes_another_key(source: Source) -> None:
    one, other = (trial(source, cache(top_k=top_k), steps=1) for top_k in (None, 64))
    assert "top_k" not in described(one)["method"]
    assert described(other)["method"]["top_k"] == 64
    assert one.key != other.key


def test_no_results_yet(tmp_path: Path) -> None:
    assert read_results(tmp_path) == {}


def write_beir(folder: Path, *, with_dev: bool) -> None:
    verbs, nouns = (
        ("parse", "merge", "sort", "count", "rotate", "encode"),
        ("date", "header", "matrix", "token", "orbit"),
    )
    texts = [f"{verb} the {noun} quickly" for verb in verbs for noun in nouns]
    corpus = [json.dumps({"_id": f"d{row}", "title": "", "text": text}) for row, text in enumerate(texts)]
    queries = [json.dumps({"_id": f"q{row}", "text": f"how to {text}"}) for row, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("\n".join(corpus))
    (folder / "queries.jsonl").write_text("\n".join(queries))
    (folder / "qrels").mkdir()
    parts = {"train": range(20), "dev": range(20, 25), "test": range(25, 30)}
    for split, rows in parts.items():
        if split == "dev" and not with_dev:
            continue
        judged = [f"q{row}\td{row}\t1" for row in rows]
        if split == "train":
            judged += ["q0\td1\t1", "q0\td2\t0"]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
