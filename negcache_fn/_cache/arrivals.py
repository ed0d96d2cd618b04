"""The documents that a step inserts, from this rank or from all."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from negcache_fn._cache.eviction import check_priorities
from negcache_fn._checks import check_rows
from negcache_fn._features import Features, leaves, nested_as
from negcache_fn._ranks.attempts import Attempts
from negcache_fn._ranks.group import Ranks, positives_first

__all__ = ["Arrivals", "capacity_of", "check_facts"]


class Arrivals(NamedTuple):
    """The documents to insert."""

    features: Features
    embeddings: Tensor  # [N, D]
    ids: Tensor  # [N]
    log_weights: Tensor  # [N]
    cacheable: Tensor  # [N]

    @classmethod
    def of(
        cls,
        features: Features,
        embeddings: Tensor,
        ids: Tensor | None,
        log_weights: Tensor | None,
        cacheable: Tensor | None,
        *,
        fits: Tensor | None,
    ) -> "Arrivals":
        """With defaults for missing facts: anonymous, a log-weight of 0, cacheable if the features fit."""
        rows, device = embeddings.shape[0], embeddings.device
        ids = torch.full((rows,), -1, device=device) if ids is None else ids
        log_weights = torch.zeros(rows, device=device) if log_weights is None else log_weights
        cacheable = torch.ones(rows, dtype=torch.bool, device=device) if cacheable is None else cacheable
        return cls(features, embeddings, ids, log_weights, cacheable if fits is None else cacheable & fits)

    def gathered(
        self, positives: int, ranks: Ranks, *, differentiable: bool = False, attempts: Attempts | None = None
    ) -> "Arrivals":
        """The documents of all ranks: first the positives of each rank, then the others.

        With a gradient for the embeddings where the loss uses them, at the price of a message. The ranks compare the
        outcome of their `attempts` before other embeddings are sent.
        """
        if ranks.name is None:
            return self
        parts = [leaf for _, leaf in leaves(cast(Features, self.features))]
        parts = [*parts, self.ids, self.log_weights, self.cacheable]
        if not differentiable:
            parts.append(self.embeddings)
        if attempts is not None:
            parts.append(attempts.outcome(self.ids.device))
        gathered = list(ranks.gather_all(*parts))  # a list: torch 2.11 compiles no other starred target
        if attempts is not None:
            attempts.compare(gathered.pop())
        if differentiable:
            gathered.append(ranks.gather(self.embeddings))
        *found, ids, log_weights, cacheable, embeddings = gathered
        features = nested_as(cast(Features, self.features), [positives_first(rows, positives, ranks) for rows in found])
        rest = (positives_first(rows, positives, ranks) for rows in (embeddings, ids, log_weights, cacheable))
        return Arrivals(features, *rest)


def capacity_of(ranks: Ranks) -> str:
    """The bound on the documents of a batch, for messages."""
    return "the capacity of the cache" if ranks.name is None else "the capacity of the cache per rank"


def check_facts(
    rows: int,
    cached: Tensor,
    ids: Tensor | None,
    log_weights: Tensor | None,
    cacheable: Tensor | None,
    priorities: Tensor | None,
) -> None:
    """Raises unless the facts about a batch's documents, and about the slots, have their shapes."""
    facts: tuple[tuple[str, Any, torch.dtype | None], ...] = (
        ("ids", ids, torch.int64),
        ("log_weights", log_weights, None),
        ("cacheable", cacheable, torch.bool),
    )
    for name, values, dtype in facts:
        if values is not None:
            check_rows(name, values, dtype, rows, cached.device)
    if priorities is not None:
        check_priorities(priorities, cached)
