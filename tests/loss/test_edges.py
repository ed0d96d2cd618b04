"""The loss at its edges: documents exactly at a limit or a cutoff, draws that do not exist, weights of any size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import negcache_fn
from negcache_fn import FalseNegatives
from negcache_fn._loss.cache_class import estimate_cache_logit, gather_draws, inverse_inclusion
from negcache_fn._ranks.group import ALONE
from negcache_fn._scores.definition import Similarity
from tests.support import oracles
from tests.support.builders import is_close, make_state, unit

sample, loss = negcache_fn.sample_gumbel, negcache_fn.loss
# Scores are small integers, which every dtype adds up exactly.
EMBEDDING = [[3.0, 1.0], [2.0, 2.0], [2.0, -1.0], [2.0, 0.0], [1.0, 3.0], [-1.0, 1.0], [0.0, 2.0]]
QUERIES = [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
LIMIT = [2.0, 4.0, 1.0]  # each is the score of some documents, of the cache and of the batch
TRANSFORMS = [None, torch.nn.functional.relu]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_inclusion_of_any_mass(dtype: torch.dtype) -> None:
    """`1 / (1 - exp(-exp(x)))` with full relative precision, from documents hardly ever drawn to those always drawn."""
    most = 80.0 if dtype == torch.float32 else 600.0
    above = torch.cat([torch.linspace(-most, 30.0, 1500, dtype=dtype), torch.linspace(-45, 5, 1001, dtype=dtype)])
    given = inverse_inclusion(above + 2.0, torch.tensor([2.0], dtype=dtype))
    right = [-1 / math.expm1(-math.exp(x)) for x in ((above + 2.0).double() - 2.0).tolist()]
    error = (given.double() / torch.tensor(right, dtype=torch.float64) - 1).abs().max()
    assert float(error) < (1e-12 if dtype == torch.float64 else 3e-5)
    assert bool((inverse_inclusion(above, torch.tensor([-math.inf], dtype=dtype)) == 1).all())


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_documents_at_the_limit_are_negatives(dtype: torch.dtype, transform: Any) -> None:
    """Those of a higher score alone are excluded, from the batch and from the cache."""
    embedding, queries = torch.tensor(EMBEDDING, dtype=dtype), torch.tensor(QUERIES, dtype=dtype)
    documents = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 1.0], [3.0, 1.0], [4.0, 1.0]], dtype=dtype)
    known = FalseNegatives(max_score=torch.tensor(LIMIT, dtype=dtype))
    given = negcache_fn.exact_loss(
        make_state(embedding), queries, documents, score_transform=transform, false_negatives=known, reduction="none"
    )
    scores = oracles.cache_scores(queries, embedding, transform=transform, max_score=LIMIT)
    logits = oracles.log_normalizer(scores)
    expected = oracles.cross_entropy(queries, documents, logits, transform=transform, max_score=LIMIT)
    assert is_close(given, expected, 1e-6)
    draw = sample(make_state(embedding), queries, num_draws=2, score_transform=transform, false_negatives=known)
    assert is_close(draw.log_normalizer, logits, 1e-6)


def test_a_limit_by_the_positive_goes_without_log_weights() -> None:
    """A positive of large log-weight excludes no more and no fewer documents, in the batch and in the cache."""
    embedding, queries = torch.tensor(EMBEDDING), torch.tensor(QUERIES)
    documents = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    weights = torch.tensor([5.0, -5.0, 3.0, 0.5])
    known = FalseNegatives(max_score=lambda positive: positive + 0.5)
    given = negcache_fn.exact_loss(
        make_state(embedding), queries, documents, log_weights=weights, false_negatives=known, reduction="none"
    )
    limit = ((queries * documents[:3]).sum(1) + 0.5).tolist()
    logits = oracles.log_normalizer(oracles.cache_scores(queries, embedding, max_score=limit))
    expected = oracles.cross_entropy(queries, documents, logits, log_weights=weights, max_score=limit)
    assert is_close(given, expected, 1e-6)


@pytest.mark.parametrize("options", [{"num_draws": 7}, {"num_draws": 3}, {"draws_per_query": 4}], ids=str)
def test_draws_at_the_limit_are_used(options: dict[str, int]) -> None:
    """Also by queries that have not drawn them."""
    embedding, queries = torch.tensor(EMBEDDING).double(), torch.tensor(QUERIES).double()
    documents = unit(3, 2, 3, torch.float64)
    known = FalseNegatives(max_score=torch.tensor(LIMIT))
    state = make_state(embedding)
    draw = sample(state, queries, false_negatives=known, **options)
    slots = draw.slot.flatten().tolist()
    fresh_vectors = embedding + 0.4 * unit(7, 2, 4, torch.float64)
    given = loss(queries, documents, fresh_vectors[slots], draw, false_negatives=known, reduction="none")
    stale = oracles.cache_scores(queries, embedding, max_score=LIMIT)
    fresh = torch.where(stale > -math.inf, queries @ fresh_vectors.T, -math.inf)
    normalizer = oracles.log_normalizer(stale)
    if draw.for_batch:
        logits = oracles.logits_of_batch_draws(
            fresh[:, slots],
            stale[:, slots],
            normalizer,
            draw.score[0].tolist(),
            draw.threshold.item(),
            staleness_correction="self_normalized",
        )
    else:
        probability = torch.from_numpy(oracles.probabilities(stale))[:, slots]
        how: dict[str, Any] = {"share_draws": True, "staleness_correction": "self_normalized"}
        logits = oracles.sampled_cache_logits(fresh[:, slots], stale[:, slots], probability, normalizer, 4, **how)
    at_limit = (stale == torch.tensor(LIMIT)[:, None])[:, slots]
    assert bool(at_limit.any(1).all()), "the draws show nothing"
    assert is_close(given, oracles.cross_entropy(queries, documents, logits, max_score=LIMIT), 1e-6)


def test_draws_that_tie_at_the_cutoff_are_used() -> None:
    """Of scores 3 2 2 2 1 the three best are drawn: all of them count."""
    embedding, fresh = torch.tensor([[3.0], [2.0], [2.0], [2.0], [1.0]]).double(), torch.tensor([2.5, 2.2, 1.9])
    queries, documents = torch.ones(1, 1).double(), torch.tensor([[1.5]]).double()
    for extra in (0, 2):
        draw = sample(make_state(embedding), queries, num_draws=3 + extra, top_k=3)
        drawn = draw.slot[0].tolist()
        assert sorted(drawn[:3]) == [0, 1, 2] and drawn[3:] == [-1] * extra
        negatives = torch.tensor([fresh[slot] if slot >= 0 else 9.0 for slot in drawn]).double()[:, None]
        expected = torch.cat([torch.tensor([1.5]), fresh]).double().logsumexp(0) - 1.5
        assert is_close(loss(queries, documents, negatives, draw), expected, 1e-6)


@pytest.mark.parametrize("correction", ["none", "self_normalized"])
@pytest.mark.parametrize("limit", ["cutoff", "max_score"])
def test_own_draws_are_used_whatever_rounding_says(limit: str, correction: str) -> None:
    """A score computed again may fall on the other side of a limit; it was drawn all the same."""
    state, queries, documents = make_state(unit(9, 4, 0)), unit(1, 4, 1).requires_grad_(), unit(1, 4, 2)
    draw = sample(state, queries, draws_per_query=5, scale=4.0)
    sign = 1.0 if limit == "cutoff" else -1.0
    beyond = (draw.score.amax() if limit == "cutoff" else draw.score.amin()) + sign * 1e-6
    fresh = (draw.embedding.flatten(0, 1) + 0.2).requires_grad_()
    found = []
    for given in (draw, draw._replace(**{limit: beyond.view(1, 1)})):
        value = loss(queries, documents, fresh, given, scale=4.0, staleness_correction=correction)
        found.append([value, *torch.autograd.grad(value, [queries, fresh])])
        options = negcache_fn.StepOptions(draws_per_query=5, staleness_correction=correction)
        similarity = Similarity.of(options, 4.0, torch.float32)
        shared = gather_draws(fresh, given, ALONE)
        assert not bool(estimate_cache_logit(similarity, queries, fresh, given, shared, options).masked.any())
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert bool(found[1][2].any())


@pytest.mark.parametrize("correction", ["none", "self_normalized"])
@pytest.mark.parametrize("share_draws", [True, False])
@pytest.mark.parametrize("options", [{"num_draws": 4}, {"draws_per_query": 2}], ids=str)
def test_what_is_encoded_in_place_of_a_draw_has_no_part(
    options: dict[str, int], share_draws: bool, correction: str
) -> None:
    """NaN there: the loss and every gradient are those without."""
    if "num_draws" in options and not share_draws:
        return
    state, queries, documents = make_state(unit(3, 4, 0), ids=[1, 2, 3]), unit(2, 4, 1).requires_grad_(), unit(2, 4, 2)
    draw = sample(state, queries, exclude_ids=torch.tensor([[1, 2, 3], [2, 2, 2]]), **options)
    missing = (draw.slot < 0).flatten()
    assert 0 < int(missing.sum()) < len(missing)
    found = []
    for value in (0.0, math.nan):
        fresh = torch.where(missing[:, None], value, draw.embedding.flatten(0, 1) + 0.3).requires_grad_()
        how: dict[str, Any] = {"share_draws": share_draws, "staleness_correction": correction, "reduction": "none"}
        given = loss(queries, documents, fresh, draw, **how)
        found.append([given, *torch.autograd.grad(given.sum(), [queries, fresh], retain_graph=True)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert not bool(found[0][2][missing].any()) and bool(found[0][2][~missing].any())


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("places", [(0, 0), (1, 0), (0, 1)], ids=str)
@pytest.mark.parametrize("options", [{"num_draws": 1}, {"draws_per_query": 2}], ids=str)
def test_merged_draws_are_told_apart_by_their_cache(
    options: dict[str, int], places: tuple[int, int], in_batch: bool
) -> None:
    """One document in each of two caches, each for one query: what a query drew itself is not the other's."""
    embeddings, queries = [unit(2, 4, n, torch.float64) for n in (1, 2)], unit(2, 4, 3, torch.float64)
    documents = unit(2, 4, 4, torch.float64)
    parts = []
    for n, (embedding, place) in enumerate(zip(embeddings, places, strict=True)):
        known = FalseNegatives(max_score=torch.where(torch.arange(2) == n, math.inf, -math.inf))
        state = make_state(embedding, live=torch.arange(2) == place, seed=n)
        parts.append(sample(state, queries, false_negatives=known, scale=3.0, **options))
    draw = negcache_fn.merge_draws(*parts)
    if draw.for_batch:  # both documents, drawn with certainty
        names = ("slot", "score", "perturbed", "embedding", "id", "log_weight")
        both = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in names}
        draw = draw._replace(**both, source=torch.tensor([[0, 1]]), threshold=torch.full((1, 1), -math.inf).double())
    source = draw.source.flatten()
    drift = 0.3 * unit(2, 4, 5, torch.float64)
    given = loss(
        queries,
        documents,
        draw.embedding.flatten(0, 1) + drift[source],
        draw,
        scale=3.0,
        in_batch=in_batch,
        reduction="none",
    )
    for i, place in enumerate(places):
        cached = embeddings[i][place] + drift[i]
        logits = [3.0 * queries[i] @ documents[j] for j in ([i, 1 - i] if in_batch else [i])]
        expected = torch.stack([*logits, 3.0 * queries[i] @ cached]).logsumexp(0) - logits[0]
        assert is_close(given[i], expected, 1e-9)


def test_values_of_own_draws_from_log_weights() -> None:
    """Drift of the score alone counts: the same log-weight is in the fresh and in the stale one."""
    weights: Tensor = torch.tensor([0.5, -2.0, 3.0])
    state, queries = make_state(unit(3, 4, 0), log_weight=weights), unit(2, 4, 1)
    draw = sample(state, queries, draws_per_query=6)
    for share_draws in (True, False):
        given = loss(queries, unit(2, 4, 2), draw.embedding.flatten(0, 1), draw, share_draws=share_draws)
        expected = negcache_fn.exact_loss(state, queries, unit(2, 4, 2))
        assert is_close(given, expected, 1e-6)


def test_a_document_that_the_query_drew_stays_its_negative() -> None:
    """Even if its score, made again with other rounding, is just above the limit; for other queries it is none then."""
    embedding, queries = torch.tensor(EMBEDDING).double(), torch.tensor(QUERIES).double()
    draw = sample(make_state(embedding), queries, draws_per_query=2)
    drawn = draw.slot.flatten()
    scores = queries @ embedding[drawn].T
    limit = scores.gather(1, torch.tensor([[0, 1], [2, 3], [4, 5]])).amin(1, keepdim=True) - 1e-9
    draw = draw._replace(max_score=limit)
    options = negcache_fn.StepOptions(draws_per_query=2)
    shared = gather_draws(embedding[drawn], draw, ALONE)
    similarity = Similarity(torch.float64, 1.0, None)
    found = estimate_cache_logit(similarity, queries, embedding[drawn], draw, shared, options)
    own = (drawn[None, None, :] == draw.slot[:, :, None]).any(1)
    assert torch.equal(found.masked, (scores > limit) & ~own)
    assert bool(found.masked.any())
    assert bool((found.log_probability[own] > -math.inf).all())
    assert bool((found.log_probability[found.masked] == -math.inf).all())
