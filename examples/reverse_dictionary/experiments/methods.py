"""The losses that are compared, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn

from examples.reverse_dictionary.experiments.peers import DualMemoryLoss
from negcache_fn import StepOptions
from negcache_fn.integrations.sentence_transformers import FalseNegativeFilter, NegativeCacheLoss

__all__ = ["GPU_METHODS", "METHODS", "Method", "loss_of"]

_GIST_TEMPERATURE = 0.05  # 1 / 20, the scale of the others


@dataclass(frozen=True)
class Method:
    """A loss with its batch size. What is not given is the default of the loss."""

    name: str
    label: str
    loss: Literal["mnrl", "mined_mnrl", "cached_mnrl", "gist", "dual_memory", "cache"]
    """With "mined_mnrl" each pair has a hard negative, mined before training and in the middle; that is not counted."""
    batch_size: int = 64
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of `CachedMultipleNegativesRankingLoss`, `DualMemoryLoss` or `NegativeCacheLoss`."""


# For a CPU, and for a GPU, where larger batches pay.
METHODS = (
    Method("mnrl_64", "MultipleNegativesRankingLoss, B=64", "mnrl"),
    Method("mnrl_128", "MultipleNegativesRankingLoss, B=128", "mnrl", 128),
    Method("cached_512", "CachedMultipleNegativesRankingLoss, B=512", "cached_mnrl", 512, {"mini_batch_size": 64}),
    Method("mined_64", "MultipleNegativesRankingLoss, B=64, a mined negative each", "mined_mnrl"),
    Method("gist_64", "GISTEmbedLoss, B=64", "gist"),
    Method("dual_memory_64", "two memories of 1,024 pairs, B=64", "dual_memory", 64, {"bank_size": 1024}),
    Method("cache", "NegativeCacheLoss, B=64", "cache"),
    Method("cache_64k", "NegativeCacheLoss, B=64, C=65,536", "cache", 64, {"cache_size": 65_536}),
    Method(
        "cache_64k_m32",
        "NegativeCacheLoss, B=64, C=65,536, M=32",
        "cache",
        64,
        {"cache_size": 65_536, "options": StepOptions(num_draws=32)},
    ),
    Method(
        "cache_64k_m128",
        "NegativeCacheLoss, B=64, C=65,536, M=128",
        "cache",
        64,
        {"cache_size": 65_536, "options": StepOptions(num_draws=128)},
    ),
    Method(
        "cache_64k_k1",
        "NegativeCacheLoss, B=64, C=65,536, each query draws 1",
        "cache",
        64,
        {"cache_size": 65_536, "options": StepOptions(draws_per_query=1)},
    ),
    Method("cache_128", "NegativeCacheLoss, B=128", "cache", 128),
    Method("cache_4k", "NegativeCacheLoss, B=64, C=4,096", "cache", 64, {"cache_size": 4096}),
    Method(
        "cache_refresh",
        "NegativeCacheLoss, B=64, the 16 stalest refreshed",
        "cache",
        64,
        {"options": StepOptions(refresh_stalest=16)},
    ),
    Method(
        "cache_margin",
        "NegativeCacheLoss, B=64, none closer than .95 of the positive",
        "cache",
        64,
        {"false_negatives": FalseNegativeFilter(margin_strategy="relative", margin=0.05)},
    ),
)

GPU_METHODS = (
    Method("mnrl_256", "MultipleNegativesRankingLoss, B=256", "mnrl", 256),
    Method("mnrl_1024", "MultipleNegativesRankingLoss, B=1024", "mnrl", 1024),
    Method("cached_4096", "CachedMultipleNegativesRankingLoss, B=4096", "cached_mnrl", 4096, {"mini_batch_size": 1024}),
    Method("gist_256", "GISTEmbedLoss, B=256", "gist", 256),
    Method("cache_256", "NegativeCacheLoss, B=256", "cache", 256),
    Method("cache_256_64k", "NegativeCacheLoss, B=256, C=65,536", "cache", 256, {"cache_size": 65_536}),
    Method(
        "cache_256_64k_k1",
        "NegativeCacheLoss, B=256, C=65,536, each query draws 1",
        "cache",
        256,
        {"cache_size": 65_536, "options": StepOptions(draws_per_query=1)},
    ),
    Method("cache_1024_64k", "NegativeCacheLoss, B=1024, C=65,536", "cache", 1024, {"cache_size": 65_536}),
)


def loss_of(method: Method, model: SentenceTransformer, guide: SentenceTransformer, *, seed: int) -> nn.Module:
    """The loss for a new training. The guide is the model before training."""
    match method.loss:
        case "mnrl" | "mined_mnrl":
            return MultipleNegativesRankingLoss(model)
        case "cached_mnrl":
            return CachedMultipleNegativesRankingLoss(model, **method.arguments)
        case "gist":
            return GISTEmbedLoss(model, guide, temperature=_GIST_TEMPERATURE)
        case "dual_memory":
            return DualMemoryLoss(model, **method.arguments)
        case "cache":
            return NegativeCacheLoss(model, seed=seed, **method.arguments)
