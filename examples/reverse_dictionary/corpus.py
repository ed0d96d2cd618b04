"""The corpus as tokens, for a loop of one's own: prepared once, then on the device for good."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from examples.reverse_dictionary.data import SPLITS, read_entries, split_of
from examples.reverse_dictionary.encoder import write_trimmed
from examples.whole_files import written_whole

__all__ = ["Corpus", "prepare"]

QUERY_LENGTH = 32
DOCUMENT_LENGTH = 16


@dataclass(frozen=True)
class Corpus:
    """N entries; entry i's definition asks for document i."""

    queries: Tensor
    """[N, 32] int32 tokens, 0 where padded."""
    documents: Tensor
    """[N, 16] int32 tokens."""
    split: Tensor
    """[N] int8, an index of `SPLITS`."""

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Corpus:
        """What `prepare` wrote."""
        with np.load(folder / "tokens.npz") as saved:
            queries, documents, split = (torch.from_numpy(saved[name]) for name in ("queries", "documents", "split"))
        return cls(queries.int().to(device), documents.int().to(device), split.to(device))

    @classmethod
    def made_up(cls, count: int, vocabulary: int, device: torch.device) -> Corpus:
        """Random tokens; a document begins its query."""
        generator = torch.Generator().manual_seed(0)
        queries = torch.randint(1, vocabulary, (count, 8), generator=generator, dtype=torch.int32)
        return cls(queries.to(device), queries[:, :4].to(device), torch.from_numpy(split_of(count)).to(device))

    def rows_of(self, split: str, *, at_most: int | None = None) -> Tensor:
        """The entries of a split, the first ones in a fixed random order if there are more."""
        rows = (self.split == SPLITS.index(split)).nonzero().flatten()
        if at_most is None or len(rows) <= at_most:
            return rows
        shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:at_most]
        return rows[shuffled.to(rows.device)]


def prepare(wordnet: Path, model: Path, folder: Path) -> None:
    """Tokenises WordNet, and writes what `Corpus.load` and `Encoder.load` read."""
    entries = read_entries(wordnet)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    definitions = _tokenised(tokenizer, [entry.definition for entry in entries], QUERY_LENGTH)
    documents = _tokenised(tokenizer, [entry.document for entry in entries], DOCUMENT_LENGTH)
    queries, documents = write_trimmed(model, [definitions, documents], folder)
    with written_whole(folder / "tokens.npz") as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, queries=queries, documents=documents, split=split_of(len(entries)))


def _tokenised(tokenizer: Tokenizer, texts: list[str], length: int) -> NDArray[np.int64]:
    """[N, length] tokens, padded with 0."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return np.array([encoding.ids for encoding in tokenizer.encode_batch_fast(texts)], dtype=np.int64)
