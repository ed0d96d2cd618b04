"""The corpus: all functions found, without duplicates, and the sentences that describe some of them.

Modules, not functions, are divided into training, validation and test, so that no function of a held-out module is
seen in training, neither as a positive nor as a negative. Evaluation searches all of them.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from examples.code_search.harvest import Function, harvest_file, source_files
from examples.code_search.tokens import VOCABULARY_SIZE, token_ids
from examples.interruptions import leave_interrupts_to_parent
from examples.whole_files import written_whole

__all__ = ["SPLITS", "Bags", "Corpus", "load_or_harvest"]

SPLITS = ("train", "validation", "test")
_FORMAT = 1
"""Part of the key of a saved corpus: change it with anything that changes what is harvested."""

_MIN_FILES_FOR_PROCESSES = 200


@dataclass(frozen=True)
class Bags:
    """Bags of token ids, one per row, in compressed sparse row form."""

    starts: NDArray[np.int64]
    """[rows + 1]: row i is ``tokens[starts[i]:starts[i + 1]]``."""
    tokens: NDArray[np.int32]
    counts: NDArray[np.int32]

    @classmethod
    def of(cls, rows: Iterable[Mapping[int, int]]) -> Bags:
        """Packs one ``{token: count}`` a row."""
        rows = list(rows)
        starts = np.cumsum([0, *map(len, rows)])
        tokens = np.fromiter((token for row in rows for token in row), np.int32, count=starts[-1])
        counts = np.fromiter((count for row in rows for count in row.values()), np.int32, count=starts[-1])
        return cls(starts, tokens, counts)

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class Corpus:
    """N functions and Q queries; a document's id is its row."""

    key: str
    """Changes with every source file and with what is taken from it."""
    documents: Bags
    document_split: NDArray[np.int8]
    """[N] index into SPLITS."""
    paths: list[str]
    """[N] the files."""
    lines: list[int]
    names: list[str]
    queries: Bags
    query_texts: list[str]
    query_document: NDArray[np.int64]
    """[Q] the document that query describes."""

    def documents_of(self, split: str) -> NDArray[np.int64]:
        """The ids of the split's documents."""
        return np.flatnonzero(self.document_split == SPLITS.index(split))

    def queries_of(self, split: str) -> NDArray[np.int64]:
        """The rows of the queries whose document is in the split."""
        return np.flatnonzero(self.document_split[self.query_document] == SPLITS.index(split))


def load_or_harvest(roots: list[Path], file: Path, *, mask_names: bool = False) -> Corpus:
    """The corpus of the roots, from ``file`` if it was saved there and no source file has changed since."""
    sources = source_files(roots)
    key = _key(sources, mask_names)
    if file.exists():
        corpus = _load(file)
        if corpus is not None and corpus.key == key:
            return corpus
    corpus = _assemble(key, sources, _harvest([source for _, source in sources], mask_names))
    _save(corpus, file)
    return corpus


def _harvest(files: list[Path], mask_names: bool) -> Iterator[list[Function]]:
    """``harvest_file`` of each file in order, on all cores where there is enough to do."""
    harvest = partial(harvest_file, mask_names=mask_names)
    progress = partial(tqdm, total=len(files), desc="harvest", unit="file")
    if len(files) < _MIN_FILES_FOR_PROCESSES:
        yield from progress(map(harvest, files))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), initializer=leave_interrupts_to_parent) as pool:
        yield from progress(pool.imap(harvest, files, chunksize=16))


def _assemble(key: str, sources: list[tuple[Path, Path]], harvested: Iterable[list[Function]]) -> Corpus:
    """Keeps the first function of each body, and the first document of each query."""
    kept: dict[bytes, tuple[Path, Path, Function]] = {}
    for (root, path), functions in zip(sources, harvested, strict=True):
        for function in functions:
            if function.tokens:
                kept.setdefault(function.body_hash, (root, path, function))
    described: dict[frozenset[int], int] = {}
    for document, (_, _, function) in enumerate(kept.values()):
        if function.query:
            described.setdefault(frozenset(token_ids(function.query)), document)
    functions = [function for _, _, function in kept.values()]
    query_texts = [functions[document].query for document in described.values()]
    return Corpus(
        key=key,
        documents=Bags.of(function.tokens for function in functions),
        document_split=np.array([_split_of(path.relative_to(root)) for root, path, _ in kept.values()], np.int8),
        paths=[str(path) for _, path, _ in kept.values()],
        lines=[function.line for function in functions],
        names=[function.name for function in functions],
        queries=Bags.of(Counter(token_ids(text)) for text in query_texts),
        query_texts=query_texts,
        query_document=np.array(list(described.values()), np.int64),
    )


def _split_of(relative: Path) -> int:
    """Index into SPLITS, eight tenths training.

    Decided by the last two parts of the path, so that copies of a library inside others stay on one side.
    """
    bucket = hashlib.blake2b("/".join(relative.parts[-2:]).encode(), digest_size=1).digest()[0] % 10
    return {0: SPLITS.index("test"), 1: SPLITS.index("validation")}.get(bucket, SPLITS.index("train"))


def _key(sources: list[tuple[Path, Path]], mask_names: bool) -> str:
    """Hash of the names, sizes and times of the source files, and of what decides what is taken from them."""
    digest = hashlib.blake2b(repr((_FORMAT, VOCABULARY_SIZE, mask_names)).encode(), digest_size=16)
    for root, path in sources:
        status = path.stat()
        digest.update(repr((str(root), str(path), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def _save(corpus: Corpus, file: Path) -> None:
    texts = {
        "key": corpus.key,
        "paths": corpus.paths,
        "lines": corpus.lines,
        "names": corpus.names,
        "queries": corpus.query_texts,
    }
    with written_whole(file) as unfinished, unfinished.open("wb") as archive:
        np.savez(
            archive,
            texts=np.frombuffer(json.dumps(texts).encode(), np.uint8),
            document_starts=corpus.documents.starts,
            document_tokens=corpus.documents.tokens,
            document_counts=corpus.documents.counts,
            document_split=corpus.document_split,
            query_starts=corpus.queries.starts,
            query_tokens=corpus.queries.tokens,
            query_counts=corpus.queries.counts,
            query_document=corpus.query_document,
        )


def _load(file: Path) -> Corpus | None:
    """The saved corpus, or None if it cannot be read."""
    try:
        with np.load(file) as arrays:
            texts = json.loads(arrays["texts"].tobytes())
            return Corpus(
                key=texts["key"],
                documents=Bags(arrays["document_starts"], arrays["document_tokens"], arrays["document_counts"]),
                document_split=arrays["document_split"],
                paths=texts["paths"],
                lines=texts["lines"],
                names=texts["names"],
                queries=Bags(arrays["query_starts"], arrays["query_tokens"], arrays["query_counts"]),
                query_texts=texts["queries"],
                query_document=arrays["query_document"],
            )
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
