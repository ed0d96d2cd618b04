"""Other methods as losses of sentence-transformers, where it has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

__all__ = ["DualMemoryLoss", "WarmedUp"]

_SCALE = 20.0  # of all losses


class DualMemoryLoss(nn.Module):
    """In-batch negatives, with the queries and the documents of earlier batches as further rows and columns.

    Both banks have the same pairs, as they were embedded then. Source: Kim et al., "A gradient accumulation method for
    dense retriever under memory constraint", NeurIPS 2024, section 4.
    """

    def __init__(self, model: SentenceTransformer, bank_size: int) -> None:
        super().__init__()
        self.model, self.bank_size = model, bank_size
        self._banks: tuple[Tensor, Tensor] | None = None

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss []."""
        queries, documents = (
            normalize(self.model(dict(column))["sentence_embedding"].float(), dim=-1) for column in sentence_features
        )
        rows, columns = queries, documents
        if self._banks is not None:
            rows, columns = torch.cat([queries, self._banks[0]]), torch.cat([documents, self._banks[1]])
        self._banks = rows.detach()[: self.bank_size], columns.detach()[: self.bank_size]
        return cross_entropy(_SCALE * rows @ columns.T, torch.arange(len(rows), device=rows.device))


class WarmedUp(nn.Module):
    """One loss for the first steps, another one for the others."""

    def __init__(self, first: nn.Module, then: nn.Module, steps: int) -> None:
        super().__init__()
        self.first, self.then, self.steps, self.done = first, then, steps, 0

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss []."""
        self.done += 1
        return (self.first if self.done <= self.steps else self.then)(sentence_features, labels)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Those of the second loss."""
        return getattr(self.then, "metrics", {})
