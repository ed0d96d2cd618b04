"""No tensor of B x C anywhere in sampling, mining, loss or exact loss, forward or backward.

Every allocation is watched by the profiler, which also sees inside operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import negcache_fn
from negcache_fn import _operators
from negcache_fn._operators import operator
from tests.support.builders import make_state, unit

# torch 2.11 says so at the first use of its profiler, whatever is asked of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle:UserWarning")

ROWS, CAPACITY, DIM = 128, 200_000, 8
MATRIX_BYTES = ROWS * CAPACITY * 4


def largest_allocation_bytes(call: Callable[[], Any]) -> tuple[int, int]:
    """The largest single allocation of a call, and the most that was held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = call()
    sizes = [event.nbytes() for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    del result
    return max(sizes), peak


@pytest.fixture(scope="module")
def problem() -> dict[str, Any]:
    """A large cache of small embeddings with ids, and a batch."""
    state = make_state(unit(CAPACITY, DIM, 0), ids=torch.arange(CAPACITY), features={"x": torch.zeros(CAPACITY, 1)})
    return {"state": state, "queries": unit(ROWS, DIM, 1), "documents": unit(ROWS, DIM, 2), "ids": torch.arange(ROWS)}


def exact(problem: dict[str, Any], **options: Any) -> Any:
    """Exact loss with its backward pass."""
    leaves = [problem[name].clone().requires_grad_() for name in ("queries", "documents")]
    scale = torch.tensor(10.0, requires_grad=True)
    value = negcache_fn.exact_loss(problem["state"], *leaves, scale=scale, ids=problem["ids"], **options)
    return torch.autograd.grad(value, [*leaves, scale])


def whole(problem: dict[str, Any], **options: Any) -> Any:
    """Sampling, loss and backward."""
    queries = problem["queries"].clone().requires_grad_()
    draw = negcache_fn.sample_gumbel(
        problem["state"], queries, scale=10.0, draws_per_query=2, exclude_ids=problem["ids"], **options
    )
    negatives = draw.embedding.flatten(0, 1).clone().requires_grad_()
    value = negcache_fn.loss(queries, problem["documents"], negatives, draw, scale=10.0, ids=problem["ids"])
    return torch.autograd.grad(value, [queries, negatives])


CALLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "sample and loss": whole,
    "sample top_k": lambda p: whole(p, top_k=50),
    "sample with exclusions of each query": lambda p: negcache_fn.sample_gumbel(
        p["state"], p["queries"], exclude_ids=p["ids"][:, None].repeat(1, 4)
    ),
    "sample without false negatives": lambda p: whole(
        p, false_negatives=negcache_fn.FalseNegatives(p["ids"][:, None].repeat(1, 4) + 7, 3.0)
    ),
    "exact loss with a margin": lambda p: exact(
        p, false_negatives=negcache_fn.FalseNegatives(max_score=lambda positive: positive + 1.0)
    ),
    "mine": lambda p: negcache_fn.top_negatives(p["state"], p["queries"], 20, scale=10.0, exclude_ids=p["ids"]),
    "exact loss": exact,
    "exact loss top_k": lambda p: exact(p, top_k=50),
    "exact loss, own ids": lambda p: exact(p, in_batch=False),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_matrix_of_batch_by_cache(name: str, problem: dict[str, Any]) -> None:
    """The largest tensor stays under a quarter of B x C, and so does all that is held at once."""
    largest, peak = largest_allocation_bytes(lambda: CALLS[name](problem))
    assert largest < MATRIX_BYTES / 4, f"{largest / MATRIX_BYTES:.2f} of B x C"
    assert peak < MATRIX_BYTES / 2, f"{peak / MATRIX_BYTES:.2f} of B x C at once"


def test_the_watcher_sees_a_matrix(problem: dict[str, Any]) -> None:
    """`score`, the readable definition, is B x C; the watcher says so."""
    largest, peak = largest_allocation_bytes(lambda: negcache_fn.score(problem["state"], problem["queries"]))
    assert largest >= MATRIX_BYTES
    assert peak >= MATRIX_BYTES


def test_the_watcher_sees_inside_operators() -> None:
    """Or an opaque pass could hide one."""

    @operator("outer_in_a_test", fake=torch.empty_like)
    def outer(x: torch.Tensor) -> torch.Tensor:
        return (x[:, None] * x[None]).sum(0)

    largest, _ = largest_allocation_bytes(lambda: outer(torch.ones(1000)))
    _operators._LIBRARIES.pop("outer_in_a_test")
    assert largest == 4_000_000


@pytest.mark.parametrize("name", ["update_", "step_"])
def test_in_place_copies_no_embeddings(name: str, problem: dict[str, Any]) -> None:
    """Nothing as large as the C x D embeddings is made."""
    state = problem["state"].clone().lock_()
    batch = {"x": torch.zeros(ROWS, 1)}
    if name == "update_":
        largest, _ = largest_allocation_bytes(lambda: negcache_fn.update_(state, batch, unit(ROWS, DIM, 3)))
    else:
        largest, _ = largest_allocation_bytes(
            lambda: negcache_fn.step_(
                state,
                problem["queries"],
                batch,
                lambda f: f["x"] + torch.ones(DIM),
                scale=10.0,
                options=negcache_fn.StepOptions(refresh_stalest=4),
            )
        )
    assert largest < CAPACITY * DIM * 4
