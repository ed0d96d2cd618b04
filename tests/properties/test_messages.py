"""What a message says when the mistake is an ordinary one, and what is no mistake."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import negcache_fn
from negcache_fn.nn import Cache
from tests.support.builders import assert_same_state, same_snapshot, snapshot, unit


def filled(capacity: int = 8, rows: int = 5) -> Any:
    state = negcache_fn.init_cache(capacity, 4, torch.zeros(1, 3, dtype=torch.float32))
    return negcache_fn.update(state, unit(rows, 3, 0), unit(rows, 4, 1))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn])
def test_dtypes_that_torch_can_hardly_compute_with(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"features\['x'\] has dtype {dtype}; expected a number of 8 to 64 bits"):
        negcache_fn.init_cache(8, 4, {"x": torch.zeros(1, 3).to(dtype)})


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16, torch.complex64]
)
def test_dtypes_that_can_be_stored(dtype: torch.dtype) -> None:
    """All functions that move features take them."""
    given = torch.tensor([[1, 0, 1]] * 3).to(dtype)
    state = negcache_fn.update(negcache_fn.init_cache(8, 4, torch.zeros(1, 5).to(dtype)), given, unit(3, 4, 0))
    state = negcache_fn.resize(negcache_fn.offload_features(state), 4)
    out = negcache_fn.step(
        state, unit(2, 4, 1), given, lambda rows: rows.real.float().sum(1, keepdim=True).repeat(1, 4)
    )
    assert torch.equal(out.state["items", "features"][:3, :3], given)
    assert out.state["items", "features"].dtype == dtype


def test_sparse_features() -> None:
    with pytest.raises(
        TypeError, match=r"features has layout torch\.sparse_coo; expected a dense tensor: features\.to_d"
    ):
        negcache_fn.init_cache(8, 4, torch.eye(3).to_sparse())


def test_batches_that_are_too_large() -> None:
    state = filled(4, 4)
    for queries, name in ((5, "queries"), (3, "features")):
        with pytest.raises(ValueError, match=rf"^{name} has 5 rows; expected at most 4, the capacity of the cache$"):
            negcache_fn.step(state, unit(queries, 4, 0), unit(5, 3, 0), torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"^features has 2 rows; expected at least 3, the number of queries$"):
        negcache_fn.step(state, unit(3, 4, 0), unit(2, 3, 0), torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"^embeddings has 5 rows; expected at most 4, the capacity of the cache$"):
        negcache_fn.update(state, unit(5, 3, 0), unit(5, 4, 0))


def test_rows_that_are_too_wide() -> None:
    image = negcache_fn.init_cache(8, 4, torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"shape \(3, 9, 8\), .* slots of shape \(3, 8, 8\); cut them to size, or give"
    ):
        negcache_fn.update(image, torch.zeros(2, 3, 9, 8), unit(2, 4, 0))
    tokens = negcache_fn.init_cache(8, 4, torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"truncate them \(a tokenizer: truncation=True, max_length=6\), or give"):
        negcache_fn.update(tokens, torch.zeros(2, 7, dtype=torch.int64), unit(2, 4, 0))


def test_embeddings_for_features() -> None:
    state = negcache_fn.init_cache(8, 4, {"x": torch.zeros(1, 3)})
    with pytest.raises(TypeError, match="features is a Tensor; expected a mapping of the encoder's inputs"):
        negcache_fn.step(state, unit(2, 4, 0), unit(2, 4, 0), torch.nn.Linear(3, 4))  # pyright: ignore[reportArgumentType]


def test_a_state_that_was_cast_as_a_whole() -> None:
    state = filled()
    with pytest.raises(TypeError, match=r"has dtype torch.float16; expected torch.(int64|float32): cast the emb"):
        negcache_fn.occupancy(state.half())
    assert Cache(state).half().state["items", "embedding"].dtype == torch.float16


def test_sizes_of_numpy() -> None:
    eight, four, two = np.int64(8), np.int32(4), np.uint8(2)
    state = negcache_fn.init_cache(eight, four, torch.zeros(1, 3), seed=np.int64(7))  # type: ignore[arg-type]
    assert_same_state(state, negcache_fn.init_cache(8, 4, torch.zeros(1, 3), seed=7))
    state = filled()
    found = negcache_fn.top_negatives(state, unit(2, 4, 0), two)  # type: ignore[arg-type]
    assert torch.equal(found[1], negcache_fn.top_negatives(state, unit(2, 4, 0), 2)[1])
    assert negcache_fn.stalest(state, two).shape == (2,)  # type: ignore[arg-type]
    assert_same_state(negcache_fn.resize(state, four), negcache_fn.resize(state, 4))  # type: ignore[arg-type]
    for numbers in ({"num_draws": two}, {"draws_per_query": two, "top_k": two}, {"refresh_stalest": two}):
        plain = {name: int(number) for name, number in numbers.items()}
        outs = [
            negcache_fn.step(
                state,
                unit(2, 4, 0),
                unit(2, 3, 0),
                lambda rows: torch.cat([rows, rows[:, :1]], 1),
                options=negcache_fn.StepOptions(**options),
            )
            for options in (numbers, plain)
        ]
        assert_same_state(outs[0].state, outs[1].state)


def test_another_default_dtype() -> None:
    """float64, as scientific code sets it, changes nothing."""

    def everything() -> list[Any]:
        state, queries = filled(), unit(2, 4, 0)
        frequency = negcache_fn.observe(negcache_fn.init_frequency(8), torch.tensor([1, 2]), rate=0.3)
        frequency = negcache_fn.observe(frequency, torch.tensor([1, 2]), rate=0.3)
        out = negcache_fn.step(state, queries, unit(2, 3, 5), lambda rows: torch.cat([rows, rows[:, :1]], 1))
        numbers = [negcache_fn.exact_loss(state, queries, queries), negcache_fn.occupancy(state), out.metrics]
        return [frequency, negcache_fn.log_frequency(frequency, torch.tensor([1])), out.state, out.draw, *numbers]

    expected = snapshot(*everything())
    torch.set_default_dtype(torch.float64)
    try:
        assert same_snapshot(expected, snapshot(*everything()))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_log_weights_that_keep_a_candidate_out_are_counted(weight: float) -> None:
    out = negcache_fn.step(
        filled(),
        unit(2, 4, 0),
        unit(3, 3, 5),
        torch.nn.Linear(3, 4),
        log_weights=torch.tensor([0.0, -1.0, weight]),
        ids=torch.tensor([90, 91, 92]),
        options=negcache_fn.StepOptions(in_batch=False),
    )
    assert bool(out.loss.isfinite())
    assert int(out.metrics["non_finite"]) == 1
    assert {90, 91} <= set(out.state["items", "id"].tolist())
    assert 92 not in out.state["items", "id"]


def test_arguments_may_be_views_of_the_state() -> None:
    """`update_(s, ...)` is `update(s, ...)` whatever is written first."""
    refresh = (torch.tensor([0, 1]), 9 * unit(2, 4, 7))

    def arguments(state: Any) -> dict[str, Any]:
        items = state["items"]
        return {
            "features": items["features"][:3],
            "embeddings": items["embedding"][:3],
            "refresh": refresh,
            "priorities": items["embedded_at"],
            "ids": items["id"][:3],
            "log_weights": items["log_weight"][:3],
        }

    state = negcache_fn.update(filled(6), unit(1, 3, 5), unit(1, 4, 5))
    expected = negcache_fn.update(state, **arguments(state))
    in_place = state.clone().lock_()
    negcache_fn.update_(in_place, **arguments(in_place))
    assert_same_state(in_place, expected)
