"""The dual encoder: one table of word vectors, and a small residual network for each side."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.code_search.tokens import PADDING, VOCABULARY_SIZE

__all__ = ["DualEncoder", "optimizers"]

EMBEDDING_DIM = 128
HIDDEN_DIM = 512
INITIAL_SCALE = 20.0


class ResidualHead(nn.Module):
    """``x + W2 gelu(W1 x)``, the identity at first."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, hidden)
        self.outer = nn.Linear(hidden, dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.gelu(self.inner(x)))


class DualEncoder(nn.Module):
    """Maps queries and documents to unit vectors of one space.

    Both towers start as the same random projection of the tf-idf vector, so that training begins near lexical search.
    """

    def __init__(self, *, seed: int = 0, dim: int = EMBEDDING_DIM, hidden: int = HIDDEN_DIM) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words = nn.EmbeddingBag(VOCABULARY_SIZE, dim, mode="sum", sparse=True, padding_idx=PADDING)
            self.query_head = ResidualHead(dim, hidden)
            self.document_head = ResidualHead(dim, hidden)
            self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with before the softmax; learnt."""
        return self.log_scale.exp()

    def encode_queries(self, features: dict[str, Tensor]) -> Tensor:
        """[B, dim] unit vectors of ``tokens`` and ``weights`` [B, width]."""
        return F.normalize(self.query_head(self._bag(features)), dim=-1)

    def encode_documents(self, features: dict[str, Tensor]) -> Tensor:
        """[N, dim] unit vectors of ``tokens`` and ``weights`` [N, width]."""
        return F.normalize(self.document_head(self._bag(features)), dim=-1)

    def _bag(self, features: dict[str, Tensor]) -> Tensor:
        return self.words(features["tokens"], per_sample_weights=features["weights"])


def optimizers(model: DualEncoder, *, word_rate: float = 0.01, head_rate: float = 1e-3) -> list[torch.optim.Optimizer]:
    """Adam, sparse for the word vectors: a step touches only the words it saw."""
    words = list(model.words.parameters())
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("words.")]
    return [torch.optim.SparseAdam(words, lr=word_rate), torch.optim.Adam(others, lr=head_rate)]
