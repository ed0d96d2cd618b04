"""Derivatives of other kinds than `backward`: right, or refused by name before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint

import negcache_fn
from negcache_fn.nn import NegativeCacheLoss
from tests.support.builders import same_snapshot, snapshot, unit

# torch.func.jvp itself scripts its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
CAPACITY, DIM = 70, 4
IDS = torch.tensor([3, 90, 5, 91])
ALSO_POSITIVE = torch.tensor([[7, 8], [9, -1], [-1, -1], [3, 5]])


def filled() -> TensorDictBase:
    """70 slots with ids 0 ... 69, of which the last is empty, in float64; with log-weights."""
    state = negcache_fn.init_cache(CAPACITY, DIM, torch.zeros(1, 3), embedding_dtype=torch.float64)
    features, embeddings = unit(69, 3, 0), unit(69, DIM, 1, torch.float64)
    return negcache_fn.update(
        state, features, embeddings, ids=torch.arange(69), log_weights=torch.linspace(-1, 1, 69).double()
    )


def stale(state: TensorDictBase) -> TensorDictBase:
    """The same in float32, two updates later."""
    other = negcache_fn.init_cache(CAPACITY, DIM, torch.zeros(1, 3))
    for seed in (0, 1):
        other = negcache_fn.update(other, unit(30, 3, seed), unit(30, DIM, seed))
    return other


def dense(queries: Tensor, documents: Tensor, scale: Tensor, *, state: TensorDictBase, kind: str) -> Tensor:
    """The exact loss by plain torch alone: [B, C] scores, what is excluded set to -inf."""
    products = scale * queries @ state["items", "embedding"].T
    products = products.tanh() if kind == "transform" else products
    hardness = 1.5 if kind == "hardness" else 0.0
    products = products + hardness * (queries @ state["items", "embedding"].T).detach()
    scores = products + state["items", "log_weight"]
    batch = scale * queries @ documents.T
    batch = batch + hardness * (queries @ documents.T).detach() * (1 - torch.eye(4))
    batch = batch.tanh() if kind == "transform" else batch
    excluded = torch.zeros(scores.shape, dtype=torch.bool)
    excluded[:, 69:] = True
    if kind == "ids":
        excluded[:, [3, 5]] = True
        for row, ids in enumerate(ALSO_POSITIVE.tolist()):
            excluded[row, [number for number in ids if number >= 0]] = True
    scores = scores.masked_fill(excluded, -torch.inf)
    not_classes = torch.zeros(4, 4, dtype=torch.bool)
    if kind == "ids":
        not_classes[3, [0, 2]] = True
    if kind == "top_k":
        scores = scores.topk(5, dim=1).values
    logits = torch.cat([batch.masked_fill(not_classes, -torch.inf), scores], dim=1)
    return (logits.logsumexp(1) - batch.diagonal()).mean()


def exact(queries: Tensor, documents: Tensor, scale: Tensor, *, state: TensorDictBase, kind: str) -> Tensor:
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "transform": {"score_transform": torch.tanh},
        "ids": {"ids": IDS, "false_negatives": negcache_fn.FalseNegatives(ids=ALSO_POSITIVE)},
        "top_k": {"top_k": 5},
        "hardness": {"hardness": 1.5},
    }
    return negcache_fn.exact_loss(state, queries, documents, scale=scale, **options[kind])


@pytest.mark.parametrize("kind", ["plain", "transform", "ids", "top_k", "hardness"])
def test_exact_loss_has_every_derivative(kind: str) -> None:
    state = filled()
    at = (unit(4, DIM, 2, torch.float64), unit(4, DIM, 3, torch.float64), torch.tensor(3.0, dtype=torch.float64))
    along = (unit(4, DIM, 4, torch.float64), unit(4, DIM, 5, torch.float64), torch.tensor(0.7, dtype=torch.float64))
    found, expected = (
        lambda *primals, function=function: function(*primals, state=state, kind=kind) for function in (exact, dense)
    )
    torch.testing.assert_close(jvp(found, at, along), jvp(expected, at, along))
    for argnum in range(3):
        torch.testing.assert_close(grad(found, argnum)(*at), grad(expected, argnum)(*at))
    torch.testing.assert_close(hessian(found, (0, 2))(*at), hessian(expected, (0, 2))(*at))
    with forward_ad.dual_level():
        dual = found(forward_ad.make_dual(at[0], along[0]), *at[1:])
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, jvp(lambda queries: expected(queries, *at[1:]), at[:1], along[:1])[1])
    several = torch.stack([at[0], along[0]])
    torch.testing.assert_close(
        vmap(lambda queries: found(queries, *at[1:]))(several),
        torch.stack([expected(queries, *at[1:]) for queries in several]),
    )


@pytest.mark.no_cover
def test_exact_loss_compiled_in_forward_mode() -> None:
    state, queries, documents = filled(), unit(4, DIM, 2, torch.float64), unit(4, DIM, 3, torch.float64)
    scale = torch.tensor(3.0, dtype=torch.float64)

    def tangent(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        return jvp(lambda q: function(q, documents, scale, state=state, kind="plain"), (queries,), (documents,))

    compiled = torch.compile(tangent, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(exact), tangent(dense))


def test_twice_through_the_pass_is_refused() -> None:
    queries = unit(4, DIM, 2, torch.float64).requires_grad_()
    loss = negcache_fn.exact_loss(filled(), queries, queries.detach())
    (gradient,) = torch.autograd.grad(loss, queries, create_graph=True)
    with pytest.raises(NotImplementedError, match="log-sum-exp of the cache is differentiable once"):
        torch.autograd.grad(gradient.sum(), queries)


def stepped(name: str, encode: Any, **options: Any) -> tuple[TensorDictBase, Callable[[Tensor], Tensor]]:
    """A state, and the loss of a step of it as a function of the queries."""
    state, features = stale(filled()), unit(4, 3, 0)

    def loss(queries: Tensor) -> Tensor:
        out = getattr(negcache_fn, name)(
            state, queries, features, encode, scale=3.0, options=negcache_fn.StepOptions(**options)
        )
        return out.loss

    return state, loss


@pytest.mark.parametrize("options", [{}, {"draws_per_query": 2}])
@pytest.mark.parametrize("name", ["step", "step_"])
def test_a_step_is_refused_by_name(name: str, options: dict[str, Any]) -> None:
    state, loss = stepped(name, torch.nn.Linear(3, DIM), **options)
    queries, before = unit(4, DIM, 2), snapshot(state)
    with pytest.raises(ValueError, match=r"step is called under forward-mode .*torch\.func\.jvp.*expected plain"):
        jvp(loss, (queries,), (queries,))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="step is called under forward-mode"):
        loss(forward_ad.make_dual(queries, queries))
    with pytest.raises(ValueError, match=r"step is called under torch\.func\.vmap"):
        vmap(loss)(torch.stack([queries, queries]))
    if not options:
        with pytest.raises(ValueError, match=r"step is called under torch\.func\.grad"):
            grad(loss)(queries)
    assert same_snapshot(before, snapshot(state))


def test_forward_mode_of_the_encoder_alone_is_refused() -> None:
    encoder = torch.nn.Linear(3, DIM)
    parameters = dict(encoder.named_parameters())

    def loss(changed: dict[str, Tensor]) -> Tensor:
        _, of_queries = stepped("step", lambda rows: functional_call(encoder, changed, (rows,)))
        return of_queries(unit(4, DIM, 2))

    with pytest.raises(ValueError, match="step is called under forward-mode"):
        jvp(loss, (parameters,), (parameters,))
    # Reverse mode is right: nothing of the pass over the cache depends on the encoder.
    found = grad(loss)(parameters)
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for gradient, right in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(gradient, right)


def test_reverse_mode_of_a_step_that_draws_for_each_query() -> None:
    _, loss = stepped("step", torch.nn.Linear(3, DIM), draws_per_query=2)
    queries = unit(4, DIM, 2).requires_grad_()
    torch.testing.assert_close(grad(loss)(queries), torch.autograd.grad(loss(queries), queries)[0])


def test_the_loss_is_refused_in_forward_mode() -> None:
    state, queries = stale(filled()), unit(4, DIM, 2)
    draw = negcache_fn.sample_gumbel(state, queries, draws_per_query=2)
    with pytest.raises(ValueError, match="loss is called under forward-mode"):
        jvp(lambda rows: negcache_fn.loss(rows, queries, draw.embedding.flatten(0, 1), draw), (queries,), (queries,))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"draws_per_query": 2}])
def test_a_checkpointed_step_has_the_same_gradient(options: dict[str, Any], reentrant: bool) -> None:
    encoder = torch.nn.Linear(3, DIM)
    _, loss = stepped("step", encoder, **options)
    gradients = []
    for function in (loss, lambda rows: checkpoint(loss, rows, use_reentrant=reentrant)):
        queries = unit(4, DIM, 2).requires_grad_()
        function(queries).backward()
        gradients.append((queries.grad, *(parameter.grad for parameter in encoder.parameters())))
        encoder.zero_grad()
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


def test_a_checkpointed_step_in_place_is_refused() -> None:
    """Else it draws anew, from the cache that it has written, and writes once more."""
    state, loss = stepped("step_", torch.nn.Linear(3, DIM))
    queries, before = unit(4, DIM, 2).requires_grad_(), snapshot(state)
    with pytest.raises(ValueError, match=r"step_ is called under torch\.utils\.checkpoint.*chunked"):
        checkpoint(loss, queries, use_reentrant=False)
    criterion = NegativeCacheLoss(state)
    with pytest.raises(ValueError, match=r"step_ is called under torch\.utils\.checkpoint"):
        checkpoint(criterion, queries, unit(4, 3, 0), torch.nn.Linear(3, DIM), use_reentrant=False)
    assert same_snapshot(before, snapshot(state))
    # An encoder that is checkpointed is another matter.
    criterion(queries, unit(4, 3, 0), negcache_fn.chunked(torch.nn.Linear(3, DIM), 2)).backward()


def test_a_checkpointed_step_of_a_state_replaced_inside_is_refused() -> None:
    state = stale(filled())

    def loss(queries: Tensor) -> Tensor:
        nonlocal state
        out = negcache_fn.step(state, queries, unit(4, 3, 0), torch.nn.Linear(3, DIM))
        state = out.state
        return out.loss

    result = checkpoint(loss, unit(4, DIM, 2).requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="again from a state of step 3; expected that of step 2"):
        result.backward()


def test_saved_tensors_may_move() -> None:
    """Hooks for saved tensors are no recomputation; and a loss may be written in place."""
    _, loss = stepped("step_", torch.nn.Linear(3, DIM))
    queries = unit(4, DIM, 2).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        result = loss(queries)
    result /= 4
    result.backward()
    assert queries.grad is not None
