"""The arguments of the loss, as one value that is checked where it is written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from sentence_transformers.util import cos_sim, dot_score  # pyright: ignore[reportUnknownVariableType] - numpy's
from torch import Tensor

from negcache_fn._checks import check_choice, check_flag, check_hardness, check_size
from negcache_fn._codec import check_storage
from negcache_fn._options import StepOptions
from negcache_fn._step import check_options
from negcache_fn.integrations.sentence_transformers.filters import FalseNegativeFilter

__all__ = [
    "FIXED_WITH_DOCUMENTS",
    "FIXED_WITH_THE_CACHE",
    "DocumentIds",
    "Negatives",
    "OfDocuments",
    "Settings",
    "check_scale",
]

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
DocumentIds = Literal["tokens", "labels"]
Negatives = Literal["batch", "own"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
PartitionMode = Literal["joint", "per_direction"]
OfDocuments = Callable[[Tensor], Tensor]

# The settings that define the state of the cache.
FIXED_WITH_THE_CACHE = ("cache_size", "gather_across_devices", "max_length", "embedding_dtype", "seed")
# The settings by which its documents are embedded and named.
FIXED_WITH_DOCUMENTS = ("similarity_fct", "document_ids")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `NegativeCacheLoss` that can be written later, except for the scale."""

    cache_size: int
    similarity_fct: Callable[..., Tensor]
    gather_across_devices: bool
    directions: tuple[str, ...]
    partition_mode: str
    hardness_mode: str | None
    hardness_strength: float
    negatives: str
    false_negatives: FalseNegativeFilter | None
    log_weights: OfDocuments | None
    cacheable: OfDocuments | None
    mini_batch_size: int | None
    max_length: int | None
    document_ids: str
    embedding_dtype: torch.dtype
    seed: int
    options: StepOptions

    def __post_init__(self) -> None:
        check_size("cache_size", self.cache_size)
        if self.similarity_fct not in (cos_sim, dot_score):
            raise ValueError(f"similarity_fct is {self.similarity_fct!r}; expected cos_sim or dot_score")
        check_flag("gather_across_devices", self.gather_across_devices)
        self._check_objective()
        chosen: Any = self.false_negatives
        if not isinstance(chosen, FalseNegativeFilter | None):
            kind = type(chosen).__name__
            raise TypeError(f"false_negatives is a {kind}; expected a FalseNegativeFilter")
        for name in ("log_weights", "cacheable"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name} is a {type(function).__name__}; expected a function of the documents' ids [N]")
        for name in ("mini_batch_size", "max_length"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name))
        check_choice("document_ids", self.document_ids, get_args(DocumentIds))
        check_storage("embedding_dtype", self.embedding_dtype)
        check_size("seed", self.seed, least=-(2**63), most=2**63 - 1)
        check_options(self.options)
        if self.options.decided_by_adapters != StepOptions().decided_by_adapters:
            raise ValueError(
                f"options is {self.options!r}; expected in_batch, reduction and placement as they are by default, as "
                f"the loss decides them"
            )
        self._check_together()

    @property
    def hardness_of_cache(self) -> float:
        """The strength with which cached documents are weighted."""
        return self.hardness_strength if self.hardness_mode in ("in_batch_negatives", "all_negatives") else 0

    def _check_objective(self) -> None:
        if isinstance(self.directions, list):
            object.__setattr__(self, "directions", tuple(self.directions))
        given: Any = self.directions
        if not isinstance(given, tuple) or not given:
            raise TypeError(f"directions is {given!r}; expected a tuple such as ('query_to_doc', 'doc_to_query')")
        directions = cast("tuple[Any, ...]", given)
        for direction in directions:
            check_choice("a direction", direction, get_args(Direction))
        if "query_to_doc" not in directions:
            raise ValueError(f"directions is {directions}; expected 'query_to_doc' among them, which has the positives")
        check_choice("partition_mode", self.partition_mode, get_args(PartitionMode))
        if self.partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
            raise ValueError(
                f"partition_mode is 'per_direction' with directions={directions}; expected 'joint', as "
                f"'query_to_query' and 'doc_to_doc' have no positives"
            )
        if self.hardness_mode is not None:
            check_choice("hardness_mode", self.hardness_mode, get_args(HardnessMode))
        check_hardness("hardness_strength", self.hardness_strength)
        check_choice("negatives", self.negatives, get_args(Negatives))

    def _check_together(self) -> None:
        single = self.directions == ("query_to_doc",)
        if not single and self.negatives == "own":
            raise ValueError(
                f"negatives is 'own' with directions={self.directions}; expected ('query_to_doc',), as all others take "
                f"the queries or documents of the batch for negatives"
            )
        if self.options.weighs_negatives:
            raise ValueError(
                f"options is {self.options!r}; expected no hardness there, but hardness_mode and hardness_strength of "
                f"the loss"
            )
        if self.hardness_of_cache and self.options.transforms_scores:
            raise ValueError(
                f"hardness_mode is {self.hardness_mode!r} with options.score_transform; expected one of them"
            )
        if self.false_negatives is None:
            return
        if self.options.transforms_scores:
            raise ValueError("false_negatives is given with options.score_transform; expected one of them")
        if self.false_negatives.guide is not None and self.gather_across_devices:
            raise ValueError(
                "false_negatives has a guide with gather_across_devices=True; expected False, as each rank compares "
                "the guide's embeddings in a cache of its own"
            )


def check_scale(scale: Any) -> float:
    """The number; raises unless it is above 0."""
    if isinstance(scale, Tensor) and scale.ndim == 0:
        scale = scale.item()
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale is {scale!r}, a {type(scale).__name__}; expected a number above 0")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}; expected a number above 0")
    return scale
