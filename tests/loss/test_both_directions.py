"""A cache on each side and a symmetric loss: its expected gradient is that of the exact symmetric softmax."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import negcache_fn
from negcache_fn import distributed
from tests.support import oracles
from tests.support.builders import at_step, is_close, make_state, relative_error
from tests.support.processes import run_ranks

SCALE, PAIRS = 2.0, 2


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Sides:
    """Two towers, a batch of pairs, and a cache of each side whose embeddings are fresh."""

    def __init__(self, capacity: int = 3) -> None:
        self.weights = [normal(3, 2, seed=1).requires_grad_(), normal(3, 2, seed=2).requires_grad_()]
        self.batch = [normal(PAIRS, 3, seed=3), normal(PAIRS, 3, seed=4)]
        self.cached = [normal(capacity, 3, seed=5), normal(capacity, 3, seed=6)]
        self.ids = torch.tensor([0, 7])
        names = torch.tensor([[9, 7, -1], [7, 8, 0]])[:, :capacity]
        self.names = names if capacity == 3 else torch.full((2, capacity), -1)
        self.states: list[TensorDictBase] = [
            make_state(self.encoder(n)(self.cached[n]).detach(), ids=self.names[n], features=self.cached[n], seed=n)
            for n in range(2)
        ]

    def encoder(self, side: int) -> Callable[[Any], Tensor]:
        return lambda features: torch.tanh(features @ self.weights[side])


def symmetric(sides: Sides, states: list[TensorDictBase], **options: Any) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The recipe: a loss in each direction, and what each cache gets back."""
    embeddings = [sides.encoder(n)(sides.batch[n]) for n in range(2)]
    losses, refreshed = [], []
    for n in range(2):
        queries, documents = embeddings[1 - n], embeddings[n]
        shared: dict[str, Any] = {"scale": SCALE, "group": options.get("group")}
        draw = negcache_fn.sample_gumbel(
            states[n], queries, exclude_ids=sides.ids, draws_per_query=options.get("draws_per_query", 2), **shared
        )
        slots = draw.slot.flatten()
        negatives = sides.encoder(n)(negcache_fn.take(states[n], slots, group=shared["group"]))
        in_batch = "global" if shared["group"] is not None else True
        chosen = {"staleness_correction": options.get("correction", "none"), "in_batch": in_batch}
        losses.append(negcache_fn.loss(queries, documents, negatives, draw, ids=sides.ids, **chosen, **shared))
        refreshed.append((slots, negatives))
    return (losses[0] + losses[1]) / 2, refreshed


def exact(sides: Sides) -> Tensor:
    """Materialised, everything fresh and with gradient."""
    embeddings = [sides.encoder(n)(sides.batch[n]) for n in range(2)]
    total = torch.zeros((), dtype=torch.float64)
    for n in range(2):
        scores = oracles.cache_scores(
            embeddings[1 - n],
            sides.encoder(n)(sides.cached[n]),
            ids=sides.names[n].tolist(),
            exclude=[sides.ids.tolist()] * PAIRS,
            scale=SCALE,
        )
        logits = oracles.log_normalizer(scores)
        losses = oracles.cross_entropy(
            embeddings[1 - n], embeddings[n], logits, ids=sides.ids.tolist(), in_batch=True, scale=SCALE
        )
        total = total + losses.mean() / 2
    return total


def test_gradient_is_that_of_the_exact_symmetric_softmax() -> None:
    """Value exact for every draw; the mean gradient over 100 steps within 5.5 standard errors, for both towers.

    A false alarm in one of the 12 numbers has probability 4e-6 (Student's t).
    """
    sides = Sides()
    expected = exact(sides)
    right = torch.cat([g.flatten() for g in torch.autograd.grad(expected, sides.weights)])
    assert float(right.norm()) > 0.1
    gradients = []
    for step in range(100):
        value, _ = symmetric(sides, [at_step(state, step) for state in sides.states], draws_per_query=60)
        assert relative_error(value, expected) < 1e-12
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, sides.weights)]))
    found = torch.stack(gradients)
    standard_error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - right).abs() < 5.5 * standard_error + 1e-12).all())


def test_one_direction_alone_is_found_out() -> None:
    """The check above bites: a loss in one direction has another gradient, by many standard errors."""
    sides = Sides()
    right = torch.cat([g.flatten() for g in torch.autograd.grad(exact(sides), sides.weights)])
    embeddings = [sides.encoder(n)(sides.batch[n]) for n in range(2)]
    alone = negcache_fn.exact_loss(sides.states[0], embeddings[1], embeddings[0], ids=sides.ids, scale=SCALE)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(alone, sides.weights)])
    assert float((gradient - right).norm() / right.norm()) > 0.1


def whole(rank: int, world: int, *, alone: bool = False) -> dict[str, Any]:
    """A symmetric step of this rank's part of a batch of four pairs."""
    group = None if alone else dist.group.WORLD
    sides = Sides(capacity=2048)
    batch = [torch.cat([rows, rows + 1.0]).view(world, -1, 3)[rank] for rows in sides.batch]
    sides.batch, sides.ids = batch, torch.arange(4).view(world, -1)[rank]
    states = sides.states if group is None else [distributed.shard(state, group) for state in sides.states]
    loss, refreshed = symmetric(sides, states, group=group, correction="self_normalized")
    gradients = torch.autograd.grad(loss, sides.weights)
    after = []
    for n, (state, refresh) in enumerate(zip(states, refreshed, strict=True)):
        embeddings = sides.encoder(n)(batch[n]).detach()
        after.append(negcache_fn.update(state, batch[n], embeddings, ids=sides.ids, refresh=refresh, group=group))
    if group is not None:
        after = [distributed.unshard(state, group) for state in after]
    return {"loss": loss.detach(), "gradients": gradients, "states": after}


def test_sharded_on_both_sides(tmp_path: Path) -> None:
    """Two ranks: mean loss, mean gradient and both states are those of one."""
    expected = whole(0, 1, alone=True)
    found = run_ranks(2, {"whole": (whole, {})}, tmp_path)["whole"]
    assert is_close(torch.stack([of_rank["loss"] for of_rank in found]).mean(), expected["loss"], 1e-12)
    for n, gradient in enumerate(expected["gradients"]):
        assert is_close((found[0]["gradients"][n] + found[1]["gradients"][n]) / 2, gradient, 1e-12)
    for of_rank in found:
        for state, right in zip(of_rank["states"], expected["states"], strict=True):
            for key, value in right.items(True, True):
                assert is_close(state[key], value, 1e-12), key


@pytest.mark.no_cover
@pytest.mark.parametrize("correction", ["none", "self_normalized"])
def test_compiles_whole(correction: str) -> None:
    """Both directions and both updates: one graph, equal to eager."""

    def step(first: TensorDictBase, second: TensorDictBase) -> tuple[Tensor, list[TensorDictBase]]:
        loss, refreshed = symmetric(sides, [first, second], correction=correction)
        after = [
            negcache_fn.update(
                state, sides.batch[n], sides.encoder(n)(sides.batch[n]), ids=sides.ids, refresh=refreshed[n]
            )
            for n, state in enumerate((first, second))
        ]
        return loss, after

    sides = Sides()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    states = [sides.states, sides.states]
    for _ in range(3):
        results = [function(*of) for function, of in zip((compiled, step), states, strict=True)]
        assert is_close(results[0][0], results[1][0], 1e-12)
        states = [after for _, after in results]
    assert counter.frame_count == 1
    for one, other in zip(*states, strict=True):
        for key, value in other.items(True, True):
            assert is_close(one[key], value, 1e-12), key
