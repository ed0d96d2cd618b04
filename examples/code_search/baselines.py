"""What a dual encoder has to beat: plain tf-idf search on the same tokens."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer

from examples.code_search.corpus import Bags, Corpus
from examples.code_search.evaluate import summarize
from examples.code_search.tokens import VOCABULARY_SIZE

__all__ = ["matrix", "tfidf"]

_QUERIES_AT_ONCE = 256


def tfidf(corpus: Corpus, split: str) -> dict[str, float]:
    """MRR@10 and Recall@10 of cosine similarity between tf-idf vectors, over all documents.

    It is given every token of a document, not only those that fit the encoder's width.
    """
    transformer = TfidfTransformer(sublinear_tf=True)
    documents = transformer.fit_transform(matrix(corpus.documents)).T.tocsr()
    rows = corpus.queries_of(split)
    queries = transformer.transform(matrix(corpus.queries)[rows])
    positives = corpus.query_document[rows]
    ranks: list[np.ndarray] = []
    for start in range(0, len(rows), _QUERIES_AT_ONCE):
        scores = (queries[start : start + _QUERIES_AT_ONCE] @ documents).toarray()
        positive = np.take_along_axis(scores, positives[start : start + _QUERIES_AT_ONCE, None], 1)
        ranks.append((scores >= positive).sum(1))
    return summarize(np.concatenate(ranks))


def matrix(bags: Bags) -> csr_matrix:
    """[rows, VOCABULARY_SIZE] the counts of the bags."""
    return csr_matrix((bags.counts.astype(np.float32), bags.tokens, bags.starts), (len(bags), VOCABULARY_SIZE))
