"""How well held-out queries find their function among all functions of the corpus."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.code_search.features import rows_of
from examples.code_search.model import DualEncoder

__all__ = ["CUTOFF", "best_ranks", "encode_corpus", "evaluate", "ranks_of", "summarize"]

CUTOFF = 10
_ROWS_AT_ONCE = 4096
_QUERIES_AT_ONCE = 512


@torch.no_grad()
def encode_corpus(model: DualEncoder, documents: dict[str, Tensor]) -> Tensor:
    """[N, dim] embeddings of all documents."""
    count = len(documents["tokens"])
    return torch.cat(
        [
            model.encode_documents(rows_of(documents, slice(start, start + _ROWS_AT_ONCE)))
            for start in range(0, count, _ROWS_AT_ONCE)
        ]
    )


@torch.no_grad()
def ranks_of(queries: Tensor, documents: Tensor, positives: NDArray[np.int64]) -> NDArray[np.int64]:
    """[Q] rank of each query's best positive among all documents: `best_ranks` of the dot products.

    Args:
        queries: [Q, dim] embeddings.
        documents: [N, dim] embeddings.
        positives: [Q, A] as there.
    """
    starts = range(0, len(queries), _QUERIES_AT_ONCE)
    parts = [slice(start, start + _QUERIES_AT_ONCE) for start in starts]
    return np.concatenate([best_ranks(queries[part] @ documents.T, positives[part]) for part in parts])


def best_ranks(scores: Tensor, positives: NDArray[np.int64]) -> NDArray[np.int64]:
    """[Q] rank of each query's best positive, 1 the first; of equal scores the positive comes last.

    Args:
        scores: [Q, N].
        positives: [Q, A] rows of the documents that answer each query; -1 where there are fewer than A.
    """
    answers = torch.from_numpy(positives)
    best = scores.gather(1, answers.clamp(min=0)).masked_fill(answers < 0, -torch.inf).amax(1, keepdim=True)
    return (scores >= best).sum(1).numpy()


def summarize(ranks: NDArray[np.int64]) -> dict[str, float]:
    """MRR@10 and Recall@10 of the ranks."""
    found = ranks <= CUTOFF
    return {
        "mrr@10": float(np.where(found, 1 / ranks, 0).mean()),
        "recall@10": float(found.mean()),
    }


def evaluate(
    model: DualEncoder, queries: dict[str, Tensor], positives: NDArray[np.int64], documents: dict[str, Tensor]
) -> dict[str, float]:
    """MRR@10 and Recall@10 of the queries over all documents."""
    with torch.no_grad():
        encoded = model.encode_queries(queries)
    return summarize(ranks_of(encoded, encode_corpus(model, documents), positives[:, None]))
