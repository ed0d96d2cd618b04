"""Scores of queries against the cache: their definition, and the checks that all readers of them share."""

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn.checks import check_embeddings, check_ids, check_scale, check_state
from negcache_fn.false_negatives import NO_FALSE_NEGATIVES, Exclusions
from negcache_fn.ids import find_slots, without
from negcache_fn.state import live, stored
from negcache_fn.streaming import ScoreMatrix, ScoreTransform, full_precision

__all__ = ["Similarity", "check_search", "score", "score_matrix", "softmax_dtype", "widened"]

_INFINITY = float("inf")


def score(
    state: TensorDictBase,
    queries: Tensor,
    *,
    scale: float | Tensor = 1.0,
    score_transform: ScoreTransform | None = None,
) -> Tensor:
    """All scores: `transform(scale * queries @ embeddings.T) + log_weight`, -inf at empty slots.

    This is the readable definition; it materialises [B, C] and nothing else in this package calls it.

    Args:
        state: the cache.
        queries: [B, D] floating.
        scale: number or 0-d tensor (inverse temperature, beta).
        score_transform: elementwise function of the scaled inner products.

    Returns:
        [B, C], float32 or wider. Differentiable in `queries` and `scale`.

    Raises:
        ValueError, TypeError: `queries` that are not [B, D] floating on the device of the state; a scale that is no
            scalar.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> score(state, torch.ones(2, 4)).shape
        torch.Size([2, 8])
    """
    check_search(state, queries, scale)
    with full_precision(queries):
        matrix = score_matrix(state, queries, scale=scale, score_transform=score_transform)
        products = matrix.queries @ matrix.embeddings.to(matrix.queries.dtype).T
        return (products if score_transform is None else score_transform(products)) + matrix.bias


def check_search(
    state: TensorDictBase, queries: Tensor, scale: float | Tensor, exclude_ids: Tensor | None = None
) -> None:
    """The checks that all who score queries against the cache share."""
    check_state(state)
    check_embeddings("queries", queries, stored(state, "embedding"), of="the cache")
    check_scale(scale, queries.device)
    if exclude_ids is not None:
        check_ids("exclude_ids", exclude_ids, queries)


def score_matrix(
    state: TensorDictBase,
    queries: Tensor,
    *,
    scale: float | Tensor,
    score_transform: ScoreTransform | None,
    exclusions: Exclusions | None = None,
) -> ScoreMatrix:
    """The (unevaluated) scores of `queries` against the cache, which `check_search` has seen."""
    embeddings = stored(state, "embedding")
    dtype = softmax_dtype(state, queries)
    if exclusions is None:
        exclusions = Exclusions.of(queries, None, NO_FALSE_NEGATIVES, dtype)
    kept = without(state, exclusions.for_all) if exclusions.for_all.shape[0] > 0 else live(state)
    excluded = find_slots(state, exclusions.for_each) if exclusions.for_each.shape[1] > 0 else exclusions.for_each
    bias = stored(state, "log_weight").to(dtype).masked_fill(~kept, -_INFINITY)
    return ScoreMatrix(queries.to(dtype) * scale, embeddings, bias, excluded, exclusions.max_score, score_transform)


def softmax_dtype(state: TensorDictBase, queries: Tensor) -> torch.dtype:
    """The dtype of scores: float32 or wider."""
    return torch.promote_types(torch.promote_types(queries.dtype, stored(state, "embedding").dtype), torch.float32)


def widened(queries: Tensor, scale: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, float | Tensor]:
    """Both in the dtype of the softmax, for all their uses: the gradients are added up in it, and rounded once."""
    return queries.to(dtype), scale.to(dtype) if isinstance(scale, Tensor) else scale


class Similarity(NamedTuple):
    """`transform(scale * q . d)` in the dtype of the softmax."""

    dtype: torch.dtype
    scale: float | Tensor
    transform: ScoreTransform | None

    def all(self, queries: Tensor, documents: Tensor) -> Tensor:
        """[B, D], [M, D] -> [B, M]: every query with every document."""
        return self._transformed((queries.to(self.dtype) * self.scale) @ documents.to(self.dtype).T)

    def own(self, queries: Tensor, documents: Tensor) -> Tensor:
        """[B, D], [B, k, D] -> [B, k]: each query with its own documents."""
        scaled = queries.to(self.dtype) * self.scale
        return self._transformed((scaled[:, None, :] * documents.to(self.dtype)).sum(-1))

    def _transformed(self, products: Tensor) -> Tensor:
        return products if self.transform is None else self.transform(products)
