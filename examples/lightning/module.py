"""The dual encoder and its loss, as a LightningModule."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

import negcache_fn
from examples.code_search.evaluate import evaluate
from examples.code_search.features import rows_of
from examples.code_search.model import ResidualHead
from examples.code_search.tokens import PADDING, VOCABULARY_SIZE
from examples.lightning.data import CodeSearchData
from negcache_fn import StepOptions
from negcache_fn.nn import NegativeCacheLoss

__all__ = ["CodeSearch"]

WORD_RATE, HEAD_RATE = 0.5, 1e-3
SCALE = 20.0


class CodeSearch(LightningModule):
    """One table of word vectors, a small residual network for each side, and a cache of functions."""

    def __init__(
        self,
        dataset: CodeSearchData,
        *,
        dim: int = 128,
        cache_size: int = 4096,
        options: StepOptions = StepOptions(),
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.words = nn.EmbeddingBag(VOCABULARY_SIZE, dim, mode="sum", sparse=True, padding_idx=PADDING)
        self.query_head, self.document_head = ResidualHead(dim), ResidualHead(dim)
        example = rows_of(dataset.data.documents, slice(1))
        state = negcache_fn.init_cache(cache_size, dim, features=example)
        self.criterion = NegativeCacheLoss(state, scale=SCALE, options=options)

    def encode_queries(self, features: dict[str, Tensor]) -> Tensor:
        """[B, dim] unit vectors of bags of words."""
        return F.normalize(self.query_head(self._bag(features)), dim=-1)

    def encode_documents(self, features: dict[str, Tensor]) -> Tensor:
        """[N, dim] unit vectors of bags of words."""
        return F.normalize(self.document_head(self._bag(features)), dim=-1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """All that there is to it."""
        queries = self.encode_queries(batch["queries"])
        loss = self.criterion(queries, batch["documents"], self.encode_documents, ids=batch["ids"])
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Asks queries of validation modules."""
        self.log("validation_mrr@10", self.evaluate("validation")["mrr@10"], prog_bar=True)

    def evaluate(self, split: str) -> dict[str, float]:
        """MRR@10 and Recall@10 of a split's queries, over the functions of all splits."""
        queries, positives = self.dataset.data.held_out(split)
        return evaluate(self, queries, positives, self.dataset.data.documents)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adagrad, which takes sparse gradients: a step touches only the words it saw."""
        heads = [*self.query_head.parameters(), *self.document_head.parameters()]
        words = {"params": self.words.parameters(), "lr": WORD_RATE}
        return torch.optim.Adagrad([words, {"params": heads, "lr": HEAD_RATE}])

    def _bag(self, features: dict[str, Tensor]) -> Tensor:
        return self.words(features["tokens"], per_sample_weights=features["weights"])
