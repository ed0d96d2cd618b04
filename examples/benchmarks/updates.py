"""What writing costs: `update_` beside the step that it is part of, `update` beside a copy of the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import negcache_fn
from examples.benchmarks.methods import OURS, Call, Method
from examples.benchmarks.problem import Problem

__all__ = ["UPDATES"]


def _update_in_place(state: Any, features: Any, embeddings: Tensor, ids: Tensor, refresh: Any) -> Any:
    return negcache_fn.update_(state, features, embeddings, ids=ids, refresh=refresh)


_compiled_update = torch.compile(_update_in_place, fullgraph=True, dynamic=True)


def _update(state: Any, features: Any, embeddings: Tensor, ids: Tensor, refresh: Any) -> Any:
    return negcache_fn.update(state, features, embeddings, ids=ids, refresh=refresh)


def _writes(update: Callable[..., Any]) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        state, batch, capacity = problem.state(), problem.shape.batch, problem.shape.capacity
        documents, drawn = problem.encoded.detach().split([batch, batch * problem.shape.samples])
        slots = torch.arange(drawn.shape[0], device=problem.device) * 7919 % capacity

        def call() -> None:
            problem.next_batch()
            update(state, problem.features, documents, problem.ids, (slots, drawn))

        return call

    return make


def _clone(problem: Problem) -> Call:
    state = problem.state()

    def call() -> None:
        state.clone()

    return call


UPDATES = (
    *(method for method in OURS if method.name in ("ours", "ours-eager")),
    Method("update_", "`update_` alone, compiled", _writes(_compiled_update), compiled=True),
    Method("update_-eager", "`update_` alone, eager", _writes(_update_in_place)),
    Method("update-eager", "`update`, eager", _writes(_update)),
    Method("clone", "a copy of the state", _clone),
)
