"""Guard rails: encoders that must be finite, states that must be valid, evaluation that must not write."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import negcache_fn
from negcache_fn import distributed
from tests.support import strategies
from tests.support.builders import make_state, same_snapshot, snapshot, unit
from tests.support.checks.steps import Tower, documents, warm
from tests.support.processes import run_ranks


def poisoned(tower: Callable[[Any], Tensor], row: int, value: float) -> Callable[[Any], Tensor]:
    def encode(features: Any) -> Tensor:
        out = tower(features).clone()
        out[row, 0] = value
        return out

    return encode


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [negcache_fn.step, negcache_fn.step_])
def test_the_user_chooses_error_or_left_out(function: Callable[..., Any], value: float) -> None:
    """An error before anything is written; or the row is left out, counted, and the state stays valid."""
    tower, batch = Tower(), documents(5, 1)
    state, queries = warm(tower, 9), unit(3, 6, 0).requires_grad_()
    encode, before = poisoned(tower, 4, value), snapshot(state)
    options = negcache_fn.StepOptions(draws_per_query=1)
    with pytest.raises(ValueError, match="encode gave 1 of 8 rows that are not finite, the first of them row 4"):
        function(state, queries, batch, negcache_fn.require_finite(encode), options=options)
    assert same_snapshot(before, snapshot(state))
    out = function(state, queries, batch, encode, options=dataclasses.replace(options, in_batch=False))
    assert int(out.metrics["non_finite"]) == 1
    negcache_fn.validate(out.state)


@pytest.mark.no_cover
def test_a_finite_encoder_is_left_as_it_is() -> None:
    """Values, gradients, parameters; eager and compiled whole, once."""
    tower, batch = Tower(), documents(5, 1)
    guarded = negcache_fn.require_finite(tower)
    assert [p.data_ptr() for p in guarded.parameters()] == [p.data_ptr() for p in tower.parameters()]
    state, queries = warm(tower, 9), unit(3, 6, 0).requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(negcache_fn.step, fullgraph=True, backend=counter)
    results = []
    for function, encode in ((negcache_fn.step, tower), (negcache_fn.step, guarded), (compiled, guarded)):
        out = function(state, queries, batch, encode, scale=5.0)
        results.append((out.loss, *torch.autograd.grad(out.loss, [queries, *tower.parameters()])))
    for given_value, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(given_value, expected)
    for given_value, expected in zip(results[2], results[0], strict=True):
        torch.testing.assert_close(given_value, expected)
    assert counter.frame_count == 1
    wrong = {"words": batch["words"], "extra": {"price": batch["extra"]["price"] * math.nan}}
    before = snapshot(state)
    in_place = torch.compile(negcache_fn.step_, fullgraph=True, backend="aot_eager")
    for function in (compiled, in_place):
        with pytest.raises(ValueError, match="encode gave 5 of 5 rows"):
            function(state, queries, wrong, guarded)
        assert same_snapshot(before, snapshot(state))


def test_only_functions_are_guarded() -> None:
    with pytest.raises(TypeError, match="encode is a int; expected a function of features"):
        negcache_fn.require_finite(3)  # pyright: ignore[reportArgumentType]


def on_one_rank(rank: int, world: int) -> tuple[str, bool]:
    """The error of each rank, and whether the state is untouched and the next step works."""
    group = dist.group.WORLD
    assert group is not None
    tower, batch = Tower(), documents(5, rank)
    state = distributed.shard(negcache_fn.init_cache(2048, 6, batch), group)
    queries = unit(3, 6, rank).requires_grad_()
    encode = poisoned(tower, 1, math.nan) if rank == 1 else tower
    before = snapshot(state)
    with pytest.raises(ValueError, match="encode gave") as raised:
        negcache_fn.step_(state, queries, batch, negcache_fn.require_finite(encode, group=group), group=group)
    untouched = same_snapshot(before, snapshot(state))
    negcache_fn.step_(
        state, queries, batch, negcache_fn.require_finite(tower, group=group), group=group
    ).loss.backward()
    return str(raised.value), untouched


def evaluating_on_one(rank: int, world: int) -> str:
    """Gradients off on one rank only is told to all."""
    group = dist.group.WORLD
    assert group is not None
    state = distributed.shard(negcache_fn.init_cache(2048, 6, documents(1, 0)), group)
    with torch.set_grad_enabled(rank == 0), pytest.raises(ValueError, match="gradients differs") as raised:
        negcache_fn.step_(state, unit(3, 6, rank), documents(5, rank), Tower(), group=group)
    return str(raised.value)


def test_all_ranks_hear_of_it(tmp_path: Path) -> None:
    """A row that is not finite on one rank; gradients that are off on one."""
    results = run_ranks(2, {"finite": (on_one_rank, {}), "evaluating": (evaluating_on_one, {})}, tmp_path)
    (first, _), (second, _) = results["finite"]
    assert "on another rank" in first
    assert "the first of them row 1" in second
    assert all(untouched for _, untouched in results["finite"])
    for text in results["evaluating"]:
        assert re.search(r"gradients differs between the ranks of the group: \[(True, False|False, True)\]", text)


@given(state=strategies.states(3))
def test_states_that_this_package_makes_are_valid(state: TensorDictBase) -> None:
    """Any state, and what an update makes of it."""
    negcache_fn.validate(state)
    rows = min(3, len(state["items", "id"]))
    negcache_fn.validate(negcache_fn.update(state, {"x": torch.zeros(rows, 2).long()}, unit(rows, 3, 0)))


FAULTS: dict[str, tuple[str, Callable[[TensorDict, int], None], str]] = {
    "embedding": ("embedding", lambda items, slot: items["embedding"][slot].fill_(math.nan), "finite numbers"),
    "repeated id": ("id", lambda items, slot: items["id"].__setitem__(slot, items["id"][slot + 1]), "other live"),
    "log-weight": ("log_weight", lambda items, slot: items["log_weight"].__setitem__(slot, math.inf), "below"),
    "log-weight NaN": ("log_weight", lambda items, slot: items["log_weight"].__setitem__(slot, math.nan), "below"),
    "future": ("embedded_at", lambda items, slot: items["embedded_at"].__setitem__(slot, 99), "-1 ... 5"),
    "half empty": ("inserted_at", lambda items, slot: items["inserted_at"].__setitem__(slot, -1), "is live"),
    "half live": ("inserted_at", lambda items, slot: items["embedded_at"].__setitem__(slot, -1), "-1, as"),
    "embedded before it came": (
        "inserted_at",
        lambda items, slot: items["inserted_at"].__setitem__(slot, 5),
        "at most",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@given(slot=st.integers(0, 7))
def test_each_broken_invariant_is_named(fault: str, slot: int) -> None:
    """The tensor and the slot."""
    key, corrupt, says = FAULTS[fault]
    state = make_state(unit(9, 3, 0), ids=torch.arange(9) * 3, embedded_at=torch.full((9,), 4), step=5)
    negcache_fn.validate(state)
    corrupt(state["items"], slot)
    slot += fault == "repeated id"  # the second of them is named
    with pytest.raises(ValueError, match=rf"state\['items', '{key}'\] .* at slot {slot}; expected .*{says}"):
        negcache_fn.validate(state)


def test_empty_slots_may_hold_anything() -> None:
    """Of an empty slot only the emptiness counts."""
    state = make_state(torch.full((3, 2), math.nan), live=[False] * 3)
    negcache_fn.validate(state)


WRONG: dict[str, tuple[Callable[[TensorDict], Any], str]] = {
    "key": (lambda s: s.set("clock", torch.tensor(0)), r"state has keys .*is it of another version\?"),
    "item key": (lambda s: s["items"].set("age", s["items", "id"]), r"state\['items'\] has keys .*another version"),
    "dtype": (
        lambda s: s["items"].set("id", s["items", "id"].int()),
        r"state\['items', 'id'\] has shape \(9,\) and dtype torch.int32; expected \(9,\) and torch.int64",
    ),
    "embedding": (lambda s: s["items"].set("embedding", s["items", "id"]), r"expected \[C, D\] floating"),
    "step": (lambda s: s.set("step", torch.tensor([1])), r"state\['step'\] has shape \(1,\)"),
    "seed": (lambda s: s.set("seed", torch.tensor(1.0)), r"state\['seed'\] .*float32; expected torch.int64"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_states_of_another_schema_say_so(fault: str) -> None:
    """Whoever is given one."""
    change, says = WRONG[fault]
    state = warm(Tower(), 9).clone().unlock_()
    change(state)
    for call in (
        lambda: negcache_fn.occupancy(state),
        lambda: negcache_fn.sample_gumbel(state, unit(3, 6, 0)),
        lambda: negcache_fn.step(state, unit(3, 6, 0), documents(5, 1), Tower()),
        lambda: negcache_fn.validate(state),
    ):
        with pytest.raises((ValueError, TypeError), match=says):
            call()


def test_another_d_says_whose() -> None:
    """Queries, embeddings and what the encoder gives."""
    state = warm(Tower(), 9)
    with pytest.raises(
        ValueError, match=r"queries has shape \(3, 8\); expected \[rows, 6\], where 6 is the D of the cache"
    ):
        negcache_fn.sample_gumbel(state, unit(3, 8, 0))
    with pytest.raises(ValueError, match=r"the output of encode has shape .* the D of the cache"):
        negcache_fn.step(state, unit(3, 6, 0), documents(5, 1), Tower(dim=8))
    with pytest.raises(ValueError, match=r"embeddings has shape .* the D of the cache"):
        negcache_fn.update(state, documents(2, 1), unit(2, 8, 0))
