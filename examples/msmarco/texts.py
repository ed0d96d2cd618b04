"""Texts as token ids, in memory-mapped files: tokenised once, never in memory as a whole.

Rows have the length they have, one after the other, and `starts` says where: 4 bytes a token, and some 25 bytes a text
for that and for finding it by name. A text's row is its place in the file that it came from.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from examples.msmarco.formats import read_texts
from examples.whole_files import written_whole

__all__ = ["Texts", "batches", "tokenized"]

_FORMAT = 1
"""Part of the key of what is stored: change it with anything that changes what is stored."""

_TEXTS_AT_ONCE = 8192

_Item = TypeVar("_Item")


class Texts:
    """N texts, as they lie in a folder that `tokenized` wrote."""

    def __init__(self, folder: Path) -> None:
        self.key: str = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        """Changes with the source and with the tokenizer."""
        self.starts: NDArray[np.int64] = np.load(folder / "starts.npy", mmap_mode="r")
        """[N + 1]: the tokens of row i are those from starts[i] to starts[i + 1]."""
        self.ids: NDArray[np.bytes_] = np.load(folder / "ids.npy", mmap_mode="r")
        """[N] names of the texts, UTF-8."""
        self._order: NDArray[np.int64] = np.load(folder / "order.npy", mmap_mode="r")
        size = int(self.starts[-1])
        # An empty file cannot be mapped.
        self._tokens = np.memmap(folder / "tokens.bin", np.int32, "r") if size else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def names(self, rows: NDArray[np.int64]) -> list[str]:
        """The names of some rows."""
        return [name.decode() for name in self.ids[rows].tolist()]

    def rows_of(self, names: list[str]) -> NDArray[np.int64]:
        """[len(names)] the rows of these texts, -1 where there is none."""
        if not names or not len(self):
            return np.full(len(names), -1, np.int64)
        wanted = np.array([name.encode() for name in names])
        place = np.searchsorted(self.ids, wanted, sorter=self._order).clip(max=len(self) - 1)
        rows = self._order[place]
        return np.where(self.ids[rows] == wanted, rows, -1)

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """[len(rows)] their numbers of tokens."""
        return self.starts[rows + 1] - self.starts[rows]

    def padded(self, rows: NDArray[np.int64], padding: int, width: int | None = None) -> Tensor:
        """[len(rows), width] int32 token ids; as wide as the longest of them by default."""
        lengths = self.lengths(rows)
        width = int(lengths.max(initial=1)) if width is None else width
        column = np.arange(width)
        taken = column < lengths[:, None]
        padded = np.full(taken.shape, padding, np.int32)
        padded[taken] = self._tokens[(self.starts[rows][:, None] + column)[taken]]
        return torch.from_numpy(padded)


def tokenized(file: Path, tokenizer: PreTrainedTokenizerBase, width: int, store: Path) -> Texts:
    """The texts of a file, cut at `width` tokens; from `store` if they are there and the file has not changed.

    Raises:
        ValueError: a line that is no text, or two with the same id, with file and line.
    """
    key = _key(file, tokenizer, width)
    folder = store / f"{file.stem}-{key}"
    if not folder.is_dir():
        with written_whole(folder) as unfinished:
            unfinished.mkdir()
            _write(file, tokenizer, width, key, unfinished)
    return Texts(folder)


def batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """So many in each but the last, in order."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _write(file: Path, tokenizer: PreTrainedTokenizerBase, width: int, key: str, folder: Path) -> None:
    ids: list[NDArray[np.bytes_]] = []
    lengths = array("q")
    texts = tqdm(read_texts(file), desc=f"tokenize {file.name}", unit="text", unit_scale=True, mininterval=1)
    with (folder / "tokens.bin").open("wb") as tokens:
        for batch in batches(texts, _TEXTS_AT_ONCE):
            names, words = zip(*batch, strict=True)
            encoded = tokenizer(list(words), truncation=True, max_length=width, return_attention_mask=False)
            for row in encoded["input_ids"]:
                lengths.append(len(row))
                tokens.write(np.array(row, np.int32).tobytes())
            ids.append(np.array([name.encode() for name in names]))
    if not ids:
        raise ValueError(f"{file}:1: the file is empty; expected texts")
    all_ids = np.concatenate(ids)
    order = np.argsort(all_ids, kind="stable")
    again = np.flatnonzero(all_ids[order[1:]] == all_ids[order[:-1]])
    if len(again):
        first, second = order[again[0]] + 1, order[again[0] + 1] + 1
        raise ValueError(f"{file}:{second}: the id {all_ids[second - 1].decode()!r} is that of line {first}")
    np.save(folder / "ids.npy", all_ids)
    np.save(folder / "order.npy", order)
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(np.frombuffer(lengths, np.int64))]))
    (folder / "key.json").write_text(json.dumps(key), encoding="utf-8")


def _key(file: Path, tokenizer: PreTrainedTokenizerBase, width: int) -> str:
    """Hash of the file's name, size and time, and of what decides which tokens are made of it."""
    status = file.stat()
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # what the last call set is no part of it
    backend.no_padding()
    value = (_FORMAT, file.name, status.st_size, status.st_mtime_ns, width, backend.to_str())
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
