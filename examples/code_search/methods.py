"""One training step of each method that is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

import negcache_fn
from examples.code_search.data import Batch
from examples.code_search.model import DualEncoder
from negcache_fn import StepOptions

__all__ = ["METHODS", "Method", "cache_step", "in_batch_loss", "in_batch_step"]


@dataclass(frozen=True)
class Method:
    """A way to find negatives; all share encoder, queries, learning rates and number of steps."""

    name: str
    label: str
    cached: bool
    """Whether negatives come from a cache as well as from the batch."""
    extra: str
    """Random documents beside B positives: "none"; "stream", B; "match", B + B*k, as many as the cache run encodes."""

    def random_documents(self, batch_size: int, draws_per_query: int) -> int:
        """How many random documents come with a batch."""
        return {"none": 0, "stream": batch_size, "match": batch_size * (1 + draws_per_query)}[self.extra]


METHODS = (
    Method("in_batch", "in-batch", cached=False, extra="none"),
    Method("random", "in-batch + random", cached=False, extra="match"),
    Method("cache", "with the cache", cached=True, extra="stream"),
)


def cache_step(
    encode: Callable[[dict[str, Tensor], str], Tensor],
    scale: Tensor,
    batch: Batch,
    cache: TensorDictBase,
    *,
    options: StepOptions,
    group: ProcessGroup | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics with negatives from batch and cache; the cache is updated in place."""
    output = negcache_fn.step_(
        cache,
        encode(batch.queries, "queries"),
        batch.documents,
        lambda documents: encode(documents, "documents"),
        options=options,
        scale=scale,
        ids=batch.ids,
        group=group,
    )
    return output.loss, output.metrics


def in_batch_step(model: DualEncoder, batch: Batch) -> Tensor:
    """Loss with the batch's own documents as the only negatives."""
    return in_batch_loss(
        model.encode_queries(batch.queries), model.encode_documents(batch.documents), batch.ids, model.scale
    )


def in_batch_loss(queries: Tensor, documents: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """Cross entropy of query i against all N documents, its own in row i; a document that comes twice is one class."""
    repeated = (ids.unsqueeze(0) == ids.unsqueeze(1)).triu(1).any(0)
    scores = (scale * queries @ documents.T).masked_fill(repeated, -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(queries)))
