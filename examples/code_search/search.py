"""Search: the functions that a sentence describes best, by the encoder trained with the cache."""

from __future__ import annotations

import linecache
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.code_search import checkpoint
from examples.code_search.corpus import Bags
from examples.code_search.data import Data
from examples.code_search.evaluate import encode_corpus
from examples.code_search.features import QUERY_WIDTH, padded
from examples.code_search.model import DualEncoder
from examples.code_search.tokens import token_ids

__all__ = ["INDEX_FILE", "Hit", "build_index", "search"]

INDEX_FILE = "index.pt"


@dataclass(frozen=True)
class Hit:
    """A function found."""

    score: float
    """Cosine between sentence and function."""
    name: str
    path: str
    line: int

    def __str__(self) -> str:
        signature = linecache.getline(self.path, self.line).strip()
        return f"{self.score:.2f}  {self.name}\n      {self.path}:{self.line}\n      {signature}"


def build_index(model: DualEncoder, data: Data) -> dict[str, Any]:
    """All that searching needs, as tensors and plain values: the encoder, and the corpus encoded by it."""
    corpus = data.corpus
    return {
        "model": model.state_dict(),
        "idf": torch.from_numpy(data.idf),
        "embeddings": encode_corpus(model, data.documents).half(),
        "names": corpus.names,
        "paths": corpus.paths,
        "lines": corpus.lines,
    }


@torch.no_grad()
def search(sentence: str, out: Path, *, count: int = 10) -> list[Hit]:
    """The ``count`` best functions, best first.

    Raises:
        FileNotFoundError: when nothing has been trained in ``out``.
        ValueError: when the sentence has no word to search by.
    """
    index = checkpoint.load(out / INDEX_FILE)
    if index is None:
        raise FileNotFoundError(f"nothing is trained in {out} yet: run `make train` first (about five minutes)")
    bags = Bags.of([Counter(token_ids(sentence))])
    if not len(bags.tokens):
        raise ValueError(f"there is no word in {sentence!r}; say what the function does, in a few English words")
    model = DualEncoder(index["embeddings"].shape[1])
    model.load_state_dict(index["model"])
    query = model.encode_queries(padded(bags, index["idf"].numpy(), QUERY_WIDTH))
    scores = (index["embeddings"].float() @ query[0]).topk(min(count, len(index["names"])))
    return [
        Hit(score, index["names"][row], index["paths"][row], index["lines"][row])
        for score, row in zip(scores.values.tolist(), scores.indices.tolist(), strict=True)
    ]
