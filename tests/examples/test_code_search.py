"""The code search example on a small made-up installation: it trains, resumes exactly, and searches."""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.code_search.__main__ import main
from examples.code_search.baselines import tfidf
from examples.code_search.checkpoint import load
from examples.code_search.corpus import SPLITS, Bags, load_or_harvest
from examples.code_search.evaluate import ranks_of, summarize
from examples.code_search.features import inverse_document_frequency, padded
from examples.code_search.harvest import harvest_file
from examples.code_search.methods import METHODS, in_batch_loss
from examples.code_search.run import Run
from examples.pictures.drawing import THEMES
from tests.support.same_files import assert_same

OPTIONS = ["--embedding-dim=32", "--batch-size=4", "--draws-per-query=2", "--cache-size=24", "--evaluate-every=3"]


def train(installation: Path, out: Path, steps: int, *options: str) -> int:
    return main(["train", f"--root={installation}", f"--out={out}", f"--steps={steps}", *OPTIONS, *options])


@pytest.fixture(scope="module")
def trained(installation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert train(installation, out, 7) == 0
    return out


def test_training_leaves_results_picture_and_checkpoints(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    labels = ["tf-idf", *(method.label for method in METHODS)]
    assert list(summary["test"]) == labels
    assert all(0 <= summary["test"][label]["mrr@10"] <= summary["test"][label]["recall@10"] <= 1 for label in labels)
    for scheme, theme in THEMES.items():
        assert theme.ours in (trained / f"training_{scheme}.svg").read_text(encoding="utf-8")
    for method in METHODS:
        rows = [json.loads(line) for line in (trained / method.name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 8))
        assert [row["step"] for row in rows if "mrr@10" in row] == [3, 6, 7]
        checkpoint = torch.load(trained / method.name / "checkpoint.pt", weights_only=True)
        assert checkpoint["step"] == 7
        assert (checkpoint["cache"] is not None) == method.cached


def test_interrupted_run_goes_on_to_the_same_result(
    installation: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps_of_run = Run._train_step

    def interrupted_step(run: Run) -> dict[str, float]:
        if run.step == 4:
            signal.raise_signal(signal.SIGINT)
        return steps_of_run(run)

    # Each call is stopped in the first unfinished run that comes to its fifth step.
    monkeypatch.setattr(Run, "_train_step", interrupted_step)
    for method in METHODS:
        assert train(installation, tmp_path, 7) == 130
        assert "interrupted, run again to go on" in capsys.readouterr().err
        assert load(tmp_path / method.name / "checkpoint.pt")["step"] == 5
        with (tmp_path / method.name / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "loss": "of a killed run"}\n')
    monkeypatch.undo()
    assert train(installation, tmp_path, 7) == 0

    for method in METHODS:
        resumed, uninterrupted = (load(out / method.name / "checkpoint.pt") for out in (tmp_path, trained))
        del resumed["seconds"], uninterrupted["seconds"]
        assert_same(resumed, uninterrupted)
        metrics = [(out / method.name / "metrics.jsonl").read_text() for out in (tmp_path, trained)]
        assert metrics[0] == metrics[1]


def test_other_options_start_over(installation: Path, trained: Path, tmp_path: Path, capsys) -> None:
    assert train(installation, tmp_path, 2) == 0
    assert train(installation, tmp_path, 2, "--seed=1") == 0
    assert "starting over" in capsys.readouterr().out
    assert load(tmp_path / "cache" / "checkpoint.pt")["identity"]["seed"] == 1


def test_search_prints_file_and_line(installation: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "parse the date", f"--out={trained}", "--count=3"]) == 0
    printed = capsys.readouterr().out
    assert f"{installation / 'date' / 'parse.py'}:2" in printed
    assert "def parse_date(date, limit):" in printed
    assert len(printed.splitlines()) == 9


def test_search_says_what_is_wrong(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "parse the date", f"--out={tmp_path}"]) == 1
    assert "run `make train` first" in capsys.readouterr().err
    assert main(["search", "?!", f"--out={trained}"]) == 1
    assert "no word in '?!'" in capsys.readouterr().err


def test_too_little_code_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, tmp_path / "out", 2) == 1
    assert "give more code" in capsys.readouterr().err
    assert train(tmp_path / "none", tmp_path / "out", 2) == 1
    assert "is no folder" in capsys.readouterr().err


def test_no_held_out_module_is_in_a_batch(installation: Path, tmp_path: Path) -> None:
    corpus = load_or_harvest([installation], tmp_path / "corpus.npz")
    splits = [SPLITS[split] for split in corpus.document_split]
    by_path: dict[str, set[str]] = {}
    for path, split in zip(corpus.paths, splits, strict=True):
        by_path.setdefault(path, set()).add(split)
    assert all(len(of_path) == 1 for of_path in by_path.values())
    assert set(splits) == set(SPLITS)
    run_documents = {int(row) for row in corpus.documents_of("train")}
    assert all(splits[row] == "train" for row in run_documents)


def test_saved_corpus_is_the_harvested_one(installation: Path, tmp_path: Path) -> None:
    root = tmp_path / "installation"
    shutil.copytree(installation, root)
    harvested, saved = (load_or_harvest([root], tmp_path / "corpus.npz") for _ in range(2))
    assert harvested.key == saved.key
    assert (harvested.names, harvested.paths, harvested.lines) == (saved.names, saved.paths, saved.lines)
    assert harvested.query_texts == saved.query_texts
    for one, other in ((harvested.documents, saved.documents), (harvested.queries, saved.queries)):
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("starts", "tokens", "counts"))
    edited = root / "date" / "parse.py"
    edited.write_text(edited.read_text() + "\n\ndef added(one):\n    return one + 1\n")
    assert "added" in load_or_harvest([root], tmp_path / "corpus.npz").names


SOURCE = '''
class Reader:
    """A reader of things."""

    def readAll(self, path):
        """Read all of the file.

        :param path: the file
        """
        def inner():
            "Not a query, and not a document token: secret."
            return path
        return inner()

    def stub(self):
        """To be overridden by every reader."""
        raise NotImplementedError
'''


def test_harvest_takes_docstrings_out(tmp_path: Path) -> None:
    file = tmp_path / "reader.py"
    file.write_text(SOURCE)
    functions = {function.name: function for function in harvest_file(file)}
    assert set(functions) == {"Reader.readAll", "Reader.readAll.inner"}
    assert functions["Reader.readAll"].query == "Read all of the file."
    assert functions["Reader.readAll"].line == 5
    masked = {function.name: function for function in harvest_file(file, mask_names=True)}["Reader.readAll"]
    assert len(masked.tokens) < len(functions["Reader.readAll"].tokens)
    assert masked.body_hash == functions["Reader.readAll"].body_hash
    (tmp_path / "broken.py").write_text("def f(:")
    assert harvest_file(tmp_path / "broken.py") == []


def test_features_keep_the_heaviest_tokens(installation: Path, tmp_path: Path) -> None:
    corpus = load_or_harvest([installation], tmp_path / "corpus.npz")
    idf = inverse_document_frequency(corpus.documents, np.arange(len(corpus.documents)))
    features, narrow = (padded(corpus.documents, idf, width) for width in (64, 3))
    assert torch.allclose(features["weights"].norm(dim=1), torch.ones(len(corpus.documents)))
    assert torch.equal(narrow["tokens"], features["tokens"][:, :3])
    assert (features["weights"].diff(dim=1) <= 0).all()
    assert ((features["tokens"] == 0) == (features["weights"] == 0)).all()


def test_ranks_and_their_summary_by_hand() -> None:
    documents = torch.eye(3)
    queries = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
    ranks = ranks_of(queries, documents, np.array([[0], [2], [0]]))
    assert ranks.tolist() == [1, 3, 2]  # equal scores count against
    assert ranks_of(queries, documents, np.array([[2, 1], [2, -1], [-1, 2]])).tolist() == [2, 3, 3]  # the best counts
    assert summarize(np.array([1, 2, 10, 11])) == {"mrr@10": pytest.approx(1.6 / 4), "recall@10": 0.75}


def test_tfidf_is_the_cosine_of_weighted_counts() -> None:
    """Weight (1 + ln count) (1 + ln((1 + N) / (1 + documents with the word))), rank by rank."""
    generator = np.random.default_rng(0)

    def bag() -> dict[int, int]:
        words = generator.permutation(12)[: generator.integers(2, 7)]
        return {word: int(generator.integers(1, 5)) for word in words.tolist()}

    documents, queries = [bag() for _ in range(30)], [bag() for _ in range(6)]
    positives = np.array([[3, 5], [7, -1], [1, 2], [20, -1], [9, -1]])
    rows = np.array([4, 0, 2, 5, 1])

    def weighted(counts: dict[int, int]) -> dict[int, float]:
        weights = {
            word: (1 + math.log(count)) * (1 + math.log(31 / (1 + sum(word in other for other in documents))))
            for word, count in counts.items()
        }
        length = math.hypot(*weights.values())
        return {word: weight / length for word, weight in weights.items()}

    reciprocal = []
    for row, answers in zip(rows, positives, strict=True):
        query = weighted(queries[row])
        scores = [sum(query.get(word, 0) * weight for word, weight in weighted(each).items()) for each in documents]
        best = max(scores[answer] for answer in answers if answer >= 0)
        rank = sum(score >= best - 1e-6 for score in scores)
        reciprocal.append(1 / rank if rank <= 10 else 0.0)
    found = tfidf(Bags.of(documents), Bags.of(queries), rows, positives)
    assert found["mrr@10"] == pytest.approx(np.mean(reciprocal), abs=1e-9)
    assert 0.1 < found["mrr@10"] < 0.9


def test_in_batch_loss_counts_a_repeated_document_once() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (2, 4))
    scale = torch.tensor(2.0, dtype=torch.float64)
    repeated = torch.cat([documents, documents[:1]])
    loss = in_batch_loss(queries, repeated, torch.tensor([7, 3, 5, 9, 7]), scale)
    scores = (2 * queries @ documents.T).exp()
    expected = -(scores.diagonal() / scores.sum(1)).log().mean()
    assert torch.allclose(loss, expected)
