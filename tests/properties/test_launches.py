"""An eager step calls few operators: on a GPU it takes as long as launching them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import negcache_fn
from negcache_fn import StepOptions
from tests.cache.test_reembed import by_native_code
from tests.support.builders import unit


class Counter(TorchDispatchMode):
    """Counts calls of operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "native", "most"),
    [
        (StepOptions(), True, 263),
        (StepOptions(draws_per_query=1), True, 230),
        (StepOptions(), False, 299),
        (StepOptions(draws_per_query=1), False, 266),
    ],
    ids=["batch", "queries", "batch-plain", "queries-plain"],
)
def test_an_eager_step_calls_few_operators(options: StepOptions, native: bool, most: int) -> None:
    """By the CPU's kernel that writes rows, and as on a GPU."""
    state = negcache_fn.init_cache(64, 8, torch.zeros(1, 8))
    encode = torch.nn.Linear(8, 8)
    with by_native_code(native), Counter() as counter:
        for step in range(3):
            before = counter.calls
            ids = torch.arange(4) + 4 * step
            negcache_fn.step_(state, encode(unit(4, 8, step)), unit(4, 8, step), encode, options=options, ids=ids)
    assert counter.calls - before <= most
