"""Thousands of calls of every public function, valid and invalid: nothing but the answer, or a refusal by name.

The table of valid arguments is `tests/support/calls.py`, that of what can be wrong `tests/support/corruptions.py`.
"""

from __future__ import annotations

import inspect
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor

import negcache_fn
from negcache_fn import distributed, nn
from negcache_fn import random as noise
from tests.support.builders import same_snapshot, snapshot
from tests.support.calls import VALID, World, function_named
from tests.support.corruptions import KINDS

WORLDS = 24  # of each function
VALID_CALLS, INVALID_CALLS = 2, 60  # of each world, the latter at most

# What else a message may name: two arguments that disagree, or the argument's part.
ALSO: dict[str, tuple[str, ...]] = {
    "features": ("embeddings", "queries", "ids", "log_weights", "cacheable"),
    "embeddings": ("features", "refresh"),
    "documents": ("ids", "log_weights"),
    "queries": ("false_negatives", "features", "documents", "draw", "importance", "exclude_ids", "positives"),
    "negatives": ("draw",),
    "a": ("b",),
    "scores": ("ids", "positives"),
    "ids": ("scores", "mask", "texts"),
    "positives": ("texts",),
    "batches": ("features",),
    "states": ("state",),
    "encode": ("embeddings",),
}
EXCEPT = {
    "Draw",  # a value that functions make
    "FalseNegatives",  # is checked where it is used
    "Labels",
    "StepOutput",
    "distributed.average_gradients",  # with a process group, or on disk: tests/ranks
    "distributed.checkpointable",
    "distributed.load_checkpoint",
    "distributed.save_checkpoint",
    "distributed.shard",
    "distributed.unshard",
}
UNCHECKED = {"random.gumbel", "random.philox"}  # words and counters, checked by nobody


def test_every_public_function_is_in_the_table() -> None:
    modules = {"": negcache_fn, "nn.": nn, "random.": noise, "distributed.": distributed}
    public = {f"{prefix}{name}" for prefix, module in modules.items() for name in module.__all__}
    assert public - EXCEPT == set(VALID)


@pytest.mark.parametrize("name", [name for name in VALID if name not in UNCHECKED])
def test_every_argument_has_a_kind(name: str) -> None:
    for argument in inspect.signature(function_named(name)).parameters:
        assert f"{name}.{argument}" in KINDS or argument in KINDS, argument


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002 - which is watched


def called(name: str, arguments: dict[str, Any], folder: Any) -> Any:
    function = function_named(name)
    if name == "memory_mapped" and arguments["folder"] is None:
        arguments = arguments | {"folder": folder}
    result = function(**arguments)
    return (
        result(arguments["features"]) if name in ("chunked", "require_finite") and "features" in arguments else result
    )


def refusal(name: str, arguments: dict[str, Any], folder: Any) -> str | None:
    """What the function says; None if it answers. Any other error comes through."""
    try:
        called(name, arguments, folder)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def states_in(value: Any) -> list[TensorDictBase]:
    if isinstance(value, TensorDictBase):
        return [value] if "items" in set(value.keys()) else []
    if isinstance(value, tuple):
        return [state for item in value for state in states_in(item)]
    return []


def corruptions(name: str, world: World) -> list[tuple[str, Any]]:
    """Every corruption of every argument, those that are not given too, in an order of the world's."""
    if name in UNCHECKED:
        return []
    found = [
        (argument, corrupt)
        for argument in inspect.signature(function_named(name)).parameters
        for corrupt in KINDS.get(f"{name}.{argument}", KINDS.get(argument, []))
    ]
    world.random.shuffle(found)
    return found


@pytest.mark.parametrize("name", VALID)
def test_calls(name: str, tmp_path: Any) -> None:
    for seed in range(WORLDS):
        world, folder = World(seed), tmp_path / f"{seed}"
        for _ in range(VALID_CALLS):
            arguments = VALID[name](world)
            before, untouched = snapshot(arguments), generators()
            in_place = {"state": arguments["state"].clone().lock_()} if name.endswith("_") else {}
            result = called(name, arguments | in_place, folder)
            for state in states_in(result):
                negcache_fn.validate(state)
            assert same_snapshot(before, snapshot(arguments))
            assert generators() == untouched
        for argument, corrupt in corruptions(name, world)[:INVALID_CALLS]:
            wrong = corrupt(arguments.get(argument))
            told = f"{name}({argument}={wrong!r}) of seed {seed}"
            said = refusal(name, arguments | in_place | {argument: wrong}, folder)
            assert said is not None, f"{told} is not refused"
            assert any(word in said for word in (argument, *ALSO.get(argument, ()))), f"{told}: {said}"
            assert same_snapshot(before, snapshot(arguments)), told
        for state in states_in((arguments.get("state"), in_place.get("state"))):
            negcache_fn.validate(state)
        assert generators() == untouched


def test_the_watch_bites() -> None:
    """A function that writes to an argument, or draws from a global generator, is seen."""
    arguments = VALID["score"](World(3))
    before, untouched = snapshot(arguments), generators()
    arguments["queries"].detach().add_(1.0)
    torch.rand(1)
    assert not same_snapshot(before, snapshot(arguments))
    assert generators() != untouched
    assert isinstance(arguments["queries"], Tensor)
    assert isinstance(function_named("score"), types.FunctionType)
