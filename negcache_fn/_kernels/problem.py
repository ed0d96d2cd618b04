"""What every score kernel takes: the scores of a batch of queries against the cache, unevaluated."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Problem"]


class Problem(NamedTuple):
    """The fields of `ScoreMatrix` without its transform: `scores[i, j] = queries[i] . embeddings[j] + bias[j]`.

    `row_scale[j]` times the product, where the storage has it.
    -inf where `j` is in `excluded[i]`, or the product is above `max_score[i]`.
    """

    queries: Tensor  # [B, D] float32 or float64
    embeddings: Tensor  # [C, D], storage dtype
    bias: Tensor  # [C], dtype of the queries
    excluded: Tensor  # [B, P] int64 slots, -1: none; P may be 0
    max_score: Tensor | None  # [B], dtype of the queries; None: no limit
    row_scale: Tensor | None = None  # [C] float32, of int8 storage alone
