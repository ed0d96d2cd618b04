"""Held-out queries against the collection: metrics, and a run file for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from examples.msmarco.data import Data, Judgements
from examples.msmarco.metrics import mrr, ndcg, recall
from examples.msmarco.model import DualEncoder
from examples.msmarco.retrieval import encode, encoded_blocks, search
from examples.msmarco.texts import Texts

__all__ = ["Asked", "Found", "asked", "evaluate", "write_run"]


@dataclass(frozen=True)
class Asked:
    """Queries with a known answer."""

    texts: Texts
    rows: NDArray[np.int64]
    """[Q] rows of `texts`, ascending."""
    judgements: Judgements
    least: int
    """The grade from which a passage is relevant, for MRR and recall."""


@dataclass(frozen=True)
class Found:
    """What a search gave for them."""

    scores: NDArray[np.float32]
    """[Q, depth], the best first."""
    passages: NDArray[np.int64]
    """[Q, depth] rows of the collection, -1 where it has fewer."""
    metrics: dict[str, float]


def asked(data: Data, split: str, *, least: int = 1, at_most: int | None = None) -> Asked:
    """The queries of a split that have a relevant passage, or a fixed sample of them."""
    texts = data.queries(split)
    judgements = data.judgements(split, texts)
    rows = np.unique(judgements.relevant().queries)
    if at_most is not None and len(rows) > at_most:
        rows = np.sort(np.random.default_rng(0).choice(rows, at_most, replace=False))
    return Asked(texts, rows, judgements.of(rows), least)


def evaluate(
    model: DualEncoder,
    data: Data,
    questions: list[Asked],
    *,
    passages: NDArray[np.int64] | None = None,
    depth: int = 1000,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> list[Found]:
    """Searches the passages, or those of some rows, for all queries at once."""
    rows = np.arange(len(data.passages)) if passages is None else passages
    was_training = model.training
    model.eval()
    queries = [encode(model.query_tower, some.texts, some.rows, dtype=dtype) for some in questions]
    blocks = encoded_blocks(model, data.passages, rows, dtype=dtype, progress=progress)
    scores, found = (value.cpu() for value in search(torch.cat(queries), blocks, depth))
    model.train(was_training)

    sizes = [len(some.rows) for some in questions]
    parts = zip(questions, scores.split(sizes), found.split(sizes), strict=True)
    return [Found(s.numpy(), f.numpy(), _metrics(some, f.numpy())) for some, s, f in parts]


def _metrics(some: Asked, ranking: NDArray[np.int64]) -> dict[str, float]:
    relevant = some.judgements.relevant(some.least)
    depth = ranking.shape[1]
    return {
        "mrr@10": mrr(ranking, some.rows, relevant),
        "ndcg@10": ndcg(ranking, some.rows, some.judgements),
        f"recall@{depth}": recall(ranking, some.rows, relevant, cutoff=depth),
    }


def write_run(file: Path, some: Asked, found: Found, passages: Texts, *, tag: str = "negcache_fn") -> None:
    """A run as trec_eval reads it: query, Q0, passage, rank, score, tag.

    Scores have all their digits; where two are the same, trec_eval orders by name, and this by row.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    queries = some.texts.names(some.rows)
    with file.open("w", encoding="utf-8") as lines:
        for query, scores, rows in zip(queries, found.scores.tolist(), found.passages, strict=True):
            names = passages.names(rows[rows >= 0])
            for rank, (name, score) in enumerate(zip(names, scores, strict=False), start=1):
                lines.write(f"{query} Q0 {name} {rank} {score:.9g} {tag}\n")
