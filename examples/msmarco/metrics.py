"""How good rankings are, by the conventions of the official programs.

- MRR as in ``msmarco_eval.py``: the reciprocal rank of the first relevant passage, 0 where there is none in the first
  ten; mean over all queries that have a passage of a grade above 0, ranked or not.
- NDCG as ``ndcg_cut`` of trec_eval 9, which BEIR uses: the gain is the grade (0 where it is negative or there is none),
  the discount ``log2(1 + rank)``, the ideal that of all judged passages of the query; mean over the same queries.
- Recall: the share of a query's relevant passages among the first so many; mean over the queries that have some.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from examples.msmarco.data import Judgements

__all__ = ["mrr", "ndcg", "recall"]


def mrr(ranking: NDArray[np.int64], queries: NDArray[np.int64], judgements: Judgements, *, cutoff: int = 10) -> float:
    """Mean reciprocal rank.

    Args:
        ranking: [Q, depth] rows of passages, the best first; -1 where there are fewer.
        queries: [Q] rows of the queries, ascending, each once.
        judgements: those of these queries; relevant are all of a grade above 0.
        cutoff: how many ranks count.
    """
    hits = _grades(ranking[:, :cutoff], queries, judgements) > 0
    first = hits.argmax(1)
    return float(np.where(hits.any(1), 1 / (1 + first), 0.0).mean())


def ndcg(ranking: NDArray[np.int64], queries: NDArray[np.int64], judgements: Judgements, *, cutoff: int = 10) -> float:
    """Normalised discounted cumulative gain; arguments as of `mrr`."""
    discounts = 1 / np.log2(2 + np.arange(cutoff))
    gains = _grades(ranking[:, :cutoff], queries, judgements).clip(min=0)
    found = (gains * discounts[: gains.shape[1]]).sum(1)

    grades = judgements.grades.clip(min=0)
    best_first = np.lexsort((-grades, judgements.queries))
    place = np.searchsorted(queries, judgements.queries[best_first])
    rank = np.arange(len(place)) - np.searchsorted(place, place)
    counted = rank < cutoff
    ideal = np.zeros(len(queries))
    np.add.at(ideal, place[counted], grades[best_first][counted] * discounts[rank[counted]])
    return float((found / ideal).mean())


def recall(ranking: NDArray[np.int64], queries: NDArray[np.int64], judgements: Judgements, *, cutoff: int) -> float:
    """Share of the relevant passages that are found; arguments as of `mrr`."""
    hits = (_grades(ranking[:, :cutoff], queries, judgements) > 0).sum(1)
    relevant = np.bincount(np.searchsorted(queries, judgements.relevant().queries), minlength=len(queries))
    return float((hits[relevant > 0] / relevant[relevant > 0]).mean())


def _grades(ranking: NDArray[np.int64], queries: NDArray[np.int64], judgements: Judgements) -> NDArray[np.int64]:
    """[Q, depth] the grades of what is ranked, 0 where not judged."""
    width = 1 + max(ranking.max(initial=0), judgements.passages.max(initial=0))
    judged = judgements.queries * width + judgements.passages  # ascending, as the judgements are
    asked = queries[:, None] * width + ranking
    place = np.searchsorted(judged, asked).clip(max=len(judged) - 1)
    return np.where((judged[place] == asked) & (ranking >= 0), judgements.grades[place], 0)
