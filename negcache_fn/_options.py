"""The options of a step that stay the same during a run, as one frozen value.

Everything that can be checked without a tensor is checked in `StepOptions.__post_init__`, so a wrong option fails where
it is written. The functions that take some of these options as keywords build a `StepOptions` of them, and below the
public functions options travel as one argument: adding one touches this file, the code that uses it, and its test.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from negcache_fn._checks import check_choice, check_flag, check_hardness, check_size

__all__ = [
    "Eviction",
    "InBatch",
    "Placement",
    "Reduction",
    "ScoreTransform",
    "StalenessCorrection",
    "StepOptions",
    "check_options",
]

ScoreTransform: TypeAlias = Callable[[Tensor], Tensor]
"""An elementwise function of the scaled inner products."""

InBatch: TypeAlias = bool | Literal["global"]
"""Which documents of the batch are classes: none but the positive, this rank's, or those of all ranks."""

StalenessCorrection: TypeAlias = Literal["self_normalized", "none"]
"""How the loss accounts for stale embeddings."""

Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""How the losses of the queries are reduced."""

Eviction: TypeAlias = Literal["lru", "fifo"]
"""Which documents are evicted: those with the oldest embedding, or those cached first."""

Placement: TypeAlias = Literal["sharded", "replicated"]
"""Whether each rank of a group holds a part of the cache or all of it."""

_DRAWS_PER_QUERY_OF_BATCH = 1  # the default of num_draws, for each query of all ranks


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The options of `step` that are constant during a run.

    Immutable, hashable and compared by value, so a compiled step does not recompile for equal options. Use
    `dataclasses.asdict(options)` for loggers, and `dataclasses.replace(options, top_k=64)` for a changed copy.

    Raises:
        ValueError, TypeError: an option that is invalid, or that contradicts another one.

    Examples:
        >>> StepOptions(draws_per_query=2, evict="fifo").draws_per_query
        2
        >>> StepOptions(evict="lifo")
        Traceback (most recent call last):
        ...
        ValueError: evict is 'lifo'; expected one of 'lru', 'fifo'
    """

    num_draws: int | None = None
    """M, the number of different documents drawn for the whole batch (of all ranks, a multiple of their number). None:
    as many as there are queries, unless `draws_per_query` is given."""

    draws_per_query: int | None = None
    """k, instead of `num_draws`: every query draws k documents from its own softmax, with replacement."""

    share_draws: bool = True
    """With `draws_per_query`: whether every query uses every draw (multiple importance sampling), or only its own."""

    top_k: int | None = None
    """Restricts each query's softmax to its `top_k` highest cached scores."""

    score_transform: ScoreTransform | None = None
    """An elementwise function of the scaled inner products, the same on all ranks. It should have no parameters to
    train: with draws for the batch they would miss the part of the gradient that comes from the whole cache."""

    hardness: float = 0
    """Adds `hardness * stop_gradient(q . d)` to the score of every negative, in the batch and in the cache, so that
    negatives count the more the closer they are to the query (Lan et al., 2025, equation 5); the positive's score stays
    as it is. At least 0; without a `score_transform`."""

    in_batch: InBatch = True
    """Whether all documents of the batch are classes of every query; "global": the documents of all ranks."""

    staleness_correction: StalenessCorrection = "self_normalized"
    """How the loss accounts for stale embeddings: "self_normalized" or "none", see `loss`."""

    weigh_positives: bool = True
    """Whether a document's log-weight is added to its score where it is the positive, too. False: only where it is a
    negative, because a positive is always among the classes, whatever its sampling probability is (Khrylchenko et al.,
    RecSys 2025)."""

    reduction: Reduction = "mean"
    """How the losses of the queries are reduced: "mean" (of those that have a positive), "sum" or "none". With a group,
    the average of the ranks' means is the mean over the queries of all ranks."""

    evict: Eviction = "lru"
    """Which documents are evicted: those with the oldest embedding ("lru"), or those cached first ("fifo")."""

    refresh_stalest: float = 0
    """How many of the oldest documents each rank encodes again in each step; a float below 1 is a share of the rank's
    slots."""

    placement: Placement = "sharded"
    """With a group: "sharded" if each rank holds a part of the cache, "replicated" if each holds all of it."""

    def __post_init__(self) -> None:
        for name in ("num_draws", "draws_per_query", "top_k"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name))
        check_flag("share_draws", self.share_draws)
        if self.score_transform is not None and not callable(self.score_transform):
            kind = type(self.score_transform).__name__
            raise TypeError(f"score_transform is a {kind}; expected an elementwise function of tensors, or None")
        check_hardness("hardness", self.hardness)
        if self.hardness and self.score_transform is not None:
            raise ValueError(f"hardness is {self.hardness} with a score_transform; expected one of them")
        if not isinstance(self.in_batch, bool) and self.in_batch != "global":
            raise ValueError(f"in_batch is {self.in_batch!r}; expected True, False or 'global'")
        check_choice("staleness_correction", self.staleness_correction, get_args(StalenessCorrection))
        check_flag("weigh_positives", self.weigh_positives)
        check_choice("reduction", self.reduction, get_args(Reduction))
        check_choice("evict", self.evict, get_args(Eviction))
        check_choice("placement", self.placement, get_args(Placement))
        self._check_draws()
        if isinstance(self.refresh_stalest, float):
            if not 0.0 <= self.refresh_stalest < 1.0:
                raise ValueError(
                    f"refresh_stalest is {self.refresh_stalest}; expected a number of slots, or a share in 0 ... 1"
                )
        else:
            check_size("refresh_stalest", self.refresh_stalest, least=0)

    def _check_draws(self) -> None:
        if self.draws_per_query is not None:
            if self.num_draws is not None:
                raise ValueError(
                    f"num_draws is {self.num_draws} with draws_per_query={self.draws_per_query}; expected one of them"
                )
        elif not self.share_draws:
            raise ValueError(
                f"share_draws is {self.share_draws} without draws_per_query; expected draws_per_query=k as well, as "
                f"draws for the batch belong to no single query"
            )

    def check_group(self, alone: bool) -> None:
        """Raises if an option needs a process group and there is none."""
        for name, value, needs_group in (
            ("placement", self.placement, self.replicated),
            ("in_batch", self.in_batch, self.all_ranks_in_batch),
        ):
            if alone and needs_group:
                raise ValueError(f"{name} is {value!r} without a group; expected group= as well")

    @property
    def for_batch(self) -> bool:
        """Whether documents are drawn for the whole batch, not for each query."""
        return self.draws_per_query is None

    def draws_for(self, queries: int) -> int:
        """How many documents are drawn for a batch with that many queries on all ranks together."""
        if self.draws_per_query is not None:
            return self.draws_per_query * queries
        return _DRAWS_PER_QUERY_OF_BATCH * queries if self.num_draws is None else self.num_draws

    @property
    def batch_is_classes(self) -> bool:
        """Whether the documents of a batch are classes of all its queries."""
        return bool(self.in_batch)

    @property
    def weights_count_everywhere(self) -> bool:
        """Whether log-weights are added to the scores of positives as to those of negatives."""
        return self.weigh_positives

    @property
    def transforms_scores(self) -> bool:
        """Whether scores are more than scaled inner products."""
        return self.score_transform is not None

    @property
    def weighs_negatives(self) -> bool:
        """Whether negatives weigh more by their similarity."""
        return self.hardness != 0

    @property
    def all_ranks_in_batch(self) -> bool:
        """Whether the batch is that of all ranks."""
        return self.in_batch == "global"

    @property
    def averages_losses(self) -> bool:
        """Whether the loss is the mean over the queries."""
        return self.reduction == "mean"

    @property
    def replicated(self) -> bool:
        """Whether every rank holds the whole cache."""
        return self.placement == "replicated"

    @property
    def decided_by_adapters(self) -> tuple[InBatch, Reduction, Placement]:
        """The options that a framework's adapter derives from the framework's settings."""
        return self.in_batch, self.reduction, self.placement

    def of_draws(self) -> dict[str, Any]:
        """The keywords of `sample_gumbel`."""
        return _some(self, "num_draws", "draws_per_query", "top_k", "score_transform", "hardness", "placement")

    def of_update(self) -> dict[str, Any]:
        """The keywords of `update`."""
        return _some(self, "evict", "placement")

    def with_batch_of_all_ranks(self) -> "StepOptions":
        """The same options, for a batch that all ranks share."""
        return replace(self, in_batch="global")

    def with_positives_alone(self) -> "StepOptions":
        """The same options, with no class of the batch but each query's positive."""
        return replace(self, in_batch=False)

    def with_hardness(self, hardness: float) -> "StepOptions":
        """The same options, with another hardness."""
        return replace(self, hardness=hardness)

    def transformed(self, products: Tensor) -> Tensor:
        """The scores, from scaled inner products."""
        return products if self.score_transform is None else self.score_transform(products)

    def slots_to_refresh(self, capacity: int, most: int) -> int:
        """How many slots `refresh_stalest` is, of `capacity`; ValueError if it is more than `most`."""
        slots = self.refresh_stalest
        if isinstance(slots, float):
            slots = math.ceil(slots * capacity)
        check_size("refresh_stalest", slots, least=0, most=most)
        return slots

    def named_numbers(self) -> dict[str, int]:
        """The integer options, 0 for None; separate from the others because a compiled step may have symbols here."""
        numbers: dict[str, Any] = {
            "num_draws": self.num_draws,
            "draws_per_query": self.draws_per_query,
            "top_k": self.top_k,
        }
        return {name: 0 if value is None else value for name, value in numbers.items()}

    def named_choices(self) -> dict[str, str]:
        """The other options, except for the transform: ranks compare its values for some scores."""
        return {
            "share_draws": f"{self.share_draws}",
            "hardness": f"{self.hardness}",
            "in_batch": f"{self.in_batch}",
            "staleness_correction": self.staleness_correction,
            "weigh_positives": f"{self.weigh_positives}",
            "reduction": self.reduction,
            "evict": self.evict,
            "placement": self.placement,
        }


def check_options(options: Any) -> None:
    """Raises unless they are options of a step."""
    if not isinstance(options, StepOptions):
        raise TypeError(f"options is a {type(options).__name__}; expected negcache_fn.StepOptions(...)")


def _some(options: StepOptions, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}
