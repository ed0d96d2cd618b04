"""Filters of a query's negatives: documents that score so high that they may be positives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import normalize

from negcache_fn._cache.state import live, stored
from negcache_fn._checks import check_choice
from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES, FalseNegatives

__all__ = ["GUIDE", "FalseNegativeFilter", "guided", "guided_negatives"]

GUIDE = "guide_embedding"
_STRATEGIES = ("absolute", "relative")
_SLOTS_AT_A_TIME = 65_536


@dataclass(frozen=True, kw_only=True)
class FalseNegativeFilter:
    """Excludes documents whose similarity to the query is above a limit, in the batch and in the cache.

    With a `guide`, the guide's cosine similarity decides, as in `GISTEmbedLoss`, and the cache keeps the guide's
    embedding of each document. Without a guide, the model's own similarity decides, as in the positive-aware mining of
    NV-Retriever.

    | `margin_strategy` | limit                                         |
    | ----------------- | --------------------------------------------- |
    | "absolute"        | that of the positive, minus `margin`          |
    | "relative"        | that of the positive, minus its `margin`-fold |
    | None              | `max_score`                                   |

    Args:
        guide: a model, in evaluation mode, that reads the tokens of the trained one.
        margin_strategy: "absolute", "relative" or None.
        margin: at least 0.
        max_score: an upper bound of the limit, or the limit itself without a margin.

    Raises:
        ValueError, TypeError: an invalid argument, which the message names.

    Examples:
        >>> FalseNegativeFilter(margin_strategy="relative", margin=0.05).limit(torch.tensor([0.8]))
        tensor([0.7600])

    Reference: Solatorio, "GISTEmbed", 2024; Moreira et al., "NV-Retriever", 2024, section 3.2.
    """

    guide: SentenceTransformer | None = None
    margin_strategy: str | None = "absolute"
    margin: float = 0.0
    max_score: float | None = None

    def __post_init__(self) -> None:
        guide: Any = self.guide
        if not isinstance(guide, SentenceTransformer | None):
            raise TypeError(f"guide is a {type(guide).__name__}; expected a SentenceTransformer")
        if self.margin_strategy is not None:
            check_choice("margin_strategy", self.margin_strategy, _STRATEGIES)
        elif self.max_score is None:
            raise ValueError("margin_strategy and max_score are None; expected one of them")
        for name in ("margin", "max_score"):
            value: Any = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"{name} is a {type(value).__name__}; expected a number")
        if not 0 <= self.margin < float("inf"):
            raise ValueError(f"margin is {self.margin}; expected a number of at least 0")

    def limit(self, positive: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """[B], from the similarities [B] of the positives, both times `scale`."""
        limits: list[Tensor] = []
        if self.margin_strategy == "absolute":
            limits.append(positive - self.margin * scale)
        elif self.margin_strategy == "relative":
            limits.append(positive - positive.abs() * self.margin)
        if self.max_score is not None:
            limits.append(torch.full_like(positive, self.max_score) * scale)
        return torch.stack(limits).amin(0)

    def by_score(self, scale: float | Tensor) -> FalseNegatives:
        """The argument of a step, for a filter without a guide."""
        fixed = scale.detach() if isinstance(scale, Tensor) else scale

        def limit(positive: Tensor) -> Tensor:
            return self.limit(positive, fixed)

        return FalseNegatives(max_score=limit)


def guided(guide: SentenceTransformer, features: Mapping[str, Any], decode: Any | None) -> Tensor:
    """[N, G] the guide's embeddings of length 1.

    Args:
        guide: a model.
        features: of documents, as the trained model takes them.
        decode: the tokenizer of the trained model, if the guide has another one.
    """
    device = next(value.device for value in features.values() if isinstance(value, Tensor))
    if decode is not None:
        texts = decode.batch_decode(features["input_ids"].tolist(), skip_special_tokens=True)
        features = guide.preprocess(texts)
    on_device = {key: value.to(guide.device) if isinstance(value, Tensor) else value for key, value in features.items()}
    with torch.no_grad():  # a guide is not trained
        return normalize(guide(on_device)["sentence_embedding"].float(), dim=-1).to(device)


def guided_negatives(
    chosen: FalseNegativeFilter, queries: Tensor, documents: Tensor, ids: Tensor, state: TensorDictBase | None
) -> FalseNegatives:
    """The ids of documents of the batch and of the cache that the guide finds too similar to a query.

    Args:
        chosen: the filter.
        queries: [B, G] the guide's embeddings.
        documents: [N, G].
        ids: [N].
        state: the cache.
    """
    rows = queries.shape[0]
    limit = chosen.limit((queries * documents[:rows]).sum(-1))[:, None]
    own = torch.arange(ids.shape[0], device=ids.device) == torch.arange(rows, device=ids.device)[:, None]
    masks, names = [(queries @ documents.T > limit) & ~own], [ids]
    if state is not None:
        cached = cast(Tensor, state["items", "features", GUIDE])
        there = live(state)
        for start in range(0, cached.shape[0], _SLOTS_AT_A_TIME):
            part = slice(start, start + _SLOTS_AT_A_TIME)
            masks.append((queries @ cached[part].to(queries.device).T > limit) & there[part])
            names.append(stored(state, "id")[part])
    found = _listed(masks, names)
    return FalseNegatives(ids=found) if found.shape[1] else NO_FALSE_NEGATIVES


def _listed(masks: Sequence[Tensor], names: Sequence[Tensor]) -> Tensor:
    """[B, P]: the names where a mask [B, n] holds, -1 where there are fewer."""
    mask, all_names = torch.cat(list(masks), 1), torch.cat(list(names))
    place = mask.long().cumsum(1) - 1
    most = int(mask.sum(1).max())
    listed = torch.full((mask.shape[0], most), -1, device=mask.device)
    row, column = mask.nonzero(as_tuple=True)
    listed[row, place[row, column]] = all_names[column]
    return listed
