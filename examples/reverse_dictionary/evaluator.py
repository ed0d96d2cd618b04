"""How well definitions find their entry among all entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from torch import Tensor

from examples.code_search.evaluate import ranks_of, summarize
from examples.reverse_dictionary.data import Pair

__all__ = ["DictionaryEvaluator", "embed"]

_TEXTS_AT_ONCE = 256


class DictionaryEvaluator(SentenceEvaluator):
    """MRR@10 and Recall@10 of some entries' definitions over the documents of all entries.

    Args:
        entries: N, entries or other pairs, whose documents are searched.
        rows: of the entries whose definitions ask.
        bf16: whether to compute in bfloat16.
    """

    def __init__(self, entries: Sequence[Pair], rows: Sequence[int], *, bf16: bool = False) -> None:
        super().__init__()
        self.bf16 = bf16
        self.documents = [entry.document for entry in entries]
        self.queries = [entries[row].definition for row in rows]
        self.rows = np.array(rows, dtype=np.int64)[:, None]
        self.primary_metric = "mrr@10"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The measures."""
        return self.measure(model, self.embed_documents(model))

    def embed_documents(self, model: SentenceTransformer) -> Tensor:
        """[N, D], with a progress bar."""
        return embed(model, self.documents, bf16=self.bf16, progress=True)

    def measure(self, model: SentenceTransformer, documents: Tensor) -> dict[str, float]:
        """The measures, of documents [N, D] that are embedded already."""
        return summarize(ranks_of(embed(model, self.queries, bf16=self.bf16), documents, self.rows))


def embed(model: SentenceTransformer, texts: list[str], *, bf16: bool = False, progress: bool = False) -> Tensor:
    """[N, D] unit embeddings on the CPU."""
    with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        found = model.encode(
            texts,
            batch_size=_TEXTS_AT_ONCE,
            show_progress_bar=progress,
            convert_to_tensor=True,
            normalize_embeddings=True,
        )
    return found.float().cpu()
