"""Triples of a query, a passage that answers it and one that does not: hard negatives mined by somebody else.

``qidpidtriples.train.full.2.tsv`` has 398 million of them: they are read once, into a memory-mapped file of rows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from examples.msmarco.formats import read_triples
from examples.msmarco.texts import Texts, batches
from examples.whole_files import written_whole

__all__ = ["indexed_triples"]

_TRIPLES_AT_ONCE = 2**20


def indexed_triples(file: Path, queries: Texts, passages: Texts, store: Path) -> NDArray[np.int32]:
    """[T, 3] rows of query, positive and negative, memory-mapped; 12 bytes a triple on disk.

    Raises:
        ValueError: a triple of a query or passage that there is not, with file and line.
    """
    status = file.stat()
    value = (file.name, status.st_size, status.st_mtime_ns, queries.key, passages.key)
    stored = store / f"triples-{hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()}.bin"
    if not stored.exists():
        progress = tqdm(read_triples(file), desc=f"index {file.name}", unit="triple", unit_scale=True, mininterval=1)
        with written_whole(stored) as unfinished, unfinished.open("wb") as rows:
            line = 1
            for batch in batches(progress, _TRIPLES_AT_ONCE):
                rows.write(_rows(file, line, batch, queries, passages).tobytes())
                line += len(batch)
            if line == 1:
                raise ValueError(f"{file}:1: the file is empty; expected triples")
    return np.memmap(stored, np.int32, "r").reshape(-1, 3)


def _rows(
    file: Path, line: int, batch: list[tuple[str, str, str]], queries: Texts, passages: Texts
) -> NDArray[np.int32]:
    sides = (queries, passages, passages)
    columns = zip(*batch, strict=True)
    rows = np.stack([texts.rows_of(list(names)) for texts, names in zip(sides, columns, strict=True)], 1)
    missing = np.argwhere(rows < 0)
    if len(missing):
        at, column = missing[0]
        kind = "query" if column == 0 else "passage"
        raise ValueError(f"{file}:{line + at}: there is no {kind} {batch[at][column]!r}")
    return rows.astype(np.int32)
