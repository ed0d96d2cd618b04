"""The two formats in which people have MS MARCO, and many other collections, on disk.

- MS MARCO's own: ``collection.tsv`` (``pid<TAB>text``), ``queries.SPLIT.tsv``, ``qrels.SPLIT.tsv`` (four columns).
- BEIR's: ``corpus.jsonl``, ``queries.jsonl`` (``_id``, ``text``, perhaps ``title``), ``qrels/SPLIT.tsv`` with a header.

Files are read line by line. Every line counts, so that row i of a file is its line i + 1; what does not fit is an error
that names file and line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

__all__ = ["Collection", "Judgement", "read_judgements", "read_texts", "read_triples"]

HELD_OUT = ("dev.small", "dev", "test")
"""The splits to evaluate on, the first that there is."""

Row = TypeVar("Row")

_BEIR_HEADER = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True)
class Collection:
    """A folder in one of the formats."""

    folder: Path
    is_beir: bool

    @classmethod
    def open(cls, folder: Path) -> Collection:
        """Tells the format by the file of passages."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; expected one with collection.tsv or corpus.jsonl")
        found = [name for name in ("collection.tsv", "corpus.jsonl") if (folder / name).is_file()]
        if len(found) != 1:
            raise FileNotFoundError(
                f"{folder} has {' and '.join(found) or 'neither'}; "
                "expected one of collection.tsv (MS MARCO) and corpus.jsonl (BEIR)"
            )
        return cls(folder, is_beir=found == ["corpus.jsonl"])

    @property
    def passages(self) -> Path:
        """The file of all passages."""
        return self.folder / ("corpus.jsonl" if self.is_beir else "collection.tsv")

    def queries(self, split: str) -> Path:
        """The file of a split's queries."""
        return self._existing("queries.jsonl" if self.is_beir else f"queries.{split}.tsv")

    def judgements(self, split: str) -> Path:
        """The file that says which passages answer a split's queries."""
        return self._existing(f"qrels/{split}.tsv" if self.is_beir else f"qrels.{split}.tsv")

    @property
    def held_out(self) -> str:
        """The split to evaluate on where none is named."""
        for split in HELD_OUT:
            if (self.folder / (f"qrels/{split}.tsv" if self.is_beir else f"qrels.{split}.tsv")).is_file():
                return split
        raise FileNotFoundError(f"{self.folder} has judgements of none of the splits {', '.join(HELD_OUT)}")

    def _existing(self, name: str) -> Path:
        if not (self.folder / name).is_file():
            raise FileNotFoundError(f"{self.folder / name} does not exist")
        return self.folder / name


class Judgement(NamedTuple):
    """A line of a file of judgements."""

    query: str
    passage: str
    grade: int
    line: int


def read_texts(file: Path) -> Iterator[tuple[str, str]]:
    """Id and text of each line; a title goes before its text."""
    for _, text in _parsed(file, _json_text if file.suffix == ".jsonl" else _tab_separated_text):
        yield text


def read_judgements(file: Path) -> Iterator[Judgement]:
    """The judgements of a file, without its header where it has one."""
    with file.open(encoding="utf-8", newline="\n") as lines:
        is_beir = lines.readline().split() == _BEIR_HEADER
    for line, (query, passage, grade) in _parsed(file, _beir_judgement if is_beir else _trec_judgement, header=is_beir):
        yield Judgement(query, passage, grade, line)


def read_triples(file: Path) -> Iterator[tuple[str, str, str]]:
    """Ids of query, positive and negative: ``qidpidtriples.train.full.2.tsv``."""
    for _, triple in _parsed(file, _triple):
        yield triple


def _parsed(file: Path, parse: Callable[[str], Row], *, header: bool = False) -> Iterator[tuple[int, Row]]:
    """What each line says, with its number."""
    # Other line ends than "\n" are part of a text.
    with file.open(encoding="utf-8", newline="\n") as lines:
        if header:
            next(lines)
        for number, line in enumerate(lines, start=1 + header):
            try:
                row = parse(line.rstrip("\r\n"))
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {error}") from None
            yield number, row


def _tab_separated_text(line: str) -> tuple[str, str]:
    columns = line.split("\t")
    if len(columns) != 2 or not columns[0]:
        raise ValueError(f"{_shown(line)} has {len(columns)} columns; expected an id, a tab and a text")
    return columns[0], columns[1]


def _json_text(line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{_shown(line)} is no JSON: {error}") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("_id", "text")):
        raise ValueError(f"{_shown(line)} lacks '_id' or 'text'; expected an object with these strings")
    title = row.get("title")
    return row["_id"], f"{title} {row['text']}" if title else row["text"]


def _trec_judgement(line: str) -> tuple[str, str, int]:
    columns = line.split()
    if len(columns) != 4:
        raise ValueError(f"{_shown(line)} has {len(columns)} columns; expected query, 0, passage and grade")
    return columns[0], columns[2], _grade(columns[3])


def _beir_judgement(line: str) -> tuple[str, str, int]:
    columns = line.split("\t")
    if len(columns) != 3:
        raise ValueError(f"{_shown(line)} has {len(columns)} columns; expected query, passage and grade")
    return columns[0], columns[1], _grade(columns[2])


def _triple(line: str) -> tuple[str, str, str]:
    columns = line.split()
    if len(columns) != 3:
        raise ValueError(f"{_shown(line)} has {len(columns)} columns; expected the ids of query, positive and negative")
    return columns[0], columns[1], columns[2]


def _grade(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"the grade is {text!r}; expected an integer") from None


def _shown(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")
