"""Checks of `update` against the list-of-dicts model, and of purity."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from tests.support.builders import same_bits, same_snapshot, snapshot
from tests.support.model import ListCache

Update = Callable[..., TensorDictBase]


def agree(state: TensorDictBase, model: ListCache) -> None:
    """Every field of every slot, occupancy, and the step."""
    items = state["items"]
    assert int(state["step"]) == model.step
    flat = dict(items["features"].items(True, True))
    for j, held in enumerate(model.slots):
        if held is None:
            assert int(items["embedded_at"][j]) == -1, f"slot {j} should be empty"
            assert int(items["inserted_at"][j]) == -1, f"slot {j} should be empty"
            assert int(items["id"][j]) == -1
            continue
        for key in ("id", "embedded_at", "inserted_at", "log_weight"):
            assert items[key][j].item() == held[key], f"{key} of slot {j}"
        assert same_bits(items["embedding"][j], held["embedding"]), f"embedding of slot {j}"
        for key, value in flat.items():
            assert torch.equal(value[j], held[key]), f"features {key} of slot {j}"


def batch(size: int, seed: int, *, ids: Any = None, width: int = 3) -> dict[str, Any]:
    """Features, embeddings and ids of `size` documents."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "features": {"x": torch.randint(1, 99, (size, width), generator=generator)},
        "embeddings": torch.randn(size, 2, generator=generator),
        "ids": None if ids is None else torch.tensor(ids),
    }


def history(init: Callable[..., TensorDictBase], update: Update) -> None:
    """A life of a cache of five slots that meets every rule, for both evictions, step by step with the model."""
    bad = torch.tensor([[float("nan"), 0.0], [1.0, 2.0]])
    for evict in ("lru", "fifo"):
        example = {"x": torch.zeros(1, 3, dtype=torch.int64)}
        state = init(5, 2, example)
        model = ListCache(5, torch.float32, {"x": torch.zeros(3, dtype=torch.int64)})

        def advance(state: TensorDictBase, model: ListCache, given: dict[str, Any], **more: Any) -> TensorDictBase:
            options = {k: v for k, v in {"ids": given["ids"], **more}.items() if v is not None}
            plain = dict(options)
            if "refresh" in plain:
                plain["refresh"] = (plain["refresh"][0].tolist(), plain["refresh"][1])
            model.update(given["features"], given["embeddings"], **plain)
            state = update(state, given["features"], given["embeddings"], **options)
            agree(state, model)
            return state

        one, two = torch.ones(2, 2), torch.arange(6.0).view(3, 2)
        state = advance(state, model, batch(2, 0, ids=[7, -1]), evict=evict)
        state = advance(state, model, batch(1, 1), evict=evict, refresh=(torch.tensor([4, -1]), one))
        state = advance(state, model, batch(2, 2, ids=[3, 7]), evict=evict, log_weights=torch.tensor([0.5, -2.0]))
        state = advance(state, model, batch(1, 3, ids=[5]), evict=evict, refresh=(torch.tensor([2, 0, 2]), two))
        state = advance(state, model, batch(2, 4, ids=[8, 9]), evict=evict)
        state = advance(state, model, batch(1, 5, ids=[11]), evict=evict)
        state = advance(state, model, batch(3, 6, ids=[9, 9, 9]), evict=evict)
        state = advance(state, model, batch(4, 7), evict=evict, cacheable=torch.tensor([True, False, False, True]))
        state = advance(state, model, batch(2, 8) | {"embeddings": bad}, evict=evict)
        state = advance(state, model, batch(2, 9), evict=evict, refresh=(torch.tensor([1, 2]), bad))
        state = advance(state, model, batch(5, 10, ids=[1, 11, 1, -1, 4]), evict=evict)
        state = advance(
            state, model, batch(3, 11), evict=evict, log_weights=torch.tensor([float("nan"), 1.0, float("inf")])
        )
        advance(state, model, batch(5, 12), evict=evict)


def generators() -> list[Any]:
    """The state of every global random generator."""
    legacy = np.random.get_state()  # noqa: NPY002 - the global one is the one not to touch
    return [torch.get_rng_state(), random.getstate(), repr(legacy)]


def pure(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls a function twice and returns what it gave: arguments and generators as they were, and the same answer."""
    before, randomness = snapshot(arguments, options), snapshot(generators())
    first = function(*arguments, **options)
    assert same_snapshot(before, snapshot(arguments, options)), "an argument was written to"
    assert same_snapshot(randomness, snapshot(generators())), "a global generator moved"
    assert same_snapshot(snapshot(first), snapshot(function(*arguments, **options))), "two answers to one question"
    return first


def update_is_pure(init: Callable[..., TensorDictBase], update: Update) -> None:
    """`update` leaves the given state, batch and refresh alone, even what the new state shares."""
    state = init(5, 2, {"x": torch.zeros(1, 3, dtype=torch.int64)})
    for n in range(4):
        given: dict[str, Any] = batch(2, n, ids=[n, 50])
        refresh: tuple[Tensor, Tensor] = (torch.tensor([0, 3]), torch.full((2, 2), float(n)))
        state = pure(update, state, given["features"], given["embeddings"], ids=given["ids"], refresh=refresh)
