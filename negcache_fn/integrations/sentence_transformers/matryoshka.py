"""MatryoshkaLoss over a cache: the loss again in the first dimensions of the embeddings, with draws of its own.

In fewer dimensions other documents are hard, and the normaliser is another: each size draws from the cache truncated to
it. All that is drawn is encoded in the one pass of a step.
"""

import random
from collections.abc import Iterable
from typing import Any, cast

import torch.distributed as dist
from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.functional import normalize

from negcache_fn._cache.state import take, with_items
from negcache_fn._draws.draw import Draw
from negcache_fn._draws.sample import sample_gumbel
from negcache_fn._loss.cross_entropy import loss
from negcache_fn._options import StepOptions
from negcache_fn.integrations.sentence_transformers.texts import Rows

__all__ = ["Truncated", "dimensions", "is_decorated", "normalized"]


def is_decorated(calculate_loss: Any) -> bool:
    """Whether the loss is in a MatryoshkaLoss, which normalises embeddings whatever the similarity."""
    return isinstance(calculate_loss, CachedLossDecorator)


def dimensions(calculate_loss: Any, whole: int) -> tuple[float, list[tuple[int, float]]]:
    """The weight of the loss in all dimensions, and the sizes of those in fewer, each with its weight.

    Args:
        calculate_loss: of the loss; decorated, if that is in a MatryoshkaLoss.
        whole: D.
    """
    if not isinstance(calculate_loss, CachedLossDecorator):
        return 1.0, []
    weighted = list(zip(calculate_loss.matryoshka_dims, calculate_loss.matryoshka_weights, strict=True))
    if 0 < calculate_loss.n_dims_per_step < len(weighted):
        weighted = random.sample(weighted, calculate_loss.n_dims_per_step)
    weight = sum(its_weight for size, its_weight in weighted if size == whole)
    return float(weight), [(size, float(its_weight)) for size, its_weight in weighted if size != whole]


class Truncated:
    """The first dimensions of a cache, and what the queries of a step draw there.

    Args:
        state: the cache.
        queries: [B, D] embeddings.
        size: how many dimensions.
        ids: [N] of the documents in the batch.
        scale: of the inner products.
        options: of the step.
        group: of the ranks that share the cache.
    """

    draw: Draw
    features: Rows  # of the drawn documents

    def __init__(
        self,
        state: TensorDictBase,
        queries: Tensor,
        size: int,
        ids: Tensor,
        scale: float | Tensor,
        options: StepOptions,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.size = size
        self.ids = ids
        self.scale = scale
        self.options = options
        self.group = group
        items = cast(TensorDictBase, state["items"])
        leaves = dict(cast("Iterable[tuple[str, Any]]", items.items()))
        leaves["embedding"] = self._first(leaves["embedding"])
        self.draw = sample_gumbel(
            with_items(state, TensorDict(leaves, batch_size=items.batch_size)),
            self._first(queries),
            exclude_ids=ids,
            scale=scale,
            group=group,
            **options.of_draws(),
        )
        drawn = take(state, self.draw.slot.flatten(), group=group)
        self.features = dict(cast("Iterable[tuple[str, Tensor]]", cast(TensorDictBase, drawn).items()))

    def loss(self, queries: Tensor, documents: Tensor, negatives: Tensor) -> Tensor:
        """[]: of embeddings [B, D], [N, D] and those of the draws."""
        queries, documents, negatives = map(self._first, (queries, documents, negatives))
        options = self.options.of_loss()
        return loss(
            queries, documents, negatives, self.draw, ids=self.ids, scale=self.scale, group=self.group, **options
        )

    def _first(self, embeddings: Tensor) -> Tensor:
        return normalized(embeddings[:, : self.size])


def normalized(embeddings: Tensor) -> Tensor:
    """[N, D] of length 1."""
    return normalize(embeddings, dim=-1)
