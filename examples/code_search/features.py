"""From bags of tokens to what the encoder takes: padded token ids and their weights.

A row's weights are its tf-idf values, scaled to unit length; rows longer than the width keep their heaviest tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.code_search.corpus import Bags
from examples.code_search.tokens import PADDING, VOCABULARY_SIZE

__all__ = ["DOCUMENT_WIDTH", "QUERY_WIDTH", "inverse_document_frequency", "padded", "rows_of"]

DOCUMENT_WIDTH = 64
QUERY_WIDTH = 32


def inverse_document_frequency(documents: Bags, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """[VOCABULARY_SIZE] ``1 + log((1 + n) / (1 + documents with the token))``, over the given rows only."""
    lengths = np.diff(documents.starts)
    counted = np.zeros(len(documents), bool)
    counted[rows] = True
    tokens = documents.tokens[np.repeat(counted, lengths)]
    frequency = np.bincount(tokens, minlength=VOCABULARY_SIZE)
    return (1 + np.log((1 + len(rows)) / (1 + frequency))).astype(np.float32)


def padded(bags: Bags, idf: NDArray[np.float32], width: int) -> dict[str, Tensor]:
    """Features of all rows: ``tokens`` [rows, width] int32, ``weights`` [rows, width] float32, 0 where padded."""
    lengths = np.diff(bags.starts)
    row = np.repeat(np.arange(len(bags)), lengths)
    weight = (1 + np.log(bags.counts)) * idf[bags.tokens]
    by_weight = np.lexsort((bags.tokens, -weight, row))
    column = np.arange(len(row)) - np.repeat(bags.starts[:-1], lengths)
    kept = by_weight[column < width]
    row, column = row[kept], column[column < width]

    tokens = np.full((len(bags), width), PADDING, np.int32)
    weights = np.zeros((len(bags), width), np.float32)
    tokens[row, column] = bags.tokens[kept]
    weights[row, column] = weight[kept]
    weights /= np.linalg.norm(weights, axis=1, keepdims=True).clip(1e-12)
    return {"tokens": torch.from_numpy(tokens), "weights": torch.from_numpy(weights)}


def rows_of(features: dict[str, Tensor], rows: NDArray[np.int64] | slice) -> dict[str, Tensor]:
    """The features of some rows."""
    return {name: value[rows] for name, value in features.items()}
