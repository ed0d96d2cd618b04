"""What is searched: the entries of WordNet, or the functions of this Python installation."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from examples.code_search.harvest import described_functions, installation_roots, source_files
from examples.reverse_dictionary.data import Pair, read_entries
from examples.reverse_dictionary.model import LONGEST_TEXT
from examples.whole_files import written_whole

__all__ = ["DICTIONARY", "Task", "code", "dictionary"]

DICTIONARY = "dictionary"

_LONGEST_CODE = 64  # tokens


@dataclass(frozen=True)
class Task:
    """Pairs, whose documents are all searched."""

    name: str
    pairs: Sequence[Pair]
    longest_text: int
    """In tokens."""


def dictionary(wordnet: Path) -> Task:
    """From a definition to its words."""
    return Task(DICTIONARY, read_entries(wordnet), LONGEST_TEXT)


def code(file: Path) -> Task:
    """From the first sentences of a docstring to its function.

    The functions are those of this Python installation when ``file`` was written, which is now if it is not there.
    """
    if not file.exists():
        with written_whole(file) as unfinished:
            unfinished.write_text(json.dumps([*_described_functions()]), encoding="utf-8")
    return Task("code", [_Function(*pair) for pair in json.loads(file.read_text(encoding="utf-8"))], _LONGEST_CODE)


@dataclass(frozen=True)
class _Function:
    definition: str
    document: str


def _described_functions() -> Iterator[tuple[str, str]]:
    """What a docstring says, and the code without it. Of equal queries or equal functions the first one stays."""
    queries: set[str] = set()
    functions: set[str] = set()
    for _, file in tqdm(source_files(installation_roots()), desc="functions", unit="file"):
        for node, _, query in described_functions(file):
            if query and query not in queries and (text := ast.unparse(node)) not in functions:
                queries.add(query)
                functions.add(text)
                yield query, text
