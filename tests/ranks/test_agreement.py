"""What is sent goes by name, and ranks that would send something else are told, before anything is written."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

import negcache_fn
from negcache_fn import distributed
from tests.support.builders import same_snapshot, snapshot
from tests.support.options import step_keywords
from tests.support.processes import run_ranks

DIM, CAPACITY, BATCH = 8, 1024, 4
LONGEST_SECONDS = 10
ENCODER = torch.linspace(-1, 1, 3 * DIM).view(3, DIM)


def documents(ids: Tensor, width: int = 3) -> dict[str, Any]:
    """No two leaves have the same numbers, but all have the same size."""
    column = torch.arange(width)
    return {
        "tokens": ids[:, None] * 10 + column,
        "mask": (ids[:, None] + column) % 3,
        "image": {"pixels": ids[:, None] * 7 - column, "areas": ids[:, None] * 3 + column},
    }


def reordered(features: Any) -> Any:
    """The same with every dictionary in the opposite order."""
    if isinstance(features, Tensor):
        return features
    return {key: reordered(value) for key, value in reversed(features.items())}


def encode(features: Any) -> Tensor:
    return (features["tokens"] + features["image"]["pixels"] * features["mask"]).float().sin() @ ENCODER


def arguments(rank: int, world: int) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    ids = torch.arange(BATCH) + BATCH * rank
    return {
        "state": negcache_fn.init_cache(CAPACITY, DIM, documents(ids)),
        "queries": torch.linspace(-1, 2, BATCH * DIM).view(BATCH, DIM).requires_grad_(),
        "features": documents(ids),
        "encode": encode,
        "ids": ids,
        "in_batch": "global",
        "group": group,
    }


def train_in_another_order(rank: int, world: int, *, swapped: bool, refresh: int, batches: str) -> list[Any]:
    """Three steps, with the dictionaries of rank 1 in another order: those of its cache, its batches, or both."""
    given = arguments(rank, world) | {"refresh_stalest": refresh}
    change: Callable[[Any], Any] = reordered if swapped and rank == 1 else lambda features: features
    if batches != "batch":
        given["state"] = negcache_fn.init_cache(CAPACITY, DIM, change(given["features"]))
    losses: list[float] = []
    for step in range(3):
        ids = given["ids"] + step * BATCH * world
        features = change(documents(ids)) if batches != "cache" else documents(ids)
        if batches == "tensordict" and rank == 1:
            features = TensorDict(features, batch_size=[BATCH])
        out = negcache_fn.step_(**step_keywords(**given | {"ids": ids, "features": features}))
        losses.append(float(out.loss.detach()))
    whole = distributed.unshard(given["state"], given["group"])
    taken = negcache_fn.take(given["state"], torch.arange(6), group=given["group"])
    return [losses, *(plain(leaves) for leaves in (whole["items", "features"], taken)), whole["items", "id"]]


def plain(features: TensorDictBase) -> dict[str, Tensor]:
    return dict(features.flatten_keys("/").items())


def test_another_order_of_keys_changes_nothing(tmp_path: Path) -> None:
    cases = {
        f"{batches}-{swapped}": (train_in_another_order, {"swapped": swapped, "batches": batches, "refresh": 3})
        for batches in ("both", "batch", "cache", "tensordict")
        for swapped in (True, False)
    }
    results = run_ranks(2, cases, tmp_path)
    for batches in ("both", "batch", "cache", "tensordict"):
        for (losses, *found), (right, *expected) in zip(
            results[f"{batches}-True"], results[f"{batches}-False"], strict=True
        ):
            assert losses == right
            for features, wanted in zip(found[:2], expected[:2], strict=True):
                assert features.keys() == wanted.keys()
                assert all(torch.equal(features[key], wanted[key]) for key in wanted)
            ids = found[2][found[2] >= 0]
            stored = found[0]
            assert torch.equal(stored["tokens"][found[2] >= 0], documents(ids)["tokens"])
            assert torch.equal(stored["image/areas"][found[2] >= 0], documents(ids)["image"]["areas"])


def changed(name: str, given: dict[str, Any]) -> None:
    """Gives rank 1 something else than the others."""
    ids = given["ids"]
    if name in ("longer texts", "other dtype", "other key", "further key"):
        features = documents(ids, width=4) if name == "longer texts" else documents(ids)
        if name == "other dtype":
            features["tokens"] = features["tokens"].double()  # of the same size
        elif name == "other key":
            features["words"] = features.pop("tokens")
            given["encode"] = lambda features: encode({**features, "tokens": features["words"]})
        elif name == "further key":
            features["kept"] = ids > 2
        given |= {"state": negcache_fn.init_cache(CAPACITY, DIM, features), "features": features}
    elif name == "other storage":
        given["state"] = negcache_fn.init_cache(CAPACITY, DIM, given["features"], embedding_dtype=torch.bfloat16)
    elif name == "queries in float64":
        given["queries"] = given["queries"].double()
    elif name == "queries without gradient":
        given["queries"] = given["queries"].detach()
    elif name == "learnable scale":
        given["scale"] = torch.tensor(1.0, requires_grad=True)
    elif name == "log-weights in float64":
        given["log_weights"] = given["log_weights"].double()
    elif name == "a number as limit":
        given["false_negatives"] = negcache_fn.FalseNegatives(max_score=3.0)
    elif name == "transform beyond 30":
        given["score_transform"] = lambda scores: scores.clamp(max=50.0)
    elif name == "transform of another shape":
        given["score_transform"] = lambda scores: scores.sum()
    elif name == "transform that fails":
        given["score_transform"] = lambda scores: 1 / 0
    elif name == "another step":
        given["state"]["step"].add_(1)


TOLD = {
    "longer texts": r"features\['image'\]\['areas'\].shape\[1\] differs between the ranks of the group: \[3, 4, 3\]",
    "other dtype": r"features\['tokens'\].dtype differs between .*: \[torch.int64, torch.float64, torch.int64\]",
    "other key": r"features\['tokens'\].dtype differs between .*: \[torch.int64, nothing, torch.int64\]",
    "further key": r"features\['kept'\].dtype differs between .*: \[nothing, torch.bool, nothing\]",
    "other storage": r"state\['items', 'embedding'\].dtype differs between .*: \[torch.float32, torch.bfloat16, ",
    "queries in float64": r"queries.dtype differs between .*: \[torch.float32, torch.float64, torch.float32\]",
    "queries without gradient": r"queries.requires_grad differs between .*: \[True, nothing, True\]",
    "learnable scale": r"scale.requires_grad differs between .*: \[nothing, True, nothing\]",
    "log-weights in float64": r"log_weights.dtype differs between .*: \[torch.float32, torch.float64, torch.float32\]",
    "a number as limit": r"max_score differs between .*: \[a function, True, a function\]",
    "transform beyond 30": r"the score transform gives \[100.0, 50.0, 100.0\] for 100.0",
    "transform of another shape": r"score_transform gave \(\) for \(9,\); expected one number for each",
    "transform that fails": "division by zero",
    "another step": r"step differs between the ranks of the group: \[0, 1, 0\]",
    "autocast": r"autocast differs between the ranks of the group: \[None, torch.bfloat16, None\]",
}


def different(rank: int, world: int, *, name: str) -> tuple[str, float, bool]:
    """The error, the seconds until it came, and whether the state is as it was and the next step works."""
    right, given = arguments(rank, world), arguments(rank, world)
    if name == "log-weights in float64":
        given["log_weights"] = torch.zeros(BATCH)
    elif name == "a number as limit":
        given["false_negatives"] = negcache_fn.FalseNegatives(max_score=lambda positive: positive + 1)
    if rank == 1:
        changed(name, given)
    before = snapshot(given["state"])
    started = time.perf_counter()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "autocast" and rank == 1)
    with autocast, pytest.raises((ValueError, ZeroDivisionError)) as caught:
        negcache_fn.step_(**step_keywords(**given))
    seconds = time.perf_counter() - started
    untouched = same_snapshot(before, snapshot(given["state"]))
    negcache_fn.step_(**step_keywords(**right)).loss.backward()
    return str(caught.value), seconds, untouched


def test_what_would_be_sent_differently_is_told_on_every_rank(tmp_path: Path) -> None:
    for name, of_ranks in run_ranks(3, {name: (different, {"name": name}) for name in TOLD}, tmp_path).items():
        for text, seconds, untouched in of_ranks:
            assert re.search(TOLD[name], text), (name, text)
            assert seconds < LONGEST_SECONDS
            assert untouched, name


def function_calls(given: dict[str, Any], draw: negcache_fn.Draw) -> dict[str, Callable[..., Any]]:
    """Every function with a group, each with what it needs; keywords replace what it is given."""
    state, queries, group = given["state"], given["queries"], given["group"]
    embeddings = torch.ones(BATCH, DIM)
    parameter = torch.nn.Parameter(torch.ones(3))

    def loss(documents: Tensor = embeddings, negatives: Tensor = embeddings, **options: Any) -> Tensor:
        return negcache_fn.loss(queries, documents, negatives, draw, group=group, **options)

    def exact(state: TensorDictBase = state, documents: Tensor = embeddings, **options: Any) -> Tensor:
        return negcache_fn.exact_loss(state, queries, documents, group=group, **options)

    def update(state: TensorDictBase = state, embeddings: Tensor = embeddings, **options: Any) -> TensorDictBase:
        features = documents(given["ids"], width=state["items", "features", "tokens"].shape[1])
        return negcache_fn.update(state, features, embeddings, group=group, **options)

    def prefill(encode: Callable[[Any], Tensor] = encode) -> TensorDictBase:
        return negcache_fn.prefill(state, [given["features"]], encode, group=group)

    other = draw._replace(noise=draw.noise + 1)  # as from a cache with another seed

    def merge(a: negcache_fn.Draw = draw, b: negcache_fn.Draw = other) -> negcache_fn.Draw:
        return negcache_fn.merge_draws(a, b, group=group)

    return {
        "sample_gumbel": lambda state=state: negcache_fn.sample_gumbel(state, queries, group=group),
        "take": lambda state=state: negcache_fn.take(state, torch.arange(3), group=group),
        "unshard": lambda state=state: distributed.unshard(state, group),
        "average_gradients": lambda parameters=(parameter,): distributed.average_gradients(parameters, group),
        "loss": loss,
        "exact_loss": exact,
        "update": update,
        "prefill": prefill,
        "merge_draws": merge,
    }


def wider(state: TensorDictBase) -> TensorDictBase:
    return negcache_fn.init_cache(CAPACITY, DIM, documents(torch.arange(1), width=5))


def failing(*_: Any) -> Tensor:
    raise RuntimeError("out of paper")


IN_BFLOAT16 = torch.ones(BATCH, DIM, dtype=torch.bfloat16)
FUNCTIONS: dict[str, tuple[str, Callable[[TensorDictBase], dict[str, Any]], str]] = {
    # The function, what rank 1 gives it, and what all ranks are told.
    "draw": ("sample_gumbel", lambda state: {"state": narrow(state)}, r"'embedding'\].dtype differs"),
    "take": ("take", lambda state: {"state": wider(state)}, r"features\['mask'\].shape\[1\] differs"),
    "unshard": ("unshard", lambda state: {"state": wider(state)}, r"features\['mask'\].shape\[1\] differs"),
    "unshard later": ("unshard", lambda state: {"state": later(state)}, r"step differs .*: \[1, 2\]"),
    "shape": (
        "average_gradients",
        lambda _: {"parameters": [torch.nn.Parameter(torch.ones(4))]},
        r"parameters\[0\].shape\[1\] differs between the ranks of the group: \[3, 4\]",
    ),
    "number": (
        "average_gradients",
        lambda _: {"parameters": []},
        r"parameters\[0\].dtype differs .*\[torch.float32, no",
    ),
    "documents": ("loss", lambda _: {"documents": IN_BFLOAT16}, r"documents.dtype differs"),
    "negatives": ("loss", lambda _: {"negatives": IN_BFLOAT16}, r"negatives.dtype differs"),
    "limit": ("loss", lambda _: {"false_negatives": negcache_fn.FalseNegatives(max_score=failing)}, "out of paper"),
    "exact documents": ("exact_loss", lambda _: {"documents": IN_BFLOAT16.float().requires_grad_()}, r"documents.req"),
    "exact limit": (
        "exact_loss",
        lambda _: {"false_negatives": negcache_fn.FalseNegatives(max_score=lambda positive: positive[:2])},
        r"false_negatives.max_score gave \(2,\) for the positives' scores; expected \[4\]",
    ),
    "update": ("update", lambda _: {"embeddings": IN_BFLOAT16}, r"embeddings.dtype differs"),
    "update of other": ("update", lambda state: {"state": wider(state)}, r"features\['mask'\].shape\[1\] differs"),
    "refresh": (
        "update",
        lambda _: {"refresh": (torch.arange(BATCH), IN_BFLOAT16)},
        r"refresh\[1\].dtype differs between the ranks of the group: \[torch.float32, torch.bfloat16\]",
    ),
    "prefill": ("prefill", lambda _: {"encode": failing}, "out of paper"),
    "merge": ("merge_draws", lambda _: {"b": None}, "b is a NoneType; expected a Draw"),
}


def narrow(state: TensorDictBase) -> TensorDictBase:
    narrower = negcache_fn.init_cache(CAPACITY, DIM, documents(torch.arange(1)), embedding_dtype=torch.float16)
    narrower["step"].copy_(state["step"])
    return narrower


def later(state: TensorDictBase) -> TensorDictBase:
    state = state.clone()
    state["step"].add_(1)
    return state


def different_in_function(rank: int, world: int, *, name: str, draws: dict[str, int]) -> tuple[str, float]:
    """The error, and the seconds until it came; the same call works afterwards."""
    given = arguments(rank, world)
    negcache_fn.step_(**step_keywords(**given))
    draw = negcache_fn.sample_gumbel(given["state"], given["queries"], group=given["group"], **draws)
    function, change, _ = FUNCTIONS[name]
    call, common = function_calls(given, draw)[function], {}
    if name == "refresh":
        common["refresh"] = (torch.arange(BATCH), torch.ones(BATCH, DIM))
    elif name == "limit":
        common["false_negatives"] = negcache_fn.FalseNegatives(max_score=lambda positive: positive + 1)
    started = time.perf_counter()
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call(**common | (change(given["state"]) if rank == 1 else {}))
    seconds = time.perf_counter() - started
    call(**common)
    return str(caught.value), seconds


def test_other_functions_tell_every_rank(tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        f"{name}-{draws}": (different_in_function, {"name": name, "draws": {draws: 8 if draws == "num_draws" else 1}})
        for name in FUNCTIONS
        for draws in (
            ("num_draws", "draws_per_query") if FUNCTIONS[name][0] in ("loss", "merge_draws") else ("num_draws",)
        )
    }
    for name, of_ranks in run_ranks(2, cases, tmp_path).items():
        for text, seconds in of_ranks:
            assert re.search(FUNCTIONS[name.split("-")[0]][2], text), (name, text)
            assert seconds < LONGEST_SECONDS


def test_a_batch_larger_than_the_cache(group_of_one: dist.ProcessGroup) -> None:
    """The capacity is per rank only where there are ranks, and too many queries are not told to bring documents."""
    for group, whose in ((None, "the cache"), (group_of_one, "the cache per rank")):
        state = negcache_fn.init_cache(1024, DIM, torch.zeros(1, 3))
        queries, features = torch.zeros(4, DIM), torch.zeros(1025, 3)
        encoder = torch.nn.Linear(3, DIM)
        with pytest.raises(ValueError, match=f"features has 1025 rows; .* at most 1024, the capacity of {whose}$"):
            negcache_fn.step(state, queries, features, encoder, group=group)
        with pytest.raises(ValueError, match=f"queries has 1025 rows; expected at most 1024, the capacity of {whose}$"):
            negcache_fn.step(state, torch.zeros(1025, DIM), features, encoder, group=group)
        with pytest.raises(ValueError, match=f"embeddings has 1025 rows; .* at most 1024, the capacity of {whose}$"):
            negcache_fn.update(state, features, torch.zeros(1025, DIM), group=group)


def test_remedies_fit_what_differs(tmp_path: Path) -> None:
    """Fewer queries are those of a last batch; other numbers of documents alone are not."""
    cases: dict[str, Any] = {"queries": (fewer, {"queries": 3}), "documents": (fewer, {"queries": 4})}
    results = run_ranks(2, cases, tmp_path)
    for text in results["queries"]:
        assert r"queries differs between the ranks of the group: [4, 3] (drop_last=True" in text
    for text in results["documents"]:
        assert "documents differs between the ranks of the group: [6, 5] (the batch of each rank needs equally" in text
        assert "drop_last" not in text


def fewer(rank: int, world: int, *, queries: int) -> str:
    """Rank 0 has 4 queries and 6 documents, rank 1 fewer."""
    given = arguments(rank, world)
    count = 6 - rank
    given |= {"features": documents(torch.arange(count)), "ids": torch.arange(count)}
    given["queries"] = given["queries"][: queries if rank else 4]
    with pytest.raises(ValueError, match="expected the same") as caught:
        negcache_fn.step_(**step_keywords(**given))
    return str(caught.value)
