"""A small collection in either format, made of what is on every machine: the docstrings of Python's standard library.

The first paragraph of a docstring is a query, the rest of it the passage that answers; other rests are passages too.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from examples.msmarco.formats import Judgement

__all__ = ["docstring_pairs", "make_sample", "write_collection"]

_LEAST_WORDS = 5
_HELD_OUT_SHARE = 0.1


def make_sample(out: Path, *, kind: str = "msmarco", source: Path | None = None) -> int:
    """Writes the collection; the number of its passages, and of its queries, of which one tenth is for evaluation."""
    source = Path(sysconfig.get_path("stdlib")) if source is None else source
    pairs = list(docstring_pairs(source))
    if len(pairs) < 1 / _HELD_OUT_SHARE:
        raise ValueError(f"{source} has {len(pairs)} docstrings of two paragraphs; expected Python files with more")
    passages = {str(row): passage for row, (_, passage) in enumerate(pairs)}
    queries = {f"q{row}": query for row, (query, _) in enumerate(pairs)}
    held_out = np.random.default_rng(0).permutation(len(pairs)) < _HELD_OUT_SHARE * len(pairs)
    judgements: dict[str, list[Judgement]] = {"train": [], "dev": []}
    for row, is_held_out in enumerate(held_out):
        judgements["dev" if is_held_out else "train"].append(Judgement(f"q{row}", str(row), 1, 0))
    write_collection(out, passages, queries, judgements, kind=kind)
    return len(pairs)


def docstring_pairs(source: Path) -> Iterator[tuple[str, str]]:
    """First paragraph and the rest of the docstrings of a folder's Python files, each rest once."""
    seen: set[str] = set()
    for file in sorted(source.rglob("*.py")):
        if {"test", "tests", "site-packages"} & set(file.relative_to(source).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
            query, passage = " ".join(first.split()), " ".join(rest.split())
            if min(len(query.split()), len(passage.split())) >= _LEAST_WORDS and passage not in seen:
                seen.add(passage)
                yield query, passage


def write_collection(
    out: Path,
    passages: dict[str, str],
    queries: dict[str, str],
    judgements: dict[str, list[Judgement]],
    *,
    kind: str,
) -> None:
    """A folder in one of the formats, of texts by id and of judgements by split. Texts have no tabs or newlines."""
    out.mkdir(parents=True, exist_ok=True)
    if kind == "beir":
        _write_lines(
            out / "corpus.jsonl", (json.dumps({"_id": i, "title": "", "text": t}) for i, t in passages.items())
        )
        _write_lines(out / "queries.jsonl", (json.dumps({"_id": i, "text": t}) for i, t in queries.items()))
        (out / "qrels").mkdir(exist_ok=True)
        for split, judged in judgements.items():
            rows = (f"{one.query}\t{one.passage}\t{one.grade}" for one in judged)
            _write_lines(out / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *rows])
        return
    _write_lines(out / "collection.tsv", (f"{i}\t{text}" for i, text in passages.items()))
    for split, judged in judgements.items():
        asked = dict.fromkeys(one.query for one in judged)
        _write_lines(out / f"queries.{split}.tsv", (f"{i}\t{queries[i]}" for i in asked))
        rows = (f"{one.query}\t0\t{one.passage}\t{one.grade}" for one in judged)
        _write_lines(out / f"qrels.{split}.tsv", rows)


def _write_lines(file: Path, lines: Iterable[str]) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as target:
        target.writelines(line + "\n" for line in lines)
