"""Mined documents as training rows, against loops over plain lists."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import negcache_fn
from negcache_fn.dataset_rows import OUTPUT_FORMATS, hard_negatives, training_rows
from tests.support.builders import make_state, same_snapshot, snapshot

WORDS = ["ant", "bee", "cat", "bee", "dog", "ant", "eel", "fox"]  # documents 1 and 3, 0 and 5 are twins
SCORES = st.one_of(st.sampled_from([-math.inf, math.nan, -1.0, 0.0, 0.5, 0.5, 2.0]), st.floats(-3, 3, width=32))
IDS = st.integers(-1, len(WORDS) - 1)


@st.composite
def mined(draw: st.DrawFn) -> dict[str, Any]:
    """What `top_negatives` could have given, and worse: unsorted, with duplicates."""
    rows, columns, known = draw(st.integers(0, 4)), draw(st.integers(0, 9)), draw(st.integers(0, 3))

    def table(values: st.SearchStrategy[Any], width: int, dtype: torch.dtype) -> Tensor:
        cells = st.lists(values, min_size=rows * width, max_size=rows * width)
        return torch.tensor(draw(cells), dtype=dtype).view(rows, width)

    return {
        "scores": table(SCORES, columns, torch.float32),
        "ids": table(IDS, columns, torch.int64),
        "positives": draw(st.one_of(st.none(), st.just(table(IDS, known, torch.int64)))),
        "texts": draw(st.sampled_from([None, WORDS, dict(enumerate(WORDS))])),
        "num_negatives": draw(st.integers(1, 4)),
        "range_min": draw(st.integers(0, 3)),
        "min_score": draw(st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.5]), st.floats(-3, 3))),
    }


def chosen_by_elimination(arguments: dict[str, Any]) -> list[list[int]]:
    """Takes the best document that is left, over and over, and throws out what equals it."""
    result = []
    for row in range(len(arguments["ids"])):
        left = [(float(s), int(i)) for s, i in zip(arguments["scores"][row], arguments["ids"][row], strict=True)]
        left = [(s, i) for s, i in left if i != -1 and not math.isnan(s) and s != -math.inf]
        if arguments["min_score"] is not None:
            left = [(s, i) for s, i in left if not s < arguments["min_score"]]
        known = [] if arguments["positives"] is None else [i for i in arguments["positives"][row].tolist() if i != -1]
        ranked: list[int] = []
        for unwanted in known:
            left = without(unwanted, left, arguments["texts"])
        while left:
            best = max(score for score, _ in left)
            ranked.append(next(i for score, i in left if score == best))
            left = without(ranked[-1], left, arguments["texts"])
        for _ in range(min(arguments["range_min"], len(ranked))):
            ranked.pop(0)
        while len(ranked) < arguments["num_negatives"]:
            ranked.append(-1)
        result.append(ranked[: arguments["num_negatives"]])
    return result


def without(document: int, left: list[tuple[float, int]], texts: Any) -> list[tuple[float, int]]:
    """What is neither that document nor, if texts are known, one of its text."""
    return [(s, i) for s, i in left if i != document and (texts is None or texts[i] != texts[document])]


@given(arguments=mined())
@example(
    arguments={  # a twin of the positive, a twin among the negatives, an empty place, a document without id
        "scores": torch.tensor([[5.0, 4.0, 3.0, 2.0, -math.inf, 1.0]]),
        "ids": torch.tensor([[5, 1, 3, -1, 6, 7]]),
        "positives": torch.tensor([[0, -1]]),
        "texts": WORDS,
        "num_negatives": 3,
        "range_min": 0,
        "min_score": None,
    }
)
@example(
    arguments={  # by id alone: the positive, and a document that is there twice
        "scores": torch.tensor([[3.0, 2.0, 2.0, 1.0]]),
        "ids": torch.tensor([[0, 5, 5, 7]]),
        "positives": torch.tensor([[0]]),
        "texts": None,
        "num_negatives": 2,
        "range_min": 0,
        "min_score": 1.0,
    }
)
def test_hard_negatives_are_those_of_a_loop(arguments: dict[str, Any]) -> None:
    before = snapshot(arguments)
    scores, ids = arguments["scores"], arguments["ids"]
    found = hard_negatives(scores, ids, **{k: v for k, v in arguments.items() if k not in ("scores", "ids")})
    assert found.tolist() == chosen_by_elimination(arguments)
    assert found.shape == (len(ids), arguments["num_negatives"])
    assert found.dtype == torch.int64
    assert same_snapshot(before, snapshot(arguments))


def naive_rows(questions: list[str], positives: Tensor, negatives: Tensor, output_format: str) -> list[dict[str, Any]]:
    """By the documented table, one query at a time."""
    rows: list[dict[str, Any]] = []
    for query in range(len(questions)):
        right = [int(i) for i in positives[query] if i != -1]
        wrong = [int(i) for i in negatives[query] if i != -1]
        if output_format == "passages" and right and wrong:
            row: dict[str, Any] = {"query": questions[query]}
            row["positive_passages"] = [{"docid": f"{i}", "text": WORDS[i]} for i in right]
            row["negative_passages"] = [{"docid": f"{i}", "text": WORDS[i]} for i in wrong]
            rows.append(row)
        for i in right:
            if output_format == "triplet":
                for j in wrong:
                    rows.append({"anchor": questions[query], "positive": WORDS[i], "negative": WORDS[j]})  # noqa: PERF401
            if output_format == "n-tuple" and 0 < len(wrong) == negatives.shape[1]:
                row = {"anchor": questions[query], "positive": WORDS[i]}
                for n in range(len(wrong)):
                    row["negative_" + str(n + 1)] = WORDS[wrong[n]]
                rows.append(row)
    return rows


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
@given(
    rows=st.integers(0, 4),
    known=st.integers(0, 3),
    against=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_rows_are_those_of_the_table(output_format: str, rows: int, known: int, against: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    positives = torch.randint(-1, len(WORDS), (rows, known), generator=generator)
    negatives = torch.randint(-1, len(WORDS), (rows, against), generator=generator)
    questions = [f"question {n}" for n in range(rows)]
    found = training_rows(questions, positives, negatives, WORDS, output_format=output_format)
    assert found == naive_rows(questions, positives, negatives, output_format)
    assert json.loads(json.dumps(found)) == found
    keys = [list(row) for row in found]
    assert all(row == keys[0] for row in keys)  # the columns of one table, in one order


def test_from_the_cache_to_rows() -> None:
    """The way in one go: the second document is the positive, the last has no id."""
    embedding = torch.tensor([[9.0], [8.0], [7.0], [6.0], [5.0]])
    state = make_state(embedding, ids=[4, 2, 0, 6, -1])
    positives = torch.tensor([[2], [0]])
    scores, slots = negcache_fn.top_negatives(
        state, torch.tensor([[1.0], [-1.0]]), 5, false_negatives=negcache_fn.FalseNegatives(ids=positives)
    )
    found = hard_negatives(scores, state["items", "id"][slots], positives=positives, texts=WORDS, num_negatives=2)
    assert found.tolist() == [[4, 0], [6, 2]]
    rows = training_rows(["who?", "what?"], positives, found, WORDS)
    assert [(row["positive"], row["negative"]) for row in rows] == [
        ("cat", "dog"),
        ("cat", "ant"),
        ("ant", "eel"),
        ("ant", "cat"),
    ]


def test_an_empty_place_is_no_document() -> None:
    """Slot -1 reads the id of the last slot: the score says that nothing is there."""
    state = make_state(torch.ones(3, 1), ids=[1, 2, 3], live=[False, False, True])
    scores, slots = negcache_fn.top_negatives(state, torch.ones(1, 1), 3)
    assert state["items", "id"][slots].tolist() == [[3, 3, 3]]
    assert hard_negatives(scores, state["items", "id"][slots]).tolist() == [[3, -1, -1]]


SCORE, ID = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0.0], ID), {}, "scores is a list"),
        ((SCORE[0], ID), {}, r"scores has shape \(3,\); expected \[B, n\]"),
        ((ID, ID), {}, "scores has dtype torch.int64"),
        ((SCORE, ID[:, :2]), {}, r"ids has shape \(2, 2\); expected \[2, 3\]"),
        ((SCORE, ID[:1]), {}, r"ids has shape \(1, 3\)"),
        ((SCORE, SCORE), {}, "ids has dtype torch.float32"),
        ((SCORE, ID), {"positives": ID[0]}, r"positives has shape \(3,\); expected two dimensions and 2 rows"),
        ((SCORE, ID), {"positives": [[1]]}, "positives is a list"),
        ((SCORE, ID), {"num_negatives": 0}, "num_negatives is 0"),
        ((SCORE, ID), {"range_min": -1}, "range_min is -1"),
        ((SCORE, ID), {"min_score": "0.5"}, "min_score is a str"),
        ((SCORE, ID + 8), {"texts": WORDS}, "texts has no document 8"),
        ((SCORE, ID), {"texts": {}}, "texts has no document 0"),
    ],
)
def test_hard_negatives_name_what_is_wrong(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        hard_negatives(*arguments, **options)


def test_rows_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="output_format is 'pairs'; expected one of 'triplet', 'n-tuple', 'passages'"):
        training_rows(["a", "b"], ID, ID, WORDS, output_format="pairs")
    with pytest.raises(ValueError, match=r"negatives has shape \(2, 3\); expected two dimensions and 1 rows"):
        training_rows(["a"], ID[:1], ID, WORDS)
    with pytest.raises(ValueError, match="texts has no document 9"):
        training_rows(["a", "b"], ID, ID + 9, WORDS)


def test_negative_ids_are_ids() -> None:
    scores, ids = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[-9, -1, -8, 4]])
    assert hard_negatives(scores, ids, positives=torch.tensor([[-9, -1]])).tolist() == [[-8, 4, -1]]
