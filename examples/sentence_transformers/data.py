"""First paragraphs of docstrings as anchors, the rest of each as its positive; a tenth is held out."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
from datasets import Dataset

from examples.msmarco.sample import docstring_pairs

__all__ = ["Split", "split"]

Split = tuple[Dataset, dict[str, str], dict[str, str], dict[str, set[str]]]


def split(roots: Iterable[Path], *, seed: int = 0) -> Split:
    """Training pairs, and for the evaluator: held-out queries, the corpus of all documents, and what is relevant."""
    pairs = list(dict.fromkeys(chain.from_iterable(map(docstring_pairs, roots))))
    if len(pairs) < 10:
        raise ValueError(
            f"{list(map(str, roots))} have {len(pairs)} docstrings of two paragraphs; expected at least 10"
        )
    held_out = np.random.default_rng(seed).permutation(len(pairs)) < len(pairs) // 10
    seen = [pair for pair, out in zip(pairs, held_out, strict=True) if not out]
    train = Dataset.from_dict({"anchor": [query for query, _ in seen], "positive": [text for _, text in seen]})
    rows = np.flatnonzero(held_out).tolist()
    corpus = {str(row): text for row, (_, text) in enumerate(pairs)}
    return train, {str(row): pairs[row][0] for row in rows}, corpus, {str(row): {str(row)} for row in rows}
