"""Several positives of a query, none, and positives without their log-weight, against plain softmax in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import negcache_fn
from negcache_fn._loss.batch_classes import targets_among
from negcache_fn._ranks.group import Ranks
from tests.support.builders import assert_same_state, is_close, make_state, unit
from tests.support.checks.steps import Tower, documents, warm
from tests.support.options import step_keywords

DRAWS = [{"num_draws": 4}, {"draws_per_query": 2}, {"draws_per_query": 2, "share_draws": False}]
of_each_kind = pytest.mark.parametrize("draws", DRAWS, ids=str)


def decoupled(scores: Tensor, is_positive: Tensor) -> Tensor:
    """The mean over queries of `mean_p -log(exp(s_p) / (exp(s_p) + sum over all that are no positives of exp(s)))`."""
    losses = []
    for row, positive in zip(scores, is_positive, strict=True):
        negatives = row[~positive].exp().sum()
        losses.append(torch.stack([-(s.exp() / (s.exp() + negatives)).log() for s in row[positive]]).mean())
    return torch.stack(losses).mean()


def test_the_decoupled_softmax() -> None:
    """Of a multi-label problem whose documents are in the batch or in the cache, with a gradient to both towers."""
    generator = torch.Generator().manual_seed(2)
    queries, own = unit(4, 6, 1, torch.float64).requires_grad_(), unit(10, 6, 2, torch.float64).requires_grad_()
    cached = unit(9, 6, 3, torch.float64)
    is_positive = torch.rand(4, 10, generator=generator) < 0.3
    is_positive[:, 5] |= ~is_positive.any(1)
    rows = torch.where(is_positive, torch.arange(10), -1)
    found = negcache_fn.exact_loss(make_state(cached), queries, own, scale=3.0, positive_rows=rows)
    scores = 3.0 * queries @ torch.cat([own, cached]).T
    expected = decoupled(scores, torch.cat([is_positive, torch.zeros(4, 9, dtype=torch.bool)], 1))
    assert is_close(found, expected, 1e-12)
    for one, other in zip(
        torch.autograd.grad(found, [queries, own]), torch.autograd.grad(expected, [queries, own]), strict=True
    ):
        assert is_close(one, other, 1e-12)


def test_its_own_row_is_the_default() -> None:
    """In every way of asking for it."""
    state, queries, own = make_state(unit(9, 6, 3)), unit(4, 6, 1), unit(5, 6, 2)
    weights = torch.linspace(-1, 1, 5)
    plain = negcache_fn.exact_loss(state, queries, own, scale=3.0, log_weights=weights)
    for rows in (torch.arange(4)[:, None], torch.tensor([[0, -1], [-1, 1], [2, 2], [-1, 3]])):
        found = negcache_fn.exact_loss(state, queries, own, scale=3.0, log_weights=weights, positive_rows=rows)
        assert is_close(found, plain, 1e-6)


def test_a_positive_is_no_negative_in_the_cache() -> None:
    """All positives of the query are excluded by id, with and without in-batch classes."""
    cached, queries, own = unit(5, 6, 3, torch.float64), unit(2, 6, 1, torch.float64), unit(4, 6, 2, torch.float64)
    state = make_state(cached, ids=[10, 11, 12, 13, 14])
    rows, ids = torch.tensor([[0, 2], [3, -1]]), torch.tensor([11, 12, 13, 14])
    found = negcache_fn.exact_loss(
        state, queries, own, ids=ids, in_batch=False, positive_rows=rows, reduction="none", scale=2.0
    )
    of_own, of_cached = 2.0 * queries @ own.T, 2.0 * queries @ cached.T
    first = [torch.stack([of_own[0, p], *of_cached[0, [0, 2, 4]]]).logsumexp(0) - of_own[0, p] for p in (0, 2)]
    second = torch.stack([of_own[1, 3], *of_cached[1, [0, 1, 2, 3]]]).logsumexp(0) - of_own[1, 3]
    assert is_close(found, torch.stack([sum(first) / 2, second]), 1e-12)


@of_each_kind
@pytest.mark.parametrize("in_batch", [True, False])
def test_a_masked_row_is_not_there(draws: dict[str, Any], in_batch: bool) -> None:
    """Whatever is in it: loss, gradients and metrics of a step are those of the other rows alone.

    Of draws for each query, those of the masked one are drawn, too: with all documents drawn it makes no difference.
    """
    tower, batch = Tower(), documents(5, 1)
    state = warm(tower, 5, ids=True)
    asked = unit(4, 6, 7)
    if "draws_per_query" in draws:
        draws = draws | {"draws_per_query": 1, "top_k": 1}
    results = []
    for masked in (True, False):
        queries = asked.clone()
        queries[1] = math.nan if masked else 0.0
        queries = (queries if masked else queries[[0, 2, 3]]).requires_grad_()
        rows = torch.tensor([[0], [-1], [2], [3]])
        rows = rows if masked else rows[[0, 2, 3]]
        out = negcache_fn.step(
            state,
            queries,
            batch,
            tower,
            scale=8.0,
            ids=torch.arange(5) + 90,
            positive_rows=rows,
            **step_keywords(**draws, in_batch=in_batch),
        )
        gradients = torch.autograd.grad(out.loss, [queries, *tower.parameters()])
        if masked:
            assert not bool(gradients[0][1].any())
            gradients = (gradients[0][[0, 2, 3]], *gradients[1:])
        results.append((out.loss, *gradients, *(out.metrics[name] for name in ("exact_loss", "cache_share"))))
    if draws.get("share_draws", "num_draws" in draws):
        for one, other in zip(*results, strict=True):
            assert is_close(one, other, 1e-5)
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        assert is_close(one, other, 1e-5)


@of_each_kind
@pytest.mark.parametrize("in_batch", [True, False])
def test_all_rows_masked(draws: dict[str, Any], in_batch: bool) -> None:
    """Loss 0 and gradients 0, finite metrics, and the documents come in."""
    tower, batch = Tower(), documents(5, 1)
    state = warm(tower, 9, ids=True)
    queries = torch.full((3, 6), math.nan, requires_grad=True)
    out = negcache_fn.step(
        state, queries, batch, tower, positive_rows=torch.full((3, 2), -1), **step_keywords(**draws, in_batch=in_batch)
    )
    assert float(out.loss.detach()) == 0.0
    for gradient in torch.autograd.grad(out.loss, [queries, *tower.parameters()], allow_unused=True):
        assert gradient is None or not bool(gradient.any())
    assert all(bool(value.isfinite()) for value in out.metrics.values())
    assert int((out.state["items", "inserted_at"] == state["step"]).sum()) == 5
    if out.draw.for_batch:
        assert bool((out.draw.slot == -1).all())  # nobody needs a draw


@of_each_kind
def test_padding_is_no_class(draws: dict[str, Any]) -> None:
    """A document of log-weight -inf that is not to be cached is as if it were not in the batch."""
    tower, batch = Tower(), documents(5, 1)
    state = warm(tower, 9, ids=True)
    valid = torch.tensor([True, False, True, True, True])
    few = {"words": batch["words"][valid], "extra": {"price": batch["extra"]["price"][valid]}}
    queries = unit(3, 6, 7)
    out = negcache_fn.step(
        state,
        queries,
        batch,
        tower,
        scale=5.0,
        positive_rows=torch.tensor([[0], [-1], [2]]),
        log_weights=torch.where(valid, 0.0, -math.inf),
        cacheable=valid,
        **step_keywords(**draws),
    )
    expected = negcache_fn.step(
        state, queries[[0, 2]], few, tower, scale=5.0, positive_rows=torch.tensor([[0], [1]]), **step_keywords(**draws)
    )
    assert is_close(out.metrics["exact_loss"], expected.metrics["exact_loss"], 1e-5)
    assert bool(out.loss.isfinite())
    for gradient in torch.autograd.grad(out.loss, list(tower.parameters())):
        assert bool(gradient.isfinite().all())
    if "num_draws" in draws:  # other queries draw other documents
        assert is_close(out.loss, expected.loss, 1e-5)
        assert_same_state(out.state, expected.state)


@of_each_kind
def test_encoded_in_chunks(draws: dict[str, Any]) -> None:
    """The same loss and gradients."""
    state = warm(Tower(), 9, ids=True)
    results = []
    for wrap in (lambda encode: encode, lambda encode: negcache_fn.chunked(encode, 2)):
        tower, queries = Tower(), unit(3, 6, 7).requires_grad_()
        out = negcache_fn.step(
            state,
            queries,
            documents(5, 1),
            wrap(tower),
            scale=5.0,
            positive_rows=torch.tensor([[0, 4], [-1, -1], [2, 3]]),
            **step_keywords(**draws, weigh_positives=False),
        )
        results.append((out.loss, *torch.autograd.grad(out.loss, [queries, *tower.parameters()])))
    for one, other in zip(*results, strict=True):
        assert is_close(one, other, 1e-5)


def test_a_row_outside_the_batch_is_an_error() -> None:
    state, tower = warm(Tower(), 9), Tower()
    before = state.clone()
    with pytest.raises(ValueError, match="positive_rows has the row 3; expected rows below 3, -1 for none"):
        negcache_fn.step_(state, unit(2, 6, 0), documents(3, 1), tower, positive_rows=torch.tensor([[0], [3]]))
    assert_same_state(before, state)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("empty", [True, False])
def test_derivatives_of_every_kind(empty: bool, in_batch: bool) -> None:
    """Forward mode and the second order, also of a query that has no positive, or no negative."""
    state = make_state(unit(9, 6, 3, torch.float64), live=[not empty] * 9)
    queries, own, tangent = (unit(rows, 6, rows, torch.float64) for rows in (3, 5, 3))
    rows = torch.tensor([[0, 3], [-1, -1], [2, -1]])

    def value(queries: Tensor) -> Tensor:
        return negcache_fn.exact_loss(state, queries, own, scale=3.0, positive_rows=rows, in_batch=in_batch)

    asked = queries.clone().requires_grad_()
    gradient = torch.autograd.grad(value(asked), asked)[0]
    assert is_close(torch.func.jvp(value, (queries,), (tangent,))[1], (gradient * tangent).sum(), 1e-12)
    step = 1e-5
    shifted = [torch.func.grad(value)(queries + sign * step * tangent) for sign in (1, -1)]
    along = torch.einsum("ijkl,kl->ij", torch.func.hessian(value)(queries), tangent)
    assert is_close(along, (shifted[0] - shifted[1]) / (2 * step), 1e-8)


@pytest.mark.parametrize("draws", [{}, {"draws_per_query": 2}], ids=str)
def test_the_positive_is_not_sampled(draws: dict[str, Any]) -> None:
    """Only negatives have log-weights, also in draws: the loss of a step is that of the formula, nothing being stale.

    Even of a frequent positive, of log-weight -12, whose loss is otherwise far beyond what float32 can tell.
    """
    own, cached = unit(4, 6, 1, torch.float64), unit(7, 6, 2, torch.float64)
    weights = torch.tensor([12.0, 2.0, -1.0, 3.0])
    of_cache = torch.linspace(-2, 2, 7)
    state = make_state(cached.float(), log_weight=of_cache, features={"x": cached.float()})
    features = {"x": own.float()}
    queries = unit(3, 6, 0).requires_grad_()
    out = negcache_fn.step(
        state,
        queries,
        features,
        lambda batch: batch["x"],
        scale=4.0,
        log_weights=weights,
        **step_keywords(weigh_positives=False, reduction="none", **draws),
    )
    twin = queries.detach().double().requires_grad_()
    in_batch = 4.0 * twin @ own.T + weights.double() * (1 - torch.eye(3, 4, dtype=torch.float64))
    logits = torch.cat([in_batch, 4.0 * twin @ cached.T + of_cache.double()], 1)
    expected = cross_entropy(logits, torch.arange(3), reduction="none")
    assert is_close(out.loss, expected, 2e-6)
    if not draws:
        (gradient,), (right,) = torch.autograd.grad(out.loss.sum(), queries), torch.autograd.grad(expected.sum(), twin)
        assert is_close(gradient, right, 1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_among_the_documents_of_all_ranks(rank: int) -> None:
    """Two queries and a further document on each of two ranks; a row that this rank does not have is nobody's."""
    ranks = Ranks("both", rank, 2, {})
    found = targets_among(torch.tensor([[0, 1, 2], [3, 4, -1]]), 2, 3, ranks)
    assert found is not None
    assert found.tolist() == [[2 * rank, 2 * rank + 1, 4 + rank], [6, 6, -1]]
