"""A draw: the documents drawn for each query or for the batch, with their scores and noise."""

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.state import scalar, stored
from negcache_fn._cache.take import fetch_embeddings
from negcache_fn._ranks.group import Shards
from negcache_fn._scores.exclude import Exclusions

__all__ = ["Draw", "check_draw", "describe"]

_INFINITY = float("inf")


class Draw(NamedTuple):
    """The drawn documents, and everything their weights need.

    For the batch, R = 1: the m different documents with the largest perturbed masses, in descending order (with a
    group, this rank's part of them). For each query, R = B: the m = k documents that each query drew, with replacement.
    """

    slot: Tensor  # [R, m] int64; -1: there is no document to draw, or no other one
    score: Tensor  # [R, m] stale score of query and document, log-weight included; for the batch, logarithm of the mass
    perturbed: Tensor  # [R, m] the score plus noise: the largest of each sample, or the m largest
    threshold: Tensor  # [1, 1] the next largest perturbed mass, -inf if all are drawn; [B, 0] if each query draws
    log_normalizer: Tensor  # [B] log-sum-exp of the scores, -inf without documents; for the batch, differentiable
    embedding: Tensor  # [R, m, D] stale embedding, storage dtype; float32 for int8, decoded exactly
    id: Tensor  # [R, m] int64
    log_weight: Tensor  # [R, m] float32
    source: Tensor  # [R, m] int64: of which of S merged caches the slot is
    cutoff: Tensor  # [B, S]: documents of that source with a lower score have probability 0; -inf without top_k
    max_score: Tensor  # [B, S]: those with a higher one, log-weight not included, too; +inf without such a limit
    exclude_ids: Tensor  # [1 or B, P] int64: documents that have probability 0; P may be 0
    label: Tensor  # [R, m] int64; -1: none
    exclude_labels: Tensor  # [B, 1] int64: documents of this label have probability 0, -1: none; [B, 0] without labels
    noise: Tensor  # [S, 2] int64: the seed and the step of each source, which make its noise

    @property
    def for_batch(self) -> bool:
        """Whether the documents are drawn for the whole batch, not for each query."""
        return self.threshold.shape[1] > 0

    @property
    def has_documents(self) -> Tensor:
        """[B] bool: whether the query had any document to draw."""
        return self.log_normalizer > -_INFINITY  # not where it is NaN


def check_draw(name: str, value: object) -> None:
    """Raises unless `value` is a `Draw`."""
    if not isinstance(value, Draw):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected a Draw, as made by negcache_fn.sample_gumbel(...)"
        )


def describe(
    state: TensorDictBase,
    chosen: tuple[Tensor, Tensor, Tensor, Tensor],
    log_normalizer: Tensor,
    cutoff: Tensor,
    shards: Shards,
    exclusions: Exclusions,
    excluded: Tensor,
    extra_columns: list[Tensor],
) -> tuple[Draw, list[Tensor]]:
    """The draw of the `chosen` slots, scores, perturbed scores [R, m] and threshold; rows of `extra_columns` [C, ...].

    A slot whose perturbed score is -inf, or NaN, was not drawn. The `exclusions` are those of this rank's queries.
    """
    slot, score, perturbed, threshold = chosen
    missing = ~(perturbed > -_INFINITY)
    slot = slot.masked_fill(missing, -1)
    leaves = [stored(state, name) for name in ("id", "log_weight")]
    labels, max_score = exclusions.labels, exclusions.max_score
    leaves += [] if labels is None else [labels[1]]
    embedding, fetched = fetch_embeddings(state, slot.flatten(), shards, [*leaves, *extra_columns])
    document, log_weight = fetched[:2]
    label = torch.full_like(slot, -1) if labels is None else fetched[2].view(slot.shape).masked_fill(missing, -1)
    draw = Draw(
        slot=slot,
        score=score.masked_fill(missing, -_INFINITY),
        perturbed=perturbed.contiguous(),
        threshold=threshold.contiguous(),
        log_normalizer=log_normalizer,
        embedding=embedding.view(*slot.shape, -1),
        id=document.view(slot.shape).masked_fill(missing, -1),
        log_weight=log_weight.view(slot.shape).masked_fill(missing, 0.0),
        source=torch.zeros_like(slot),
        cutoff=cutoff,
        max_score=torch.full_like(cutoff, _INFINITY) if max_score is None else max_score[:, None].clone(),
        exclude_ids=excluded,
        label=label,
        exclude_labels=slot.new_empty(log_normalizer.shape[0], 0) if labels is None else labels[0][:, None].clone(),
        noise=torch.stack([scalar(state, "seed"), scalar(state, "step")])[None],
    )
    return draw, list(fetched[len(leaves) :])
