"""The argument of every score kernel: the scores of a batch of queries against the cache, unevaluated."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["SCHEMA", "Problem"]


class Problem(NamedTuple):
    """The fields of `ScoreMatrix` without its transform: `scores[i, j] = queries[i] . embeddings[j] + bias[j]`.

    `row_scale[j]` times the product, where the storage has it.
    -inf where `j` is in `excluded[i]`, the product is above `max_score[i]`, or `row_labels[i]` is `slot_labels[j]`.
    """

    queries: Tensor  # [B, D] float32 or float64
    embeddings: Tensor  # [C, D], storage dtype
    bias: Tensor  # [C], dtype of the queries
    excluded: Tensor  # [B, P] int64 slots, -1: none; P may be 0
    max_score: Tensor | None  # [B], dtype of the queries; None: no limit
    row_labels: Tensor | None = None  # [B] int32; None: no labels
    slot_labels: Tensor | None = None  # [C] int32, with them
    row_scale: Tensor | None = None  # [C] float32, of int8 storage alone


SCHEMA = (
    "Tensor queries, Tensor embeddings, Tensor bias, Tensor excluded, "
    "Tensor? max_score, Tensor? row_labels, Tensor? slot_labels, Tensor? row_scale"
)
"""A problem's fields as the first arguments of an operator."""
