"""The dual encoder: one table of word vectors, and a small residual network for each side."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.code_search.tokens import PADDING, VOCABULARY_SIZE

__all__ = ["DualEncoder", "optimizers"]

INITIAL_SCALE = 10.0
WORD_RATE = 0.02
HEAD_RATE = 1e-4
SCALE_RATE = 3e-3


class ResidualHead(nn.Module):
    """``x + W2 gelu(W1 x)``, the identity at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, 2 * dim)
        self.outer = nn.Linear(2 * dim, dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.gelu(self.inner(x)))


class DualEncoder(nn.Module):
    """Maps queries and documents to unit vectors of one space.

    Both towers start as the same random projection of the tf-idf vector, so that training begins near lexical search.
    """

    def __init__(self, dim: int, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words = nn.EmbeddingBag(VOCABULARY_SIZE, dim, mode="sum", sparse=True, padding_idx=PADDING)
            self.query_head = ResidualHead(dim)
            self.document_head = ResidualHead(dim)
            self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with before the softmax; learnt."""
        return self.log_scale.exp()

    def forward(self, features: dict[str, Tensor], side: str) -> Tensor:
        """Of the "queries" or the "documents": what a wrapper for data-parallel training calls."""
        return self.encode_queries(features) if side == "queries" else self.encode_documents(features)

    def encode_queries(self, features: dict[str, Tensor]) -> Tensor:
        """[B, dim] unit vectors of ``tokens`` and ``weights`` [B, width]."""
        return F.normalize(self.query_head(self._bag(features)), dim=-1)

    def encode_documents(self, features: dict[str, Tensor]) -> Tensor:
        """[N, dim] unit vectors of ``tokens`` and ``weights`` [N, width]."""
        return F.normalize(self.document_head(self._bag(features)), dim=-1)

    def _bag(self, features: dict[str, Tensor]) -> Tensor:
        return self.words(features["tokens"], per_sample_weights=features["weights"])


def optimizers(model: DualEncoder) -> list[torch.optim.Optimizer]:
    """Adam, sparse for the word vectors: a step touches only the words it saw."""
    heads = [*model.query_head.parameters(), *model.document_head.parameters()]
    return [
        torch.optim.SparseAdam(list(model.words.parameters()), lr=WORD_RATE),
        torch.optim.Adam([{"params": heads, "lr": HEAD_RATE}, {"params": [model.log_scale], "lr": SCALE_RATE}]),
    ]
