"""The MS MARCO example on a made-up collection: it learns, resumes exactly, and its metrics are the official ones."""

import json
import math
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import negcache_fn
from examples.msmarco import run as run_module
from examples.msmarco.__main__ import main
from examples.msmarco.data import Data, Judgements, TrainingSet
from examples.msmarco.evaluate import asked, evaluate
from examples.msmarco.formats import Collection, Judgement, read_judgements, read_texts
from examples.msmarco.metrics import mrr, ndcg, recall
from examples.msmarco.model import DualEncoder, load_tokenizer, load_transformer
from examples.msmarco.options import Shape
from examples.msmarco.retrieval import encode, search
from examples.msmarco.run import Run
from examples.msmarco.sample import docstring_pairs, make_sample, write_collection
from examples.msmarco.texts import tokenized
from examples.msmarco.tiny import make_tiny_model
from tests.support.same_files import assert_same

CONCEPTS = 20
FAST = ["--tiny", "--passage-tokens=12", "--query-tokens=8", "--rate=3e-3", "--warm-up=20", "--cache-size=96"]
SHORT = [*FAST, "--steps=8", "--evaluate-every=3", "--log-every=1", "--draws-per-query=2", "--random-passages=4"]


def passages_and_queries() -> tuple[dict[str, str], dict[str, str], dict[str, list[Judgement]]]:
    """Passages name three concepts by words that queries never use: what they have in common is to be learnt."""
    generator = np.random.default_rng(0)
    named = sorted({tuple(sorted(generator.choice(CONCEPTS, 3, replace=False).tolist())) for _ in range(160)})
    named = [named[place] for place in generator.permutation(len(named))]
    passages = {f"p{row}": " ".join(f"thing{concept}x" for concept in three) for row, three in enumerate(named)}
    queries: dict[str, str] = {}
    judgements: dict[str, list[Judgement]] = {"train": [], "dev": []}
    for row, three in enumerate(named):
        queries[f"q{row}"] = " ".join(f"word{concept}y" for concept in reversed(three))
        judgements["dev" if row < 30 else "train"].append(Judgement(f"q{row}", f"p{row}", 1, 0))
    # Some queries have two answers, and a passage that was judged to be none.
    judgements["train"] += [Judgement(f"q{row}", f"p{row - 5}", 1, 0) for row in range(60, 80)]
    judgements["train"] += [Judgement(f"q{row}", f"p{row - 7}", 0, 0) for row in range(60, 80)]
    return passages, queries, judgements


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("collections")
    for kind in ("msmarco", "beir"):
        write_collection(root / kind, *passages_and_queries(), kind=kind)
    return {kind: root / kind for kind in ("msmarco", "beir")}


def train(data: Path, out: Path, *options: str) -> int:
    return main(["train", f"--data={data}", f"--out={out}", "--device=cpu", *options])


def rows_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert train(folders["msmarco"], out, *FAST, "--steps=250", "--evaluate-every=250") == 0
    return out


@pytest.fixture(scope="module")
def data(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Data:
    model = tmp_path_factory.mktemp("model") / "tiny"
    collection = Collection.open(folders["msmarco"])
    files = (collection.passages, collection.queries("train"))
    make_tiny_model(model, [text for file in files for _, text in read_texts(file)])
    store = folders["msmarco"] / "tokens"
    return Data(collection, load_tokenizer(model), query_tokens=8, passage_tokens=12, store=store)


@pytest.fixture(scope="module")
def encoder(data: Data) -> DualEncoder:
    torch.manual_seed(0)
    model = DualEncoder(load_transformer(Path(data._tokenizer.name_or_path)), Shape(), data.padding)
    return model.eval()


# ---- training


def test_training_finds_what_the_untrained_encoder_does_not(trained: Path) -> None:
    untrained, *_, last = rows_of(trained)
    assert (untrained["step"], last["step"]) == (0, 250)
    assert untrained["mrr@10"] < 0.1
    assert last["mrr@10"] > 0.3
    assert last["occupancy"] == 1.0
    assert last["non_finite"] == 0


def test_evaluation_agrees_with_its_run_file(folders: dict[str, Path], trained: Path) -> None:
    data = f"--data={folders['msmarco']}"
    assert main(["evaluate", data, f"--out={trained}", "--device=cpu", "--depth=100", "--split", "dev", "train"]) == 0
    results = json.loads((trained / "results.json").read_text())
    for split in ("dev", "train"):
        ranked: dict[str, list[str]] = defaultdict(list)
        for place, line in enumerate((trained / f"run.{split}.trec").read_text().splitlines()):
            query, _, passage, rank, _score, tag = line.split()
            ranked[query].append(passage)
            assert (int(rank), tag) == (place % 100 + 1, "negcache_fn")
        judged: dict[str, dict[str, int]] = defaultdict(dict)
        for judgement in read_judgements(folders["msmarco"] / f"qrels.{split}.tsv"):
            judged[judgement.query][judgement.passage] = judgement.grade
        assert results[split]["mrr@10"] == pytest.approx(plain_mrr(ranked, judged), abs=1e-12)
        assert results[split]["ndcg@10"] == pytest.approx(plain_ndcg(ranked, judged), abs=1e-12)
        assert results[split]["queries"] == len(judged)
    # The log's last row is of the same encoder, over all passages too.
    assert results["dev"]["mrr@10"] == pytest.approx(rows_of(trained)[-1]["mrr@10"], abs=1e-12)


def test_trained_encoder_is_exported(trained: Path) -> None:
    saved = torch.load(trained / "checkpoint.pt", weights_only=True)["model"]
    for name, weight in load_transformer(trained / "encoder").state_dict().items():
        assert torch.equal(weight, saved[f"passage_tower.transformer.{name}"])
    assert (
        load_tokenizer(trained / "encoder")("thing1x")["input_ids"]
        == load_tokenizer(trained / "tiny")("thing1x")["input_ids"]
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("msmarco", ["--storage=device"]),
        ("beir", ["--storage=files", "--towers=separate", "--chunk-size=5", "--pooling=cls", "--precision=bfloat16"]),
        ("msmarco", ["--storage=cpu", "--estimator=paper", "--prefill=0"]),
    ],
)
def test_interrupted_run_goes_on_to_the_same_result(
    kind: str,
    options: list[str],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight, halted = tmp_path / "straight", tmp_path / "halted"
    assert train(folders[kind], straight, *SHORT, *options) == 0

    step_of_run = Run._train_step

    def interrupted_step(run: Run) -> object:
        if run.step == 4:
            signal.raise_signal(signal.SIGINT)
        return step_of_run(run)

    monkeypatch.setattr(Run, "_train_step", interrupted_step)
    assert train(folders[kind], halted, *SHORT, *options) == 130
    assert "interrupted, run again to go on" in capsys.readouterr().err
    monkeypatch.undo()
    assert [row["step"] for row in rows_of(halted)] == [0, 1, 2, 3, 4, 5]
    with (halted / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "loss": 0}\n{"step": 7, "lo')  # of a process that was killed while it wrote
    torch.manual_seed(99)
    assert train(folders[kind], halted, *SHORT, *options) == 0

    resumed, uninterrupted = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (halted, straight))
    assert_same(resumed, uninterrupted)
    assert uninterrupted["step"] == 8
    assert (halted / "metrics.jsonl").read_text() == (straight / "metrics.jsonl").read_text()


def test_storage_changes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    logs = []
    for storage in ("device", "files"):
        assert train(folders["msmarco"], tmp_path / storage, *SHORT, f"--storage={storage}") == 0
        logs.append((tmp_path / storage / "metrics.jsonl").read_text())
    assert logs[0] == logs[1]


def test_both_formats_are_the_same_collection(folders: dict[str, Path], data: Data) -> None:
    beir = Data(
        Collection.open(folders["beir"]), data._tokenizer, query_tokens=8, passage_tokens=12,
        store=folders["beir"] / "tokens",
    )  # fmt: skip
    for name in ("starts", "ids", "_tokens"):
        assert np.array_equal(getattr(data.passages, name), getattr(beir.passages, name))
    pairs = []
    for one in (data, beir):
        queries = one.queries("train")
        judged = one.judgements("train", queries)
        pairs.append(set(zip(queries.names(judged.queries), judged.passages.tolist(), judged.grades, strict=True)))
    assert pairs[0] == pairs[1]
    assert len(pairs[0]) == len(passages_and_queries()[2]["train"])


def test_another_run_is_not_overwritten(folders: dict[str, Path], data: Data, trained: Path, capsys) -> None:
    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    other_model = Path(data._tokenizer.name_or_path)
    assert train(folders["msmarco"], trained, *FAST, "--steps=250", "--evaluate-every=250", "--batch-size=4") == 1
    assert "is of another run: batch_size 8, now 4. Give" in capsys.readouterr().err
    assert train(folders["beir"], trained, *FAST[1:], "--steps=250", f"--model={other_model}") == 1
    assert "is of another run: passages" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()} == before


def test_what_answers_a_query_is_never_drawn_for_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several, step = 0, negcache_fn.step_

    def watched(*arguments: object, **options: object) -> negcache_fn.StepOutput:
        nonlocal several
        output = step(*arguments, **options)
        positives = options["false_negatives"].ids
        assert not (output.draw.id[:, :, None] == positives[:, None, :]).any()
        assert (positives == options["ids"][: len(positives), None]).any(1).all()
        several += int((positives >= 0).sum(1).max() > 1)
        return output

    monkeypatch.setattr(run_module.negcache_fn, "step_", watched)
    assert train(folders["msmarco"], tmp_path, *SHORT, "--scale=1", "--cache-size=160") == 0
    assert several > 0


def test_rates_rise_and_fall() -> None:
    shares = [run_module._share_of_rate(step, 3, 8) for step in range(8)]
    assert shares == [1 / 4, 2 / 4, 3 / 4, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]
    assert run_module._share_of_rate(0, 0, 4) == 1


# ---- batches


def test_batches_are_a_function_of_seed_and_step(data: Data) -> None:
    def batches(seed: int, steps: list[int]) -> list[list[int]]:
        training_set = TrainingSet(data, batch_size=8, random_passages=3, seed=seed)
        return [training_set.batch(step).ids.tolist() for step in steps]

    assert batches(0, [5, 40, 6]) == batches(0, [5, 40, 6])[:3]
    assert batches(0, [6]) == batches(0, [5, 40, 6])[2:]
    assert batches(1, [6]) != batches(0, [6])


def test_an_epoch_has_every_query_once(data: Data) -> None:
    training_set = TrainingSet(data, batch_size=8, random_passages=0, seed=0)
    queries = data.queries("train")
    relevant = data.judgements("train", queries).relevant()
    answers = defaultdict(set)
    for query, passage in zip(relevant.queries.tolist(), relevant.passages.tolist(), strict=True):
        answers[query].add(passage)
    by_tokens = {tuple(queries.padded(np.array([row]), 0, 8)[0].tolist()): row for row in answers}
    seen = []
    for step in range(len(answers) // 8):
        batch = training_set.batch(step)
        for tokens, own, positives in zip(batch.queries, batch.ids, batch.positives, strict=True):
            query = by_tokens[(*tokens.tolist(), *[0] * (8 - len(tokens)))]
            seen.append(query)
            assert int(own) in answers[query]
            assert {row for row in positives.tolist() if row >= 0} == answers[query]
    assert len(seen) == len(set(seen)) == len(answers) // 8 * 8


def test_triples_bring_their_negatives(folders: dict[str, Path], data: Data, tmp_path: Path) -> None:
    file = tmp_path / "qidpidtriples.tsv"
    file.write_text("q70\tp70\tp3\nq31\tp31\tp4\n")
    training_set = TrainingSet(data, batch_size=4, random_passages=1, seed=0, triples=file)
    own = dict(zip([*data.passages.rows_of(["p70", "p31"])], [*data.passages.rows_of(["p3", "p4"])], strict=True))
    seen = set()
    for step in range(4):
        batch = training_set.batch(step)
        ids = batch.ids.tolist()
        assert len(ids) == 4 + 4 + 1
        assert [own[row] for row in ids[:4]] == ids[4:8]
        seen |= set(ids[:4])
    assert seen == set(own)
    assert train(folders["msmarco"], tmp_path / "out", *SHORT, f"--triples={file}") == 0
    file.write_text("q70\tp70\tp3\nq70\tp70\tp9999\n")
    with pytest.raises(ValueError, match=r"qidpidtriples.tsv:2: there is no passage 'p9999'"):
        TrainingSet(data, batch_size=4, random_passages=1, seed=0, triples=file)


# ---- files


def test_texts_are_what_the_tokenizer_makes_of_them(data: Data, tmp_path: Path) -> None:
    words = ["thing1x thing2x", "", "thing3x " * 30, "Thing1X\u2028thing4x"]
    file = tmp_path / "collection.tsv"
    file.write_text("".join(f"{row}\t{text}\n" for row, text in enumerate(words)), encoding="utf-8")
    texts = tokenized(file, data._tokenizer, 12, tmp_path / "store")
    expected = data._tokenizer(words, truncation=True, max_length=12)["input_ids"]
    assert [texts.padded(np.array([row]), 0)[0].tolist() for row in range(4)] == expected
    assert len(expected[2]) == 12
    padded = texts.padded(np.array([2, 0]), 7, 20)
    assert padded.dtype == torch.int32
    assert padded[1].tolist() == expected[0] + [7] * (20 - len(expected[0]))
    assert texts.rows_of(["3", "x", "0", "10"]).tolist() == [3, -1, 0, -1]
    stamp = (tmp_path / "store" / f"collection-{texts.key}" / "tokens.bin").stat().st_mtime_ns
    again = tokenized(file, data._tokenizer, 12, tmp_path / "store")
    assert (tmp_path / "store" / f"collection-{again.key}" / "tokens.bin").stat().st_mtime_ns == stamp
    assert tokenized(file, data._tokenizer, 11, tmp_path / "store").key != texts.key


BAD_TEXTS = [
    ("a.tsv", "1\tone\n2 two\n", r"a.tsv:2: '2 two' has 1 columns; expected an id, a tab and a text"),
    ("a.tsv", "1\tone\n\n", r"a.tsv:2: '' has 1 columns"),
    ("a.tsv", "1\tone\ttwo\n", r"a.tsv:1: .* has 3 columns"),
    ("a.jsonl", '{"_id": "1", "text": "one"}\n{"_id": "2"\n', r"a.jsonl:2: .* is no JSON"),
    ("a.jsonl", '{"_id": "1"}\n', r"a.jsonl:1: .* lacks '_id' or 'text'"),
    ("a.jsonl", '{"_id": 1, "text": "one"}\n', r"a.jsonl:1: .* lacks '_id' or 'text'"),
    ("a.jsonl", '["1", "one"]\n', r"a.jsonl:1: .* lacks '_id' or 'text'"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_TEXTS)
def test_bad_texts_name_file_and_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / name))


BAD_JUDGEMENTS = [
    ("q30\t0\tp30\t1\nq31\t0\tp31\n", r"qrels.train.tsv:2: .* has 3 columns; expected query, 0, passage and grade"),
    ("q30\t0\tp30\thigh\n", r"qrels.train.tsv:1: the grade is 'high'; expected an integer"),
    ("query-id\tcorpus-id\tscore\nq30\tp30\n", r"qrels.train.tsv:2: .* has 2 columns"),
    ("query-id\tcorpus-id\tscore\nq30\tp30\t1\nq30\tp999\t1\n", r"qrels.train.tsv:3: there is no passage 'p999'"),
    ("q30 0 p30 1\nq999 0 p30 1\n", r"qrels.train.tsv:2: there is no query 'q999' in queries.train.tsv"),
    ("q31 0 p30 1\nq30 0 p30 1\nq31 0 p30 0\n", r"qrels.train.tsv:3: query 'q31' and passage 'p30' have been judged"),
    ("q30 0 p30 0\n", r"qrels.train.tsv has no passage of a grade above 0"),
]


@pytest.mark.parametrize(("content", "message"), BAD_JUDGEMENTS)
def test_bad_judgements_name_file_and_line(content: str, message: str, data: Data, tmp_path: Path) -> None:
    for name in ("collection.tsv", "queries.train.tsv"):
        (tmp_path / name).write_text((data.collection.folder / name).read_text())
    (tmp_path / "qrels.train.tsv").write_text(content)
    other = Data(
        Collection.open(tmp_path), data._tokenizer, query_tokens=8, passage_tokens=12, store=tmp_path / "tokens"
    )
    with pytest.raises(ValueError, match=message):
        other.judgements("train", other.queries("train"))


def test_an_id_that_comes_twice_is_an_error(data: Data, tmp_path: Path) -> None:
    (tmp_path / "collection.tsv").write_text("7\tone\n8\ttwo\n7\tthree\n")
    with pytest.raises(ValueError, match=r"collection.tsv:3: the id '7' is that of line 1"):
        tokenized(tmp_path / "collection.tsv", data._tokenizer, 12, tmp_path / "store")
    (tmp_path / "collection.tsv").write_text("")
    with pytest.raises(ValueError, match=r"collection.tsv:1: the file is empty"):
        tokenized(tmp_path / "collection.tsv", data._tokenizer, 12, tmp_path / "store")


def test_titles_go_before_texts(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"_id": "a", "title": "Head", "text": "body"}\n{"_id": "b", "title": "", "text": "body"}\n')
    assert list(read_texts(file)) == [("a", "Head body"), ("b", "body")]


def test_commands_say_what_is_wrong(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    wrong = [
        (["train", f"--data={tmp_path}/none", "--tiny"], "is no folder; expected one with collection.tsv"),
        (["train", f"--data={tmp_path}", "--tiny"], "has neither; expected one of collection.tsv"),
        (["train", f"--data={folders['beir']}", f"--model={tmp_path}"], "has no config.json; expected a local folder"),
        (["train", f"--data={folders['beir']}", "--tiny", "--passage-tokens=500"], "expected at most 256"),
        (["train", f"--data={folders['beir']}", *FAST, "--batch-size=140"], "give a smaller --batch-size"),
        (["train", f"--data={folders['beir']}", *FAST, "--validation-split=x"], "x.tsv does not exist"),
        (["evaluate", f"--data={folders['beir']}"], "train first, with the same --out"),
    ]
    for arguments, message in wrong:
        assert main([*arguments, f"--out={tmp_path}/out", "--device=cpu"]) == 1
        assert message in capsys.readouterr().err


def test_sample_is_a_collection(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "test").mkdir(parents=True)
    body = '"""{0} reads the {0} of a given file.\n\n    What {0} means is said in the manual\tof it.\n    """\n'
    (source / "a.py").write_text("".join(f"def f{i}():\n    {body.format(f'name{i}')}\n" for i in range(20)))
    (source / "test" / "b.py").write_text(f"def g():\n    {body.format('test')}\n")
    (source / "broken.py").write_text("def f(:")
    assert next(docstring_pairs(source)) == (
        "name0 reads the name0 of a given file.",
        "What name0 means is said in the manual of it.",
    )
    for kind in ("msmarco", "beir"):
        assert make_sample(tmp_path / kind, kind=kind, source=source) == 20
        collection = Collection.open(tmp_path / kind)
        counts = [len(list(read_judgements(collection.judgements(split)))) for split in ("train", "dev")]
        assert counts == [18, 2]
        assert collection.held_out == "dev"
    with pytest.raises(ValueError, match="has 1 docstrings of two paragraphs"):
        make_sample(tmp_path / "empty", source=source / "test")


# ---- search and metrics


def test_search_is_exact_and_ties_go_to_the_lower_row() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-2, 3, (5, 4), generator=generator).float()  # so that many scores are the same
    passages = torch.randint(-2, 3, (40, 4), generator=generator).float()
    rows = torch.randperm(1000, generator=generator)[:40]
    blocks = [(rows[part], passages[part]) for part in torch.arange(40).split(7)]
    scores, found = search(queries, iter(blocks), 12)
    for query in range(5):
        every = [(-float(queries[query] @ passages[place]), int(rows[place])) for place in range(40)]
        expected = sorted(every)[:12]
        assert found[query].tolist() == [row for _, row in expected]
        assert scores[query].tolist() == [-score for score, _ in expected]
    scores, found = search(queries, iter(blocks[:1]), 9)
    assert (found[:, 7:] == -1).all() and (scores[:, 7:] == -torch.inf).all() and (found[:, :7] >= 0).all()
    zeros, tied = search(torch.tensor([[1.0]]), [(torch.tensor([5, 3]), torch.tensor([[0.0], [-0.0]]))], 2)
    assert tied.tolist() == [[3, 5]] and zeros.tolist() == [[0, 0]]


def test_embeddings_do_not_depend_on_their_batch(data: Data, encoder: DualEncoder, tmp_path: Path) -> None:
    file = tmp_path / "collection.tsv"
    file.write_text("".join(f"{row}\t{'thing1x thing2x thing3x ' * (row % 3)}thing{row}x\n" for row in range(9)))
    texts, rows = tokenized(file, data._tokenizer, 12, tmp_path), np.array([7, 3, 8, 0, 3])
    assert len(set(texts.lengths(rows).tolist())) == 3
    with torch.no_grad():
        wide = encoder.passage_tower({"input_ids": texts.padded(rows, data.padding, 12)})
        alone = [encoder.passage_tower({"input_ids": texts.padded(row, data.padding)}) for row in rows[:, None]]
    sorted_by_length = encode(encoder.passage_tower, texts, rows, dtype=torch.float32, batch_size=2)
    assert torch.allclose(wide, torch.cat(alone), atol=1e-6)
    assert torch.allclose(sorted_by_length, torch.cat(alone), atol=1e-6)
    assert torch.allclose(wide.norm(dim=1), torch.ones(5))


def test_a_sample_of_the_queries_has_their_judgements_only(data: Data, encoder: DualEncoder) -> None:
    every, some = asked(data, "train"), asked(data, "train", at_most=20)
    assert len(some.rows) == 20 < len(every.rows)
    assert set(some.rows) < set(every.rows)
    assert set(some.judgements.queries) == set(some.rows)
    (of_every,), (of_some,) = (evaluate(encoder, data, [questions], depth=10) for questions in (every, some))
    place = np.searchsorted(every.rows, some.rows)
    assert np.array_equal(of_every.passages[place], of_some.passages)
    assert of_some.metrics["ndcg@10"] == ndcg(of_every.passages[place], some.rows, every.judgements.of(some.rows))


def plain_mrr(ranked: dict[str, list[str]], judged: dict[str, dict[str, int]]) -> float:
    total = 0.0
    for query, grades in judged.items():
        for place, passage in enumerate(ranked[query][:10]):
            if grades.get(passage, 0) > 0:
                total += 1 / (place + 1)
                break
    return total / len(judged)


def plain_ndcg(ranked: dict[str, list[str]], judged: dict[str, dict[str, int]]) -> float:
    total = 0.0
    for query, grades in judged.items():
        found = sum(
            max(0, grades.get(passage, 0)) / math.log2(place + 2) for place, passage in enumerate(ranked[query][:10])
        )
        best = sorted((max(0, grade) for grade in grades.values()), reverse=True)[:10]
        total += found / sum(grade / math.log2(place + 2) for place, grade in enumerate(best))
    return total / len(judged)


def random_rankings() -> Iterator[tuple[np.ndarray, np.ndarray, Judgements]]:
    generator = np.random.default_rng(0)
    for depth in (3, 10, 25):
        queries = np.sort(generator.choice(50, 9, replace=False))
        ranking = np.stack([generator.choice(60, depth, replace=False) for _ in queries])
        ranking[0, depth // 2 :] = -1
        pairs = []
        for query in queries.tolist():
            passages = np.sort(generator.choice(60, generator.integers(1, 30), replace=False)).tolist()
            grades = generator.integers(-1, 4, len(passages)).tolist()
            grades[0] = 2
            pairs += [(query, passage, grade) for passage, grade in zip(passages, grades, strict=True)]
        yield ranking, queries, Judgements(*(np.array(column) for column in zip(*pairs, strict=True)))


def test_metrics_are_those_of_plain_loops() -> None:
    for ranking, queries, judgements in random_rankings():
        ranked = {str(query): [str(p) for p in row if p >= 0] for query, row in zip(queries, ranking, strict=True)}
        judged: dict[str, dict[str, int]] = defaultdict(dict)
        for query, passage, grade in zip(judgements.queries, judgements.passages, judgements.grades, strict=True):
            judged[str(query)][str(passage)] = int(grade)
        assert mrr(ranking, queries, judgements) == pytest.approx(plain_mrr(ranked, judged), abs=1e-12)
        assert ndcg(ranking, queries, judgements) == pytest.approx(plain_ndcg(ranked, judged), abs=1e-12)
        shares = []
        for query, grades in judged.items():
            relevant = {passage for passage, grade in grades.items() if grade > 0}
            shares.append(len(relevant & set(ranked[query][:20])) / len(relevant))
        assert recall(ranking, queries, judgements, cutoff=20) == pytest.approx(float(np.mean(shares)), abs=1e-12)


def test_metrics_by_hand() -> None:
    queries = np.array([4, 7, 9])
    judgements = Judgements(np.array([4, 7, 7, 9]), np.array([1, 0, 5, 2]), np.array([1, 3, 1, 1]))
    ranking = np.full((3, 11), -1)
    ranking[0, :2] = [8, 1]  # found at rank 2
    ranking[1, :3] = [5, 6, 0]  # at ranks 1 and 3, the better one last
    ranking[2] = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 2]  # at rank 11: too late
    assert mrr(ranking, queries, judgements) == pytest.approx((1 / 2 + 1 + 0) / 3)
    second, third = 1 / math.log2(3), 1 / 2
    assert ndcg(ranking, queries, judgements) == pytest.approx((second + (1 + 3 * third) / (3 + second) + 0) / 3)
    assert recall(ranking, queries, judgements, cutoff=11) == pytest.approx(1)
    assert recall(ranking, queries, judgements, cutoff=10) == pytest.approx(2 / 3)
    assert mrr(ranking, queries, judgements.relevant(2)) == pytest.approx((1 / 3) / 3)
