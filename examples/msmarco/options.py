"""What a run can be told, and the defaults: free of torch, so that the command line is quick to help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["ESTIMATORS", "FORMATS", "POOLING", "PRECISIONS", "STORAGE", "TOWERS", "Options", "Shape", "Widths"]

FORMATS = ("msmarco", "beir")
TOWERS = ("shared", "separate")
POOLING = ("mean", "cls")
PRECISIONS = ("float32", "bfloat16")
STORAGE = ("device", "cpu", "files")
ESTIMATORS = ("shared", "paper")
"""With what this package adds to the paper's estimator, and without: docs/method.md."""


class Shape(NamedTuple):
    """What a dual encoder is besides its weights."""

    towers: str = TOWERS[0]
    """"shared": one transformer for queries and passages; "separate": two, the same at first."""
    pooling: str = POOLING[0]
    """"mean" of the tokens' states, or that of the first token, "cls"."""
    scale: float = 20.0
    """At first."""


class Widths(NamedTuple):
    """Texts are cut at so many tokens."""

    query_tokens: int = 32
    passage_tokens: int = 128


@dataclass(frozen=True)
class Options:
    """What a run depends on besides its data and its model."""

    steps: int = 250_000
    batch_size: int = 8
    cache_size: int = 131_072
    prefill: int | None = None
    """Random passages to embed before the first step; as many as fill the cache by default."""
    random_passages: int = 8
    """That come into the cache in each step, beside the positives."""
    draws_per_query: int = 4
    estimator: str = ESTIMATORS[0]
    rate: float = 1e-5
    scale_rate: float = 1e-3
    """Of the logarithm of the scale."""
    warm_up: int = 10_000
    """Steps of it; then the rates fall to 0 on a line."""
    clip: float = 1.0
    """The largest norm of a gradient."""
    storage: str = "device"
    precision: str = "float32"
    """Of the encoders' products and of the cached embeddings."""
    chunk_size: int | None = None
    """Passages encoded at a time with gradient; all at once by default."""
    evaluate_every: int = 10_000
    log_every: int = 50
    validation_split: str = "dev"
    validation_queries: int = 1000
    validation_passages: int = 100_000
    """Random ones, beside those that answer: as a sample of the collection."""
    triples: str | None = None
    """A file of triples to take queries, positives and mined negatives from."""
    seed: int = 0
