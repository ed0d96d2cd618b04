"""False negatives: documents that a query's softmax leaves out.

`FalseNegatives` is the user's argument, the same for drawing, loss and mining; `Exclusions` is the form in which a
search of the cache takes them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from negcache_fn._checks import check_ids, check_scale
from negcache_fn._ranks.group import Ranks

__all__ = [
    "NO_FALSE_NEGATIVES",
    "Exclusions",
    "FalseNegatives",
    "Labels",
    "check_false_negatives",
    "limits_by",
    "max_score_of",
    "needs_positives",
]


class Labels(NamedTuple):
    """Labels of queries and documents, such as classes: documents of a query's label are excluded from its negatives.

    Every number is a label, except -1, which means no label. Labels cost O(B + C) per step, for any number of documents
    with the same label: the kernels compare them slot by slot.

    Examples:
        >>> labels = torch.tensor([0, 1, 1])
        >>> state = init_cache(8, 4, features={"x": torch.zeros(1, 3), "label": labels[:1]})
        >>> state = update(state, {"x": torch.ones(3, 3), "label": labels}, torch.eye(4)[:3])
        >>> known = Labels(queries=torch.tensor([1, -1]), cached=state["items", "features", "label"])
        >>> top_negatives(state, torch.ones(2, 4), 3, false_negatives=FalseNegatives(labels=known))[1]
        tensor([[ 0, -1, -1],
                [ 0,  1,  2]])
    """

    queries: Tensor
    """[B] int64."""

    documents: Tensor | None = None
    """[N] int64, labels of the batch's documents; needed where these are classes of all queries."""

    cached: Tensor | None = None
    """[C] int64, labels of the cache's slots (with a group, of this rank's slots); needed where the cache is searched.
    Store them as a feature, `state["items", "features", "label"]`, or look them up by id:
    `label_of[state["items", "id"]]`."""


class FalseNegatives(NamedTuple):
    """Documents to exclude from a query's negatives in addition to its positive.

    The query's softmax does not contain them. In the cache they are not drawn, are not in the normaliser, and have
    weight 0 when another query draws them. With in-batch classes the same holds for documents of the batch.

    Examples:
        >>> state = update(init_cache(8, 4, torch.zeros(1, 3)), torch.ones(3, 3), torch.eye(4)[:3], ids=torch.arange(3))
        >>> queries = torch.ones(2, 4)
        >>> also_positive = FalseNegatives(ids=torch.tensor([[0, 2], [1, -1]]))
        >>> top_negatives(state, queries, 2, false_negatives=also_positive)[1]
        tensor([[ 1, -1],
                [ 0,  2]])
        >>> FalseNegatives(max_score=lambda positive: positive + 2.0).max_score(torch.tensor([1.0]))
        tensor([3.])

    Reference: the limit on the score after Solatorio, "GISTEmbed", 2024, section 3.
    """

    ids: Tensor | None = None
    """[B, P] int64: ids of all known positives of each query, padded with -1."""

    max_score: float | Tensor | Callable[[Tensor], Tensor] | None = None
    """Documents with a higher score are excluded. A number or [B], in units of the scores (scaled and transformed, or
    with the hardness, but without log-weights), or a function of the positives' scores [B], in the same units, that
    returns it, such as `lambda positive: positive + 1.0`. The limit applies to stale scores in the cache and to fresh
    scores in the batch, without gradient. (-inf excludes every document; passed to `sample_gumbel` alone, it excludes
    the whole cache for that query.)"""

    labels: Labels | None = None
    """Documents of a query's own label are excluded."""


NO_FALSE_NEGATIVES = FalseNegatives()


class Exclusions(NamedTuple):
    """The documents that a search of the cache must not find."""

    for_all: Tensor  # [P] int64 ids; P may be 0
    for_each: Tensor  # [B, P] int64 ids; P may be 0
    max_score: Tensor | None  # [B]
    labels: tuple[Tensor, Tensor] | None = None  # [B] of the queries and [C] of the slots here

    @classmethod
    def of(
        cls,
        queries: Tensor,
        exclude_ids: Tensor | None,
        false_negatives: FalseNegatives,
        dtype: torch.dtype,
        positives: Tensor | None = None,
    ) -> "Exclusions":
        """From checked arguments; `dtype` and `positives` as in `max_score_of`."""
        nothing = torch.empty(0, dtype=torch.int64, device=queries.device)
        each = [ids for ids in (exclude_ids, false_negatives.ids) if ids is not None and ids.ndim == 2]
        for_each = torch.cat(each, 1) if each else nothing.expand(queries.shape[0], 0)
        for_all = nothing if exclude_ids is None or exclude_ids.ndim == 2 else exclude_ids
        labels = false_negatives.labels
        known = None if labels is None or labels.cached is None else (labels.queries, labels.cached)
        return cls(for_all, for_each, max_score_of(false_negatives, queries, dtype, positives), known)

    def gathered(self, queries: Tensor, ranks: Ranks) -> tuple[Tensor, "Exclusions"]:
        """The queries (any rows of them) and the exclusions of all ranks, in one message."""
        sent = [queries, self.for_all, self.for_each]
        sent += [] if self.max_score is None else [self.max_score]
        sent += [] if self.labels is None else [self.labels[0]]
        gathered = ranks.gather_all(*sent)
        max_score = None if self.max_score is None else gathered[3]
        labels = None if self.labels is None else (gathered[-1], self.labels[1])
        return gathered[0], Exclusions(gathered[1], gathered[2], max_score, labels)

    @property
    def numbers(self) -> dict[str, int]:
        """How many ids there are, which must be the same on all ranks."""
        return {"exclude_ids": self.for_all.shape[0], "exclude_ids for each query": self.for_each.shape[1]}

    @property
    def choices(self) -> dict[str, bool]:
        """Whether there are a limit and labels, which must be the same on all ranks."""
        return {"max_score": self.max_score is not None, "labels": self.labels is not None}


def check_false_negatives(
    value: Any, queries: Tensor, *, knows_positives: bool, documents: int | None = None, slots: int | None = None
) -> None:
    """Raises unless `value` is a `FalseNegatives` that fits the queries [B, D].

    Its labels those of so many `documents`, if these are classes, and of so many `slots`, if the cache is searched.
    """
    if not isinstance(value, FalseNegatives):
        raise TypeError(
            f"false_negatives is a {type(value).__name__}; expected negcache_fn.FalseNegatives(ids=..., max_score=...)"
        )
    rows = queries.shape[0]
    if value.labels is not None:
        _check_labels(value.labels, queries, documents, slots)
    if value.ids is not None:
        check_ids("false_negatives.ids", value.ids, queries)
        if value.ids.ndim != 2:
            raise ValueError(f"false_negatives.ids has shape {tuple(value.ids.shape)}; expected [{rows}, P]")
    limit = value.max_score
    if isinstance(limit, Tensor) and limit.ndim == 1:
        if limit.shape[0] != rows or not limit.dtype.is_floating_point or limit.device != queries.device:
            raise ValueError(
                f"false_negatives.max_score has shape {tuple(limit.shape)}, dtype {limit.dtype} and is on "
                f"{limit.device}; expected a number or [{rows}] floating on {queries.device}"
            )
    elif callable(limit):
        if not knows_positives:
            raise TypeError(
                "false_negatives.max_score is a function of the positives' scores, which are not known here; "
                f"expected a number or its values [{rows}]"
            )
    elif limit is not None:
        check_scale(limit, queries.device, name="false_negatives.max_score")


def _check_labels(value: Any, queries: Tensor, documents: int | None, slots: int | None) -> None:
    name = "false_negatives.labels"
    if not isinstance(value, Labels):
        raise TypeError(f"{name} is a {type(value).__name__}; expected negcache_fn.Labels(queries=..., ...)")
    for field, labels, rows in (
        ("queries", value.queries, queries.shape[0]),
        ("documents", value.documents, documents),
        ("cached", value.cached, slots),
    ):
        if rows is None:
            continue
        if not isinstance(labels, Tensor):
            raise TypeError(f"{name}.{field} is a {type(labels).__name__}; expected a tensor, [{rows}] int64")
        if labels.shape != (rows,):
            raise ValueError(f"{name}.{field} has shape {tuple(labels.shape)}; expected [{rows}]")
        if labels.dtype != torch.int64:
            raise TypeError(f"{name}.{field} has dtype {labels.dtype}; expected torch.int64")
        if labels.device != queries.device:
            raise ValueError(f"{name}.{field} is on {labels.device}; expected {queries.device}, the device of the rest")


def needs_positives(false_negatives: FalseNegatives) -> bool:
    """Whether the limit depends on the positives' scores."""
    return callable(false_negatives.max_score)


def limits_by(function: Callable[[Tensor], Tensor], positives: Tensor) -> Tensor:
    """[B] the checked result of a user's function for the positives' scores [B]."""
    given: Any = function(positives.detach())
    if not isinstance(given, Tensor) or given.shape != positives.shape:
        found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"false_negatives.max_score gave {found} for the positives' scores; expected [{positives.shape[0]}]"
        )
    return given


def max_score_of(
    false_negatives: FalseNegatives, like: Tensor, dtype: torch.dtype, positives: Tensor | None = None
) -> Tensor | None:
    """[B] the limit in `dtype`, from the positives' scores [B] if it depends on them; None if there is no limit.

    `like` [B, ...] has its rows and device.
    """
    limit = false_negatives.max_score
    if limit is None:
        return None
    if callable(limit):
        assert positives is not None  # checked at the boundary
        limit = limits_by(limit, positives)
    if isinstance(limit, Tensor):
        return limit.detach().to(dtype).expand(like.shape[0])
    return torch.full((like.shape[0],), limit, dtype=dtype, device=like.device)
