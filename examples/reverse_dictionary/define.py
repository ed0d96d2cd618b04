"""The dictionary that a training leaves: ask it by a definition, get words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sentence_transformers import SentenceTransformer
from torch import Tensor

from examples.code_search import checkpoint
from examples.reverse_dictionary.data import Entry
from examples.reverse_dictionary.evaluator import embed

__all__ = ["Hit", "define", "write_dictionary"]

_MODEL, _DICTIONARY = "model", "dictionary.pt"


@dataclass(frozen=True)
class Hit:
    """An entry found."""

    score: float
    document: str
    definition: str

    def __str__(self) -> str:
        return f"{self.score:.3f}  {self.document}\n           {self.definition}"


def write_dictionary(model: SentenceTransformer, documents: Tensor, entries: Sequence[Entry], out: Path) -> None:
    """Saves the model, and with the embeddings of all documents what an answer shows."""
    model.save(str(out / _MODEL))
    content = {
        "embeddings": documents.half(),
        "documents": [entry.document for entry in entries],
        "definitions": [entry.definition for entry in entries],
    }
    checkpoint.save(content, out / _DICTIONARY)


def define(definition: str, out: Path, *, count: int = 10) -> list[Hit]:
    """The ``count`` entries that it describes best, best first.

    Raises:
        FileNotFoundError: when nothing has been trained in ``out``.
        ValueError: an empty definition.
    """
    if not definition.strip():
        raise ValueError("there is no word in the definition; say what the word means, in a few English words")
    found = checkpoint.load(out / _DICTIONARY)
    if found is None:
        raise FileNotFoundError(f"nothing is trained in {out} yet: run `make train-encoder` first")
    model = SentenceTransformer(str(out / _MODEL), device="cpu")
    scores = found["embeddings"].float() @ embed(model, [definition])[0]
    best = scores.topk(min(count, len(scores)))
    return [
        Hit(score, found["documents"][row], found["definitions"][row])
        for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
