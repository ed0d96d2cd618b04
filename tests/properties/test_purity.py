"""No function without a trailing underscore writes to an argument; none reads or moves a global generator."""

from __future__ import annotations

import io
import random
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import negcache_fn
from tests.support import strategies
from tests.support.builders import assert_same_state, at_step, same_snapshot, snapshot, unit
from tests.support.checks import updates
from tests.support.checks.steps import Tower, documents, warm
from tests.support.options import step_keywords


def calls() -> dict[str, Callable[[], Any]]:
    """Every pure function, called with every argument it has, twice, watched."""
    tower, batch = Tower(), documents(5, 1)
    state = warm(tower, 9, ids=True)
    queries, own = unit(3, 6, 0), tower(batch).detach()
    ids, weights = torch.tensor([4, 90, 0, 7, 90]), torch.linspace(-1, 1, 5)
    scale = torch.tensor(3.0, requires_grad=True)
    draw = negcache_fn.sample_gumbel(state, queries, draws_per_query=2, scale=3.0, exclude_ids=ids)
    later = at_step(state, 99)
    other = negcache_fn.sample_gumbel(later, queries, draws_per_query=2, scale=3.0, exclude_ids=ids)
    of_batch = negcache_fn.sample_gumbel(state, queries, num_draws=6, scale=3.0)
    other_of_batch = negcache_fn.sample_gumbel(later, queries, num_draws=6, scale=3.0)
    negatives = unit(6, 6, 4)
    refresh = (draw.slot.flatten(), negatives)
    mask = torch.tensor([True, False, True, True, True])
    pure = updates.pure
    shared = {"scale": scale, "score_transform": strategies.soft_cap}
    named = torch.tensor([[1, 2], [3, -1], [4, 5]])
    known = negcache_fn.FalseNegatives(named, torch.tensor([1.0, 2.0, 3.0]))
    by_margin = negcache_fn.FalseNegatives(named, lambda positive: positive + 1.0)
    batchwise = {"ids": ids, "log_weights": weights}
    frequency = negcache_fn.observe(negcache_fn.init_frequency(50, hashes=5), ids)
    return {
        "init_frequency": lambda: pure(negcache_fn.init_frequency, 50, hashes=5),
        "observe": lambda: pure(negcache_fn.observe, frequency, ids, rate=0.5, mask=mask),
        "log_frequency": lambda: pure(negcache_fn.log_frequency, frequency, ids),
        "init_cache": lambda: pure(negcache_fn.init_cache, 5, 6, batch, seed=3),
        "score": lambda: pure(negcache_fn.score, state, queries, **shared),
        "sample_gumbel": lambda: [
            pure(
                negcache_fn.sample_gumbel,
                state,
                queries,
                exclude_ids=ids,
                false_negatives=known,
                top_k=4,
                **number,
                **shared,
            )
            for number in ({"draws_per_query": 2}, {"num_draws": 6, "importance": torch.ones(3)})
        ],
        "merge_draws": lambda: (
            pure(negcache_fn.merge_draws, draw, other),
            pure(negcache_fn.merge_draws, of_batch, other_of_batch),
        ),
        "take_drawn": lambda: pure(negcache_fn.take_drawn, [state], draw),
        "offload_features": lambda: pure(negcache_fn.offload_features, state),
        "memory_mapped": lambda: pure(negcache_fn.memory_mapped, state, tempfile.mkdtemp(), capacity=20),
        "pad_features": lambda: pure(
            negcache_fn.pad_features,
            state,
            {"words": batch["words"][:, :2], "extra": batch["extra"]},
            values={"words": 3},
        ),
        "reembed": lambda: pure(negcache_fn.reembed, state, tower, batch_size=4),
        "split_refresh": lambda: pure(negcache_fn.split_refresh, draw, negatives),
        "take": lambda: pure(negcache_fn.take, state, draw.slot),
        "loss": lambda: [
            pure(negcache_fn.loss, queries, own, negatives, kind, false_negatives=by_margin, **shared, **batchwise)
            for kind in (draw, of_batch)
        ],
        "exact_loss": lambda: pure(
            negcache_fn.exact_loss, state, queries, own, false_negatives=by_margin, top_k=4, **shared, **batchwise
        ),
        "update": lambda: pure(
            negcache_fn.update,
            state,
            batch,
            own,
            refresh=refresh,
            cacheable=mask,
            priorities=torch.linspace(1, 0, 9),
            **batchwise,
        ),
        "step": lambda: [
            pure(
                negcache_fn.step,
                state,
                queries,
                batch,
                tower,
                cacheable=mask,
                false_negatives=by_margin,
                **step_keywords(draws_per_query=samples, refresh_stalest=2, **shared, **batchwise),
            )
            for samples in (None, 2)
        ],
        "top_negatives": lambda: pure(
            negcache_fn.top_negatives, state, queries, 3, exclude_ids=ids, false_negatives=known, **shared
        ),
        "stalest": lambda: pure(negcache_fn.stalest, state, 3),
        "occupancy": lambda: pure(negcache_fn.occupancy, state),
        "prefill": lambda: pure(negcache_fn.prefill, state, [(batch, ids), batch], tower),
        "resize": lambda: (pure(negcache_fn.resize, state, 4), pure(negcache_fn.resize, state, 40)),
        "reset": lambda: pure(negcache_fn.reset, state),
        "require_finite": lambda: pure(negcache_fn.require_finite(tower), batch),
        "age_histogram": lambda: pure(negcache_fn.age_histogram, state, bins=4),
        "hard_negatives": lambda: pure(
            negcache_fn.hard_negatives, weights[None], ids[None], positives=ids[None, :1], texts=["text"] * 91
        ),
        "training_rows": lambda: pure(
            negcache_fn.training_rows, ["query"], ids[None, :1], ids[None, 1:], ["text"] * 91
        ),
        "validate": lambda: pure(negcache_fn.validate, state),
        "chunked": lambda: pure(negcache_fn.chunked(tower, 2), batch),
    }


@pytest.mark.parametrize("name", calls())
def test_arguments_and_generators_are_left_alone(name: str) -> None:
    """Data snapshots, not only structure: `lock_()` alone would still allow in-place writes to leaves."""
    calls()[name]()


def test_every_pure_function_is_watched() -> None:
    """A new public function comes with its purity test."""
    functions = {n for n in negcache_fn.__all__ if n[0].islower() and not n.endswith("_")}
    assert functions == set(calls())


@given(case=strategies.cases())
def test_sampling_any_state_is_pure(case: strategies.Case) -> None:
    """Locked or not, empty or full; the answer depends on nothing but the arguments."""
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global one is the one not to read
    torch.manual_seed(1)
    first = updates.pure(negcache_fn.sample_gumbel, case.state, case.queries, **case.sample_options)
    torch.manual_seed(2)
    assert same_snapshot(
        snapshot(first), snapshot(negcache_fn.sample_gumbel(case.state, case.queries, **case.sample_options))
    )
    updates.pure(negcache_fn.exact_loss, case.state, case.queries, case.documents, **case.exact_options)


@given(data=st.data())
def test_a_chain_of_states_keeps_every_link(data: st.DataObject) -> None:
    """All earlier states stay what they were: a state is a value."""
    state = data.draw(strategies.states(3))
    capacity = len(state["items", "id"])
    chain = [(state, snapshot(state))]
    for n in range(4):
        rows = data.draw(st.integers(1, min(capacity, 4)))
        slots = torch.randint(-1, capacity, (3,), generator=torch.Generator().manual_seed(n))
        features = {"x": torch.full((rows, 2), n)}
        state = negcache_fn.update(state, features, unit(rows, 3, n), refresh=(slots, unit(3, 3, n + 9)))
        chain.append((state, snapshot(state)))
    for link, before in chain:
        assert same_snapshot(before, snapshot(link))


def test_in_place_writes_keep_the_bytes() -> None:
    """`update_` and `step_` write into the storage of the state that was given, and into nothing else."""
    tower, batch = Tower(), documents(5, 1)
    state = warm(tower, 9).clone().lock_()
    places = {key: value.data_ptr() for key, value in state.items(True, True)}
    own = tower(batch).detach()
    before = snapshot(batch, own, list(tower.parameters()))
    out = negcache_fn.update_(state, batch, own)
    assert out is state
    stepped = negcache_fn.step_(state, unit(3, 6, 0), batch, tower)
    assert stepped.state is state
    assert {key: value.data_ptr() for key, value in state.items(True, True)} == places
    assert same_snapshot(before, snapshot(batch, own, list(tower.parameters())))


def test_backward_works_after_the_state_was_written() -> None:
    """`step_` overwrites the drawn rows before `backward`: the gradient is that of `step` all the same."""
    tower, batch = Tower(), documents(5, 1)
    state, gradients = warm(tower, 9), []
    for function in (negcache_fn.step, negcache_fn.step_):
        queries = unit(3, 6, 0).requires_grad_()
        out = function(
            state.clone().lock_(), queries, batch, tower, scale=5.0, options=negcache_fn.StepOptions(draws_per_query=2)
        )
        gradients.append(torch.autograd.grad(out.loss, [queries, *tower.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_new_state_shares_no_storage_that_is_written() -> None:
    """Updating the new state in place leaves the old one alone."""
    tower, batch = Tower(), documents(5, 1)
    old = warm(tower, 9)
    before = snapshot(old)
    new = negcache_fn.step(old, unit(3, 6, 0), batch, tower).state
    negcache_fn.update_(new, batch, tower(batch).detach())
    assert same_snapshot(before, snapshot(old))


def test_draws_do_not_alias_the_state() -> None:
    """A draw is a value too: writing the state in place later does not change it."""
    state = warm(Tower(), 9).clone().lock_()
    draw = negcache_fn.sample_gumbel(state, unit(3, 6, 0), draws_per_query=2)
    before: Any = snapshot(draw)
    negcache_fn.update_(state, documents(5, 1), unit(5, 6, 1))
    assert same_snapshot(before, snapshot(draw))


def test_inference_mode_and_no_grad() -> None:
    """A step for its loss and metrics alone: an evaluation, which writes nothing, in place or not."""
    tower, batch = Tower(), documents(5, 1)
    state = warm(tower, 9)
    before = snapshot(state)
    expected = negcache_fn.step(state, unit(3, 6, 0), batch, tower, options=negcache_fn.StepOptions(refresh_stalest=2))
    for context in (torch.no_grad(), torch.inference_mode()):
        for function in (negcache_fn.step, negcache_fn.step_):
            with context:
                out = function(state, unit(3, 6, 0), batch, tower, options=negcache_fn.StepOptions(refresh_stalest=2))
            assert torch.equal(out.loss, expected.loss.detach())
            assert all(torch.equal(out.metrics[name], value) for name, value in expected.metrics.items())
            assert out.state is state
            assert same_snapshot(before, snapshot(state))
        file = io.BytesIO()
        torch.save(out.loss, file)
    again = negcache_fn.step(state, unit(3, 6, 0), batch, tower, options=negcache_fn.StepOptions(refresh_stalest=2))
    assert_same_state(expected.state, again.state)


def test_scale_tensor_is_not_changed() -> None:
    """A learnable scale keeps its bytes and its flag."""
    scale: Tensor = torch.tensor(3.0, requires_grad=True)
    before = snapshot(scale)
    negcache_fn.step(warm(Tower(), 9), unit(3, 6, 0), documents(5, 1), Tower(), scale=scale)
    assert same_snapshot(before, snapshot(scale))
