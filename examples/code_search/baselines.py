"""What a dual encoder has to beat: plain tf-idf search on the same tokens."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer

from examples.code_search.corpus import Bags
from examples.code_search.evaluate import best_ranks, summarize
from examples.code_search.tokens import VOCABULARY_SIZE

__all__ = ["matrix", "tfidf"]

_QUERIES_AT_ONCE = 256


def tfidf(documents: Bags, queries: Bags, rows: NDArray[np.int64], positives: NDArray[np.int64]) -> dict[str, float]:
    """MRR@10 and Recall@10 of cosine similarity between tf-idf vectors, over all documents.

    It is given every token of a document, not only those that fit the encoder's width.

    Args:
        documents: N bags.
        queries: bags.
        rows: [Q] those of the queries that are asked.
        positives: [Q, A] rows of the documents that answer each of them, -1 where there are fewer.
    """
    transformer = TfidfTransformer(sublinear_tf=True)
    searched = transformer.fit_transform(matrix(documents)).T.tocsr()
    asked = transformer.transform(matrix(queries)[rows])
    ranks: list[NDArray[np.int64]] = []
    for start in range(0, len(rows), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        ranks.append(best_ranks(torch.from_numpy((asked[part] @ searched).toarray()), positives[part]))
    return summarize(np.concatenate(ranks))


def matrix(bags: Bags) -> csr_matrix:
    """[rows, VOCABULARY_SIZE] the counts of the bags."""
    return csr_matrix((bags.counts.astype(np.float32), bags.tokens, bags.starts), (len(bags), VOCABULARY_SIZE))
