"""Labels exclude what the ids of all documents of the label exclude."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import negcache_fn
from negcache_fn import FalseNegatives, Labels
from tests.support.builders import is_close, make_state, unit

NAMES = torch.tensor([-(2**63), -(2**40) - 7, -2, 0, 5, 2**40 - 7, 2**63 - 1])  # half of all hashes are negative
KINDS = [
    {"num_draws": 9},
    {"draws_per_query": 3},
    {"draws_per_query": 3, "top_k": 5},
    {"num_draws": 9, "top_k": 5},
    {"num_draws": 80},  # more than the smaller cache has
]


def problem(capacity: int, rows: int, documents: int, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor, Labels]:
    """A cache, queries, documents and labels, of which some are on one side only, or none."""
    generator = torch.Generator().manual_seed(capacity)
    some = torch.cat([NAMES, torch.tensor([-1])])
    labels = [some[torch.randint(0, 8, (n,), generator=generator)] for n in (rows, documents, capacity)]
    labels[0][0], labels[0][1], labels[2][0] = -1, 12345, 5
    state = make_state(
        unit(capacity, 6, 0, dtype), live=torch.arange(capacity) % 7 != 3, ids=torch.arange(capacity) + 100
    )
    return state, unit(rows, 6, 1, dtype), unit(documents, 6, 2, dtype), Labels(*labels)


def by_ids(labels: Labels, *, own: bool) -> Tensor:
    """`[B, P]` ids of everything that has the query's label: of slots from 100, of documents from 0."""
    listed = []
    for label in labels.queries.tolist():
        of_slots = [100 + j for j, other in enumerate(labels.cached.tolist()) if other == label != -1]
        of_documents = [j for j, other in enumerate(labels.documents.tolist()) if other == label != -1]
        listed.append(of_slots + (of_documents if own else []))
    width = max(map(len, listed))
    return torch.tensor([row + [-1] * (width - len(row)) for row in listed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("capacity", [70, 2500])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_labels_are_all_ids_of_the_label(kind: dict[str, int], capacity: int, dtype: torch.dtype) -> None:
    """The same draws, normalisers, losses and hardest negatives."""
    state, queries, own, labels = problem(capacity, 5, 8, dtype)
    known, listed = FalseNegatives(labels=labels), FalseNegatives(ids=by_ids(labels, own=True))
    draws = [
        negcache_fn.sample_gumbel(state, queries, scale=4.0, false_negatives=given, **kind) for given in (known, listed)
    ]
    assert torch.equal(draws[0].slot, draws[1].slot)
    assert is_close(draws[0].log_normalizer, draws[1].log_normalizer, 1e-6)
    label_of = torch.where(draws[0].slot >= 0, labels.cached[draws[0].slot.clamp(min=0)], -1)
    assert torch.equal(draws[0].label, label_of)
    fresh = draws[0].embedding.flatten(0, 1) + 0.1
    losses = [
        negcache_fn.loss(queries, own, fresh, draw, scale=4.0, ids=torch.arange(8), false_negatives=given)
        for draw, given in zip(draws, (known, listed), strict=True)
    ]
    assert is_close(losses[0], losses[1], 1e-6)
    exact = [
        negcache_fn.exact_loss(state, queries, own, scale=4.0, ids=torch.arange(8), false_negatives=given)
        for given in (known, listed)
    ]
    assert is_close(exact[0], exact[1], 1e-6)
    best = [negcache_fn.top_negatives(state, queries, 9, false_negatives=given) for given in (known, listed)]
    assert torch.equal(best[0][1], best[1][1])


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_the_labels_of_the_draw_and_of_the_batch_go_together(kind: dict[str, int]) -> None:
    """Without in-batch classes those of the draw are all there is; with them, one side's would be half of it."""
    state, queries, own, labels = problem(70, 5, 8, torch.float32)
    known = FalseNegatives(labels=labels)
    plain = negcache_fn.sample_gumbel(state, queries, **kind)
    drawn = negcache_fn.sample_gumbel(state, queries, false_negatives=known, **kind)
    fresh = drawn.embedding.flatten(0, 1)
    with pytest.raises(ValueError, match=r"false_negatives.labels is None and the draw has labels; expected those"):
        negcache_fn.loss(queries, own, fresh, drawn)
    with pytest.raises(ValueError, match=r"false_negatives.labels is given and the draw has none; expected them in"):
        negcache_fn.loss(queries, own, fresh, plain, false_negatives=known)
    found = negcache_fn.loss(queries, own, fresh, drawn, in_batch=False)
    exact = negcache_fn.exact_loss(state, queries, own, in_batch=False, false_negatives=known)
    assert is_close(found, exact, 1e-5)
    of_slots = FalseNegatives(labels=labels._replace(documents=None))  # which are no classes then
    again = negcache_fn.exact_loss(state, queries, own, in_batch=False, false_negatives=of_slots)
    assert torch.equal(again, exact)
    assert torch.equal(negcache_fn.sample_gumbel(state, queries, false_negatives=of_slots, **kind).slot, drawn.slot)


def test_a_positive_of_the_query_stays() -> None:
    """The documents of the query's label that are its positives are classes, the others not."""
    state = make_state(unit(3, 6, 0, torch.float64), live=[False] * 3)
    queries, own = unit(2, 6, 1, torch.float64), unit(4, 6, 2, torch.float64)
    labels = Labels(torch.tensor([7, 8]), torch.tensor([7, 8, 7, 7]), torch.tensor([7, 7, 7]))
    scores = queries @ own.T
    found = negcache_fn.exact_loss(state, queries, own, false_negatives=FalseNegatives(labels=labels), reduction="none")
    first = scores[0, [0, 1]].logsumexp(0) - scores[0, 0]
    second = scores[1].logsumexp(0) - scores[1, 1]
    assert is_close(found, torch.stack([first, second]), 1e-12)
