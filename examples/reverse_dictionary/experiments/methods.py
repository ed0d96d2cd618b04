"""The losses that are compared, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn

from examples.reverse_dictionary.experiments.peers import DualMemoryLoss, WarmedUp
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
    dropout: float | None = None
    """Probability in all layers of the encoder; None: 0."""
    prefilled: int | None = None
    """Documents that are put into the cache before the first step, which is not counted."""
    warm_up: float | None = None
    """Share of the steps that have in-batch negatives only, before the cache begins to fill."""


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
    Method("cache_m16", "NegativeCacheLoss, B=64, M=16", "cache", 64, {"options": StepOptions(num_draws=16)}),
    Method("cache_m128", "NegativeCacheLoss, B=64, M=128", "cache", 64, {"options": StepOptions(num_draws=128)}),
    Method("cache_fifo", "NegativeCacheLoss, B=64, FIFO", "cache", 64, {"options": StepOptions(evict="fifo")}),
    Method(
        "cache_uncorrected",
        "NegativeCacheLoss, B=64, staleness not corrected",
        "cache",
        64,
        {"options": StepOptions(staleness_correction="none")},
    ),
    Method("cache_int8", "NegativeCacheLoss, B=64, int8 cache", "cache", 64, {"embedding_dtype": torch.int8}),
    Method("cache_prefilled", "NegativeCacheLoss, B=64, prefilled", "cache", prefilled=16_384),
    Method("cache_warm_up", "NegativeCacheLoss, B=64, after a fifth of the steps", "cache", warm_up=0.2),
    Method("cache_256_chunked", "NegativeCacheLoss, B=256, mini-batches of 64", "cache", 256, {"mini_batch_size": 64}),
    Method("mnrl_64_dropout", "MultipleNegativesRankingLoss, B=64, dropout .1", "mnrl", dropout=0.1),
    Method("cache_dropout", "NegativeCacheLoss, B=64, dropout .1", "cache", dropout=0.1),
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


def loss_of(
    method: Method, model: SentenceTransformer, guide: SentenceTransformer, *, steps: int, seed: int
) -> nn.Module:
    """The loss for a new training of so many steps. The guide is the model before training."""
    if method.warm_up is not None:
        after = loss_of(replace(method, warm_up=None), model, guide, steps=steps, seed=seed)
        return WarmedUp(MultipleNegativesRankingLoss(model), after, int(method.warm_up * steps))
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
