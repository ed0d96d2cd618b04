"""The two encoders: bags of words, where scoring dominates a step, and a transformer, where encoding does.

Both begin as a random projection of the tf-idf vector, near lexical search, and learn from there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.code_search.model import HEAD_RATE, SCALE_RATE, WORD_RATE, ResidualHead
from examples.code_search.tokens import PADDING, VOCABULARY_SIZE

__all__ = ["ENCODERS", "DualEncoder", "optimizers"]


class Light(nn.Module):
    """``x + W2 gelu(W1 x)`` of the weighted sum x of a text's word vectors."""

    dim = 128
    width = None
    """Uses all words of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = ResidualHead(self.dim)
        self.documents = ResidualHead(self.dim)

    def forward(self, words: nn.Embedding, features: dict[str, Tensor], side: str) -> Tensor:
        summed = F.embedding_bag(
            features["tokens"],
            words.weight,
            per_sample_weights=features["weights"],
            mode="sum",
            sparse=True,
            padding_idx=PADDING,
        )
        return self.queries(summed) if side == "queries" else self.documents(summed)


class Transformer(nn.Module):
    """The weighted sum of a text's word vectors after two layers of attention, which begin as the identity.

    Bags have no order, so words have no positions. Both towers share the layers, as is usual.
    """

    dim = 128
    width = 32
    """The words of largest weight that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                self.dim, 4, 2 * self.dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        for layer in self.layers:
            for last in (layer.self_attn.out_proj, layer.linear2):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def forward(self, words: nn.Embedding, features: dict[str, Tensor], side: str) -> Tensor:
        tokens, weights = features["tokens"][:, : self.width], features["weights"][:, : self.width]
        hidden = words(tokens)
        empty = tokens == PADDING
        empty[:, 0] = False  # attention to nothing is NaN
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=empty)
        return (hidden * weights[..., None]).sum(1)


ENCODERS: dict[str, type[Light] | type[Transformer]] = {"light": Light, "transformer": Transformer}


class DualEncoder(nn.Module):
    """Maps texts to unit vectors."""

    def __init__(self, name: str, *, seed: int, scale: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = ENCODERS[name]()
            self.words = nn.Embedding(VOCABULARY_SIZE, self.body.dim, padding_idx=PADDING, sparse=True)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with; learnt."""
        return self.log_scale.exp()

    def encode_queries(self, features: dict[str, Tensor]) -> Tensor:
        """[B, dim]."""
        return F.normalize(self.body(self.words, features, "queries"), dim=-1)

    def encode_documents(self, features: dict[str, Tensor]) -> Tensor:
        """[N, dim]."""
        return F.normalize(self.body(self.words, features, "documents"), dim=-1)


def optimizers(model: DualEncoder, rate: float) -> list[torch.optim.Optimizer]:
    """Adam, sparse for the word vectors; ``rate`` multiplies the learning rates of code search."""
    sparse = torch.optim.SparseAdam(list(model.words.parameters()), lr=rate * WORD_RATE)
    dense = [
        {"params": list(model.body.parameters()), "lr": rate * HEAD_RATE},
        {"params": [model.log_scale], "lr": SCALE_RATE},
    ]
    return [sparse, torch.optim.Adam(dense)]
