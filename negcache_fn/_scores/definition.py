"""The score of a query and a document, defined once: product, transform, log-weight, and exclusions.

    score[i, j] = transform(scale * x) + hardness * stop_gradient(x) + log_weight[j],    x = queries[i] . embeddings[j]

`Similarity` is the part without the log-weight, for embeddings at hand: the documents of a batch, fresh embeddings of
drawn documents. `ScoreMatrix` is all of it for a whole cache, never evaluated at once: slots that are empty or excluded
have score -inf. `stream` reads the matrix by parts. Another similarity changes this file, and the kernels in
`negcache_fn._kernels` that should compute it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import pad

from negcache_fn._cache.ids import bias_without, find_slots, named
from negcache_fn._cache.state import check_state, embedding_columns, live, stored
from negcache_fn._checks import check_embeddings, check_ids, check_scale
from negcache_fn._codec import decode, softmax_dtype
from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.dispatch import Problem
from negcache_fn._options import ScoreTransform, StepOptions
from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES, Exclusions

__all__ = [
    "ScoreMatrix",
    "Similarity",
    "check_search",
    "dtype_of_scores",
    "full_precision",
    "in_dtype",
    "score",
    "score_matrix",
]

_INFINITY = float("inf")


class Similarity(NamedTuple):
    """`transform(scale * x) + hardness * stop_gradient(x)`, with x = q . d, in the dtype of the softmax."""

    dtype: torch.dtype
    scale: float | Tensor
    transform: ScoreTransform | None
    hardness: float = 0

    @classmethod
    def of(cls, options: StepOptions, scale: float | Tensor, dtype: torch.dtype) -> "Similarity":
        """With the transform and the hardness of a step's options."""
        return cls(dtype, scale, options.score_transform, options.hardness)

    def pairwise(self, queries: Tensor, documents: Tensor) -> Tensor:
        """[B, D], [M, D] -> [B, M]: every query with every document."""
        return self._of(lambda left, right: left @ right.T, queries, documents)

    def rowwise(self, queries: Tensor, documents: Tensor) -> Tensor:
        """[B, D], [B, k, D] -> [B, k]: each query with its own documents."""
        return self._of(lambda left, right: (left[:, None, :] * right).sum(-1), queries, documents)

    def scaled(self, queries: Tensor) -> Tensor:
        """The queries, scaled, for inner products with documents that are constants."""
        queries = queries.to(self.dtype)
        return queries * self.scale + self.hardness * queries.detach() if self.hardness else queries * self.scale

    @property
    def weighs_negatives(self) -> bool:
        """Whether the similarity of a positive is another one."""
        return self.hardness != 0

    @property
    def of_positives(self) -> "Similarity":
        """The same without hardness, which weights negatives."""
        return self._replace(hardness=0)

    def _of(self, product: Callable[[Tensor, Tensor], Tensor], queries: Tensor, documents: Tensor) -> Tensor:
        queries, documents = queries.to(self.dtype), documents.to(self.dtype)
        found = _transformed(product(queries * self.scale, documents), self.transform)
        return found + self.hardness * product(queries.detach(), documents.detach()) if self.hardness else found


class ScoreMatrix(NamedTuple):
    """`scores[i, j] = transform(queries[i] . embeddings[j]) + bias[j]`, unevaluated.

    -inf where `j` is in `excluded[i]`, the transformed product is above `max_score[i]`, or `row_labels[i]` is
    `slot_labels[j]`.
    """

    queries: Tensor  # [B, D] float32 or float64, the scale folded in
    embeddings: Tensor  # [C, D], storage dtype
    bias: Tensor  # [C], dtype of the queries: log-weight, -inf at empty slots and at those excluded for all queries
    excluded: Tensor  # [B, P] int64 slots, -1: none; P may be 0
    max_score: Tensor | None  # [B], dtype of the queries; None: no limit
    transform: ScoreTransform | None
    row_labels: Tensor | None = None  # [B] int32, see `_numbered`; None: no labels
    slot_labels: Tensor | None = None  # [C] int32
    row_scale: Tensor | None = None  # [C] float32: the embedding is the stored row times it; None: the row itself

    @classmethod
    def of(cls, problem: Problem) -> "ScoreMatrix":
        """Of the tensors that kernels and operators take, without a transform."""
        return cls(*problem[:5], None, *problem[5:])

    @property
    def problem(self) -> Problem:
        """The tensors, as kernels and operators take them; they know no transform."""
        return Problem(*self[:5], *self[6:])

    @property
    def decoded(self) -> Tensor:
        """[C, D]: the embeddings, in the dtype of the queries; for few columns."""
        return decode(self.embeddings, self.row_scale, self.queries.dtype)

    def at(self, slots: Tensor, *, with_embeddings: bool = True) -> "ScoreMatrix":
        """The columns at these slots, of any shape, whose exclusions are not theirs; or with the embeddings of all."""
        labels, scale = (None if column is None else column[slots] for column in (self.slot_labels, self.row_scale))
        embeddings = self.embeddings[slots] if with_embeddings else self.embeddings
        return self._replace(embeddings=embeddings, bias=self.bias[slots], slot_labels=labels, row_scale=scale)

    def of_slots(self, start: int, stop: int) -> "ScoreMatrix":
        """The columns `start ... stop - 1` alone."""
        return self._replace(
            embeddings=self.embeddings[start:stop],
            bias=self.bias[start:stop],
            excluded=self.excluded - start,
            slot_labels=None if self.slot_labels is None else self.slot_labels[start:stop],
            row_scale=None if self.row_scale is None else self.row_scale[start:stop],
        )

    def of_stretches(self, number: Tensor, length: int, *, with_embeddings: bool = True) -> "ScoreMatrix":
        """The same of some stretches of `length` slots, whose numbers [n] ascend; -inf past the end."""
        capacity = self.embeddings.shape[0]
        slots = (number[:, None] * length + torch.arange(length, device=number.device)).flatten()
        chosen = self.at(slots.clamp(max=capacity - 1), with_embeddings=with_embeddings)
        chosen = chosen._replace(bias=chosen.bias.masked_fill(slots >= capacity, -_INFINITY))
        if self.excluded.shape[1] == 0:
            return chosen
        wanted = self.excluded.clamp(min=0) // length
        place = torch.searchsorted(number, wanted).clamp(max=number.shape[0] - 1)
        here = (self.excluded >= 0) & (number[place] == wanted)
        return chosen._replace(excluded=torch.where(here, place * length + self.excluded % length, -1))

    def similarities(self, products: Tensor) -> Tensor:
        """The similarities, from inner products of the queries, which are scaled already."""
        return _transformed(products, self.transform)

    def scores(self) -> Tensor:
        """[B, C rounded up to whole blocks], -inf past the end: for few columns."""
        rows = self.decoded
        if self.transform is None and self.max_score is None:
            scores = torch.addmm(self.bias, self.queries, rows.T)
        else:
            products = self.similarities(self.queries @ rows.T)
            scores = products + self.bias
            if self.max_score is not None:
                scores = scores.masked_fill(products > self.max_score[:, None], -_INFINITY)
        if self.row_labels is not None and self.slot_labels is not None:
            scores = scores.masked_fill(self.row_labels[:, None] == self.slot_labels, -_INFINITY)
        width = scores.shape[1]
        if width % BLOCK:
            scores = pad(scores, (0, -width % BLOCK), value=-_INFINITY)
        if self.excluded.shape[1]:
            here = (self.excluded >= 0) & (self.excluded < width)
            ceiling = torch.where(here, -_INFINITY, _INFINITY).to(scores.dtype)
            scores = scores.scatter_reduce(1, self.excluded.clamp(0, width - 1), ceiling, "amin")
        return scores

    def pull_back(self, gradient: Tensor) -> Tensor:
        """[B, D]: the gradient in the queries, from that in the scores [B, C]; without a transform."""
        return gradient @ self.decoded

    def slopes(self) -> Tensor:
        """[B, C]: the derivatives of the transform; for few columns."""
        assert self.transform is not None
        products = self.queries @ self.decoded.T
        pull_back = torch.func.vjp(self.transform, products)[1]
        return pull_back(torch.ones_like(products))[0]

    def scores_at(self, row: Tensor, slots: Tensor) -> Tensor:
        """[n, BLOCK]: the scores of the queries `row` [n] in blocks of slots [n, BLOCK], -inf past the end.

        The lowest score of a block is never above `max_score`: a chosen block has a document to draw, even if rounding
        here differs from that of the pass that chose it.
        """
        capacity = self.embeddings.shape[0]
        outside = slots >= capacity
        slots = slots.clamp(max=capacity - 1)
        chosen = self.at(slots)
        products = self.similarities(torch.bmm(chosen.decoded, self.queries[row, :, None]).squeeze(-1))
        outside |= (slots[:, :, None] == self.excluded[row, None, :]).any(-1)
        if self.row_labels is not None and chosen.slot_labels is not None:
            outside |= self.row_labels[row, None] == chosen.slot_labels
        scores = (products + chosen.bias).masked_fill(outside, -_INFINITY)
        if self.max_score is not None:
            lowest = products.masked_fill(scores == -_INFINITY, _INFINITY).amin(-1)
            limit = torch.maximum(self.max_score[row], lowest)
            scores = scores.masked_fill(products > limit[:, None], -_INFINITY)
        return scores


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
        ValueError, TypeError: `queries` that are not [B, D] floating on the device of the state; a `scale` that is not
            a scalar.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> score(state, torch.ones(2, 4)).shape
        torch.Size([2, 8])
    """
    check_search(state, queries, scale)
    similarity = Similarity.of(StepOptions(score_transform=score_transform), scale, dtype_of_scores(state, queries))
    with full_precision(queries):
        matrix = score_matrix(state, queries, similarity)
        products = matrix.queries @ matrix.decoded.T
        return matrix.similarities(products) + matrix.bias


def check_search(
    state: TensorDictBase, queries: Tensor, scale: float | Tensor, exclude_ids: Tensor | None = None
) -> None:
    """The checks shared by all functions that score queries against the cache."""
    check_state(state)
    check_embeddings("queries", queries, stored(state, "embedding"), of="the cache")
    check_scale(scale, queries.device)
    if exclude_ids is not None:
        check_ids("exclude_ids", exclude_ids, queries)


def score_matrix(
    state: TensorDictBase, queries: Tensor, similarity: Similarity, exclusions: Exclusions | None = None
) -> ScoreMatrix:
    """The scores of `queries`, which `check_search` has seen, against the cache."""
    if exclusions is None:
        exclusions = Exclusions.of(queries, None, NO_FALSE_NEGATIVES, similarity.dtype)
    if exclusions.for_all.shape[0] > 0:
        bias = bias_without(state, exclusions.for_all)
    else:
        bias = stored(state, "log_weight").masked_fill(~live(state), -_INFINITY)
    excluded = find_slots(state, exclusions.for_each) if exclusions.for_each.shape[1] > 0 else exclusions.for_each
    labels = (None, None) if exclusions.labels is None else _numbered(*exclusions.labels)
    return ScoreMatrix(
        similarity.scaled(queries),
        stored(state, "embedding"),
        bias.to(similarity.dtype),
        excluded,
        exclusions.max_score,
        similarity.transform,
        *labels,
        embedding_columns(state).get("embedding_scale"),
    )


def _numbered(of_queries: Tensor, of_slots: Tensor) -> tuple[Tensor, Tensor]:
    """[B] and [C] int32, equal where the labels are and are not -1: a slot's is the place among the queries' labels."""
    ordered, of_slots = of_queries.sort().values, of_slots.contiguous()
    place = torch.searchsorted(ordered, of_slots).clamp(max=ordered.shape[0] - 1)
    found = ordered[place] == of_slots
    rows = torch.where(named(of_queries), torch.searchsorted(ordered, of_queries.contiguous()), -2)
    return rows.to(torch.int32), torch.where(found, place, -1).to(torch.int32)


def dtype_of_scores(state: TensorDictBase, queries: Tensor) -> torch.dtype:
    """Float32 or wider, from the dtypes of the queries and the cache."""
    return softmax_dtype(queries.dtype, stored(state, "embedding").dtype)


def in_dtype(queries: Tensor, scale: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, float | Tensor]:
    """Both in the dtype of the softmax, for all their uses: gradients are added up in that dtype, and rounded once."""
    return queries.to(dtype), scale.to(dtype) if isinstance(scale, Tensor) else scale


def full_precision(like: Tensor) -> torch.autocast:
    """A context without autocast: scores are accumulated in float32 or wider in any surrounding context."""
    return torch.autocast(like.device.type, enabled=False)


def _transformed(products: Tensor, transform: ScoreTransform | None) -> Tensor:
    return products if transform is None else transform(products)
