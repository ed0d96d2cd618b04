"""One training step of the loss, in all dimensions of the embeddings and in the fewer ones of a MatryoshkaLoss.

In fewer dimensions other documents are hard, and the normaliser is another: each size draws from the cache truncated to
it. All draws are encoded in the one pass of a step.
"""

import random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.functional import normalize

from negcache_fn._cache.recomputation import check_not_recomputed
from negcache_fn._cache.state import with_items
from negcache_fn._cache.take import take
from negcache_fn._codec import decode, read_as
from negcache_fn._draws.draw import Draw
from negcache_fn._draws.sample import sample_gumbel
from negcache_fn._loss.batch_classes import known_ids, positive_scores
from negcache_fn._loss.cross_entropy import Terms as Classes
from negcache_fn._loss.cross_entropy import terms_of_draw
from negcache_fn._options import StepOptions
from negcache_fn._ranks.agree import checking_arguments
from negcache_fn._ranks.group import ranks_of
from negcache_fn._scores.definition import Similarity
from negcache_fn._scores.exclude import FalseNegatives
from negcache_fn._step import take_step_
from negcache_fn.integrations.sentence_transformers.layout import Rows
from negcache_fn.integrations.sentence_transformers.settings import Settings
from negcache_fn.integrations.sentence_transformers.terms import BatchFacts, Terms

__all__ = ["Embedded", "Sizes", "in_batch_loss", "is_decorated", "train_step"]


class Sizes(NamedTuple):
    """The dimensions of a MatryoshkaLoss, or all of them."""

    whole: float  # weight of the loss in all dimensions
    fewer: list[tuple[int, float]]  # sizes, each with its weight

    @classmethod
    def of(cls, calculate_loss: Any, dimensions: int) -> "Sizes":
        """From `calculate_loss` of the loss, which is decorated if that is in a MatryoshkaLoss."""
        if not isinstance(calculate_loss, CachedLossDecorator):
            return cls(1.0, [])
        weighted = list(zip(calculate_loss.matryoshka_dims, calculate_loss.matryoshka_weights, strict=True))
        if 0 < calculate_loss.n_dims_per_step < len(weighted):
            weighted = random.sample(weighted, calculate_loss.n_dims_per_step)
        weight = sum(its_weight for size, its_weight in weighted if size == dimensions)
        return cls(float(weight), [(size, float(its)) for size, its in weighted if size != dimensions])


class Embedded(NamedTuple):
    """The queries and documents of a batch, as the model embeds them, and the facts about the documents."""

    queries: Tensor  # [B, D]
    documents: Tensor  # [N, D]
    facts: BatchFacts
    sizes: Sizes
    normal: bool  # whether embeddings are brought to length 1
    scale: float | Tensor

    def unit(self, embeddings: Tensor) -> Tensor:
        """In all dimensions, as they are compared."""
        return normalize(embeddings, dim=-1) if self.normal else embeddings

    def terms(self, size: int | None, settings: Settings, group: dist.ProcessGroup | None) -> Terms:
        """The batch's part of the loss in the first dimensions; None: in all."""
        options = settings.options if group is None else settings.options.with_batch_of_all_ranks()
        shorten = self.unit if size is None else _first_of(size)
        queries, documents = shorten(self.queries), shorten(self.documents)
        return Terms(queries, documents, self.facts, self.scale, settings, options, ranks_of(group))


def is_decorated(calculate_loss: Any) -> bool:
    """Whether the loss is in a MatryoshkaLoss, which normalises embeddings for any similarity."""
    return isinstance(calculate_loss, CachedLossDecorator)


def in_batch_loss(batch: Embedded, settings: Settings, group: dist.ProcessGroup | None) -> Tensor:
    """[]: the loss without a cache."""
    total = batch.queries.new_zeros((), dtype=torch.promote_types(batch.queries.dtype, torch.float32))
    for size, weight in [(None, batch.sizes.whole), *batch.sizes.fewer]:
        if weight:
            terms = batch.terms(size, settings, group)
            total = total + weight * terms.complete()
    return total


def train_step(
    state: TensorDictBase,
    batch: Embedded,
    features: Rows,
    embed: Callable[[Rows], Tensor],
    settings: Settings,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss [] over batch and cache, with the documents written into the cache, and the metrics of the step.

    Args:
        state: the cache, which is written.
        batch: its embeddings.
        features: of its documents.
        embed: the encoder.
        settings: of the loss.
        group: of the ranks that share the cache.
    """
    options = settings.options if group is None else settings.options.with_batch_of_all_ranks()
    options = options.with_hardness(settings.hardness_of_cache)
    facts, chosen, ranks = batch.facts, settings.false_negatives, ranks_of(group)
    if settings.hardness_of_cache and chosen is not None and chosen.guide is None:
        # Limits in units of the scores of a step, which include the hardness.
        facts = facts._replace(false_negatives=chosen.by_score(batch.scale + settings.hardness_of_cache))
    if settings.negatives == "own":
        options = options.with_positives_alone()
        facts = facts.without_own(batch.queries.shape[0])
    whole = batch.terms(None, settings, group)
    truncated = [
        _Truncated(state, batch, size, batch.terms(size, settings, group), facts, options, group)
        for size, _ in batch.sizes.fewer
    ]
    negatives: list[Tensor] = []
    waiting = batch.documents  # until the encoder is asked for them

    def encode(rows: Rows) -> Tensor:
        """Encodes the documents of `step_` and, with its draws, those of the smaller sizes."""
        nonlocal waiting
        known, waiting = waiting, waiting[:0]
        count = known.shape[0]
        parts = [{key: values[count:] for key, values in rows.items()}]
        if parts[0][next(iter(rows))].shape[0] == 0:
            return batch.unit(known)
        parts += [part.features for part in truncated]
        sizes = [next(iter(part.values())).shape[0] for part in parts]
        together = {key: torch.cat([part[key] for part in parts]) for key in rows}
        drawn, *others = torch.split(embed(together), sizes)
        negatives.extend(others)
        return batch.unit(torch.cat([known, drawn]))

    def finish(classes: Classes, _: StepOptions) -> Tensor:
        return whole.complete(classes.cache.logit)

    with checking_arguments(ranks):
        check_not_recomputed()
    known = (facts.ids, facts.log_weights, facts.cacheable, facts.false_negatives, None, None)
    queries = batch.unit(batch.queries)
    out = take_step_(state, queries, features, encode, options, batch.scale, known, ranks, finish)
    total = batch.sizes.whole * out.loss
    for part, (_, weight), of_part in zip(truncated, batch.sizes.fewer, negatives, strict=True):
        total = total + weight * part.loss(of_part)
    with torch.no_grad():  # metrics are constants
        without = whole.complete()
        parts = ranks.all_sum(torch.stack([without, out.loss - without])) / ranks.size
    return total, {**out.metrics, "batch_loss": parts[0], "cache_loss": parts[1]}


class _Truncated:
    """The first dimensions of a cache, and the draws of a step's queries in them."""

    draw: Draw
    features: Rows  # of the drawn documents

    def __init__(
        self,
        state: TensorDictBase,
        batch: Embedded,
        size: int,
        terms: Terms,
        facts: BatchFacts,
        options: StepOptions,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.shorten, self.terms = _first_of(size), terms
        self.facts, self.scale, self.options, self.group = facts, batch.scale, options, group
        items = cast(TensorDictBase, state["items"])
        leaves = dict(cast("Iterable[tuple[str, Any]]", items.items()))
        rows = leaves["embedding"]
        leaves["embedding"] = self.shorten(
            decode(rows[:, :size], leaves.pop("embedding_scale", None), read_as(rows.dtype))
        )
        limit = facts.false_negatives.max_score
        if callable(limit):
            similarity = Similarity.of(options, batch.scale, terms.queries.dtype)
            limit = limit(positive_scores(similarity, terms.queries, terms.documents).detach())
        self.draw = sample_gumbel(
            with_items(state, TensorDict(leaves, batch_size=items.batch_size)),
            terms.queries,
            exclude_ids=known_ids(facts.ids, terms.queries.shape[0], options),
            false_negatives=FalseNegatives(facts.false_negatives.ids, limit),
            scale=batch.scale,
            group=group,
            **options.of_draws(),
        )
        drawn = take(state, self.draw.slot.flatten(), group=group)
        self.features = dict(cast("Iterable[tuple[str, Tensor]]", cast(TensorDictBase, drawn).items()))

    def loss(self, negatives: Tensor) -> Tensor:
        """[]: with the embeddings of the draws."""
        queries, documents = self.terms.queries, self.terms.documents
        drawn = self.shorten(negatives).to(queries.dtype)
        facts = (self.facts.ids, self.facts.log_weights, self.facts.false_negatives, None)
        ranks = ranks_of(self.group)
        classes = terms_of_draw(queries, documents, drawn, self.draw, self.scale, facts, self.options, ranks)
        return self.terms.complete(classes.cache.logit)


def _first_of(size: int) -> Callable[[Tensor], Tensor]:
    def shorten(embeddings: Tensor) -> Tensor:
        return normalize(embeddings[:, :size], dim=-1)

    return shorten
