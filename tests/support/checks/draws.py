"""Checks of a sampler against the exact float64 softmax."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from scipy import stats
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn import FalseNegatives
from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES
from tests.support import oracles
from tests.support.builders import at_step, is_close, make_state, unit

Sampler = Callable[..., Any]


def exact_scores(
    state: TensorDictBase,
    queries: Tensor,
    *,
    scale: Any = 1.0,
    score_transform: Any = None,
    exclude_ids: Tensor | None = None,
    top_k: int | None = None,
    false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
) -> Tensor:
    """`[B, C]` float64 scores of a state, from its stored bytes."""
    items, rows = state["items"], len(queries)
    exclude: list[list[int]] = [[] for _ in range(rows)]
    for ids in (exclude_ids, false_negatives.ids):
        if ids is not None:
            each = (ids[None].expand(rows, -1) if ids.ndim == 1 else ids).tolist()
            exclude = [[*before, *more] for before, more in zip(exclude, each, strict=True)]
    limit = false_negatives.max_score
    return oracles.cache_scores(
        queries.detach(),
        items["embedding"],
        live=(items["embedded_at"] >= 0).tolist(),
        log_weight=items["log_weight"],
        ids=items["id"].tolist(),
        exclude=exclude,
        scale=scale,
        transform=score_transform,
        top_k=top_k,
        max_score=None if limit is None else torch.as_tensor(limit).expand(rows).tolist(),
    )


def counts(
    sample: Sampler, state: TensorDictBase, queries: Tensor, steps: Iterable[int], copies: int = 1, **options: Any
) -> np.ndarray:
    """`[B, C]` how often each query drew each slot (-1 nowhere), with `copies` rows for each query in a call."""
    rows, capacity = len(queries), len(state["items", "id"])
    options = repeated(options, copies)
    out = np.zeros((rows, capacity))
    for step in steps:
        slots = sample(at_step(state, step), queries.repeat(copies, 1), **options).slot.view(copies, rows, -1)
        for i in range(rows):
            drawn = slots[:, i].flatten().numpy()
            out[i] += np.bincount(drawn[drawn >= 0], minlength=capacity)
    return out


def repeated(options: dict[str, Any], copies: int) -> dict[str, Any]:
    """Options of a sampler for `copies` rows of each query."""
    exclude, known = options.get("exclude_ids"), options.get("false_negatives", FalseNegatives())
    known = FalseNegatives(
        None if known.ids is None else known.ids.repeat(copies, 1),
        known.max_score.repeat(copies) if isinstance(known.max_score, Tensor) else known.max_score,
    )
    if exclude is not None and exclude.ndim == 2:
        exclude = exclude.repeat(copies, 1)
    return options | {"exclude_ids": exclude, "false_negatives": known}


def distribution(
    sample: Sampler,
    state: TensorDictBase,
    queries: Tensor,
    *,
    steps: int = 4,
    copies: int = 16,
    draws_per_query: int = 64,
    **options: Any,
) -> None:
    """Chi-square of the draws, over rows, samples and steps, against exact softmax (`oracles.FALSE_ALARM` a query)."""
    drawn = counts(sample, state, queries, range(1, steps + 1), copies, draws_per_query=draws_per_query, **options)
    exact = oracles.probabilities(exact_scores(state, queries, **options))
    for i in range(len(queries)):
        assert drawn[i].sum() == steps * copies * draws_per_query * (exact[i].sum() > 0)
        assert oracles.chi_square_pvalue(drawn[i], exact[i]) > oracles.FALSE_ALARM, f"query {i}"


def many_steps(sample: Sampler, state: TensorDictBase, query: Tensor, *, steps: int = 600, **options: Any) -> None:
    """Chi-square of single draws of one query, one a step: the noise moves with `step`."""
    drawn = counts(sample, state, query[None], range(steps), **options)
    exact = oracles.probabilities(exact_scores(state, query[None], **options))
    assert oracles.chi_square_pvalue(drawn[0], exact[0]) > oracles.FALSE_ALARM


def joint_independence(sample: Sampler, *, steps: int = 60, copies: int = 100) -> None:
    """Draws of two rows and two samples are independent: chi-square over the joint of all four (3^4 outcomes)."""
    state = make_state(unit(3, 4, seed=0))
    queries = unit(2, 4, seed=1)
    exact = oracles.probabilities(exact_scores(state, queries, scale=2.0))
    joint = np.einsum("a,b,c,d->abcd", exact[0], exact[0], exact[1], exact[1])
    seen = np.zeros_like(joint)
    for step in range(steps):
        slots = sample(at_step(state, step), queries.repeat(copies, 1), scale=2.0, draws_per_query=2).slot
        for together in slots.view(copies, 4).tolist():
            seen[tuple(together)] += 1
    assert oracles.chi_square_pvalue(seen.ravel(), joint.ravel()) > oracles.FALSE_ALARM


def pairs_are_independent(
    sample: Sampler,
    state: TensorDictBase,
    queries: Tensor,
    *,
    steps: int = 500,
    draws_per_query: int = 2,
    **options: Any,
) -> None:
    """Any two draws of a step, of one query or of two: chi-square over the joint (`oracles.FALSE_ALARM` a pair).

    The state has few documents, but they may be anywhere in the tree.
    """
    exact = oracles.probabilities(exact_scores(state, queries, **options))
    support = np.flatnonzero(exact.any(0))
    drawn = [
        sample(at_step(state, step), queries, draws_per_query=draws_per_query, **options).slot for step in range(steps)
    ]
    places = np.searchsorted(support, torch.stack(drawn).flatten(1).numpy())
    chances, size = exact[:, support].repeat(draws_per_query, 0), len(support)
    for one, other in itertools.combinations(range(len(chances)), 2):
        seen = np.bincount(size * places[:, one] + places[:, other], minlength=size**2)
        p_value = oracles.chi_square_pvalue(seen, np.outer(chances[one], chances[other]).ravel())
        assert p_value > oracles.FALSE_ALARM, f"draws {one} and {other}"


def fields(sample: Sampler, state: TensorDictBase, queries: Tensor, *, tolerance: float = 2e-5, **options: Any) -> Any:
    """Each field says what the drawn slot is, and `log_normalizer` is the exact logsumexp."""
    draw = sample(state, queries, **options)
    samples = options["draws_per_query"]
    options.pop("draws_per_query")
    scores = exact_scores(state, queries, **options)
    size = 1 + float(options.get("scale", 1.0))  # what a sum that cancels was made of
    items, rows = state["items"], len(queries)
    assert draw.slot.shape == (rows, samples) and draw.slot.dtype == torch.int64
    assert is_close(draw.log_normalizer, oracles.log_normalizer(scores), tolerance, size)
    valid = draw.slot >= 0
    candidates = (scores > -math.inf).sum(-1, keepdim=True)
    assert torch.equal(valid, (candidates > 0).expand(rows, samples))
    assert draw.threshold.shape == (rows, 0)
    assert draw.source.shape == draw.slot.shape and not bool(draw.source.any())
    assert draw.cutoff.shape == (rows, 1)
    assert draw.exclude_ids.ndim == 2 and draw.exclude_ids.dtype == torch.int64
    for i in range(rows):
        for m in range(samples):
            slot = int(draw.slot[i, m])
            if slot < 0:
                continue
            assert scores[i, slot] > -math.inf, "an impossible slot was drawn"
            assert is_close(draw.score[i, m], scores[i, slot], tolerance, size)
            assert torch.equal(draw.embedding[i, m], items["embedding"][slot])
            assert int(draw.id[i, m]) == int(items["id"][slot])
            assert float(draw.log_weight[i, m]) == float(items["log_weight"][slot])
    assert draw.embedding.dtype == items["embedding"].dtype
    assert draw.embedding.shape == (rows, samples, items["embedding"].shape[1])
    return draw


def cutoff_separates(sample: Sampler, state: TensorDictBase, queries: Tensor, top_k: int, **options: Any) -> None:
    """Exactly the `top_k` best scores are at or above the cutoff (-inf where no more than `top_k` are there)."""
    cutoff = sample(state, queries, top_k=top_k, **options).cutoff[:, 0].double()
    scores = exact_scores(state, queries, **options)
    for i in range(len(queries)):
        candidates = int((scores[i] > -math.inf).sum())
        assert int(((scores[i] > -math.inf) & (scores[i] >= cutoff[i])).sum()) == min(top_k, candidates)


def perturbed_values(
    sample: Sampler, state: TensorDictBase, queries: Tensor, *, steps: int = 40, **options: Any
) -> None:
    """`perturbed - log_normalizer` is a standard Gumbel, the law of a maximum (false alarm `oracles.FALSE_ALARM`)."""
    values = []
    for step in range(steps):
        draw = sample(at_step(state, step), queries, draws_per_query=64, **options)
        values.append((draw.perturbed - draw.log_normalizer[:, None]).flatten().double())
    assert stats.kstest(torch.cat(values).numpy(), "gumbel_r").pvalue > oracles.FALSE_ALARM


def merged_distribution(
    sample: Sampler,
    merge: Callable[[Any, Any], Any],
    states: list[TensorDictBase],
    queries: Tensor,
    *,
    steps: int = 5,
    **options: Any,
) -> None:
    """A merged draw is the draw of the union: chi-square over (source, slot), and its normaliser exact."""
    capacities = [len(state["items", "id"]) for state in states]
    start = np.cumsum([0, *capacities])
    seen = np.zeros((len(queries), start[-1]))
    scores = torch.cat([exact_scores(state, queries, **options) for state in states], 1)
    for step in range(steps):
        draw = sample(at_step(states[0], step), queries, draws_per_query=1000, **options)
        for state in states[1:]:
            draw = merge(draw, sample(at_step(state, step), queries, draws_per_query=1000, **options))
        assert is_close(draw.log_normalizer, oracles.log_normalizer(scores), 2e-5)
        assert draw.cutoff.shape == (len(queries), len(states))
        for i in range(len(queries)):
            valid = draw.slot[i] >= 0
            place = draw.slot[i][valid].numpy() + start[draw.source[i][valid].numpy()]
            seen[i] += np.bincount(place, minlength=start[-1])
    exact = oracles.probabilities(scores)
    for i in range(len(queries)):
        assert oracles.chi_square_pvalue(seen[i], exact[i]) > oracles.FALSE_ALARM
