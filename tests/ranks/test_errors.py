"""What does not fit is an error on every rank, and leaves a group and a state that go on working."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDictBase

import negcache_fn
from negcache_fn import distributed
from tests.support.builders import same_snapshot, snapshot
from tests.support.options import step_keywords
from tests.support.processes import run_ranks
from tests.support.sharded_training import DIM, Tower, features, whole_cache
from tests.support.strategies import soft_cap

LONGEST_SECONDS = 20


def arguments(rank: int, world: int) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    ids = torch.arange(4) + 4 * rank
    return {
        "state": distributed.shard(whole_cache(torch.float32), group),
        "queries": torch.ones(4, DIM),
        "features": features(ids, torch.float32),
        "encode": Tower(torch.float32, 1),
        "ids": ids,
        "in_batch": "global",
        "group": group,
    }


def shorter_batch(rank: int, given: dict[str, Any]) -> None:
    if rank == 1:
        given |= {
            "queries": torch.ones(3, DIM),
            "features": features(torch.arange(3), torch.float32),
            "ids": torch.arange(3),
        }


def more_documents(rank: int, given: dict[str, Any]) -> None:
    if rank == 1:
        given |= {"features": features(torch.arange(6), torch.float32), "ids": torch.arange(6)}


def other_samples(rank: int, given: dict[str, Any]) -> None:
    given["draws_per_query"] = 1 + rank


def other_draws(rank: int, given: dict[str, Any]) -> None:
    given["num_draws"] = 4 - 2 * rank


def other_options(rank: int, given: dict[str, Any]) -> None:
    given["evict"] = "fifo" if rank else "lru"


def no_ids_on_one(rank: int, given: dict[str, Any]) -> None:
    if rank == 0:
        del given["ids"]


def wrong_on_one(rank: int, given: dict[str, Any]) -> None:
    if rank == 1:
        given["features"] = {"text": given["features"]["text"]}


def rows_of_others(rank: int, given: dict[str, Any]) -> None:
    given["positive_rows"] = torch.arange(4)[:, None] + rank


def more_positives(rank: int, given: dict[str, Any]) -> None:
    given["positive_rows"] = torch.zeros(4, 1 + rank, dtype=torch.int64)


def labels_on_one(rank: int, given: dict[str, Any]) -> None:
    if rank == 0:
        slots = given["state"]["items", "id"]
        labels = negcache_fn.Labels(given["ids"], given["ids"], slots)
        given["false_negatives"] = negcache_fn.FalseNegatives(labels=labels)


def unequal_shards(rank: int, given: dict[str, Any]) -> None:
    if rank == 0:
        given["state"] = empty(1024, given)


def odd_last_shard(rank: int, given: dict[str, Any]) -> None:
    given["state"] = empty(1024 - 24 * rank, given)


def odd_shards(_rank: int, given: dict[str, Any]) -> None:
    given["state"] = empty(1000, given)


def other_seed(rank: int, given: dict[str, Any]) -> None:
    given["state"] = given["state"].clone()
    given["state"]["seed"].fill_(rank)


def empty(capacity: int, given: dict[str, Any]) -> TensorDictBase:
    state = negcache_fn.init_cache(capacity, DIM, given["features"])
    state["step"].copy_(given["state"]["step"])
    return state


MISTAKES: dict[Callable[[int, dict[str, Any]], None], tuple[str, str]] = {
    # What rank 0 is told, and rank 1.
    shorter_batch: (r"queries differs between the ranks of the group: \[4, 3\]",) * 2,
    more_documents: (r"documents differs between the ranks of the group: \[4, 6\]",) * 2,
    other_samples: (r"draws_per_query differs between the ranks of the group: \[1, 2\]",) * 2,
    other_draws: (r"num_draws differs between the ranks of the group: \[4, 2\]",) * 2,
    other_options: (r"evict differs between the ranks of the group: \[lru, fifo\]",) * 2,
    no_ids_on_one: (r"ids differs between the ranks of the group: \[False, True\]",) * 2,
    more_positives: (r"positive_rows differs between the ranks of the group: \[1, 2\]",) * 2,
    labels_on_one: (r"labels differs between the ranks of the group: \[True, False\]",) * 2,
    rows_of_others: (
        "an argument on another rank of the group is invalid. rank 1: ValueError: positive_rows has the row 4",
        "positive_rows has the row 4; expected rows below 4",
    ),
    wrong_on_one: (
        "an argument on another rank of the group is invalid. rank 1: ValueError: features has keys",
        r"features has keys \['text'\]; expected those of the cache",
    ),
    unequal_shards: (r"the shards of the ranks have \[1024, 3072\] slots; expected multiples of 1024",) * 2,
    other_seed: (r"seed differs between the ranks of the group: \[0, 1\]",) * 2,
    odd_last_shard: (r"the shards of the ranks have \[1024, 1000\] slots; expected multiples of 1024",) * 2,
    odd_shards: (r"the shards of the ranks have \[1000, 1000\] slots; expected multiples of 1024",) * 2,
}


def mistaken(rank: int, world: int, *, mistake: Callable[[int, dict[str, Any]], None]) -> tuple[str, float, bool]:
    """The error's text, how long it took, and whether the next step works and had not been touched."""
    correct, given = arguments(rank, world), arguments(rank, world)
    given["state"] = correct["state"]
    before = correct["state"].clone()
    mistake(rank, given)
    started = time.perf_counter()
    with pytest.raises((ValueError, TypeError)) as caught:
        negcache_fn.step_(**step_keywords(**given))
    seconds = time.perf_counter() - started
    untouched = bool((correct["state"] == before).all())
    negcache_fn.step_(**step_keywords(**correct)).loss.backward()
    return str(caught.value), seconds, untouched


def test_mistakes_are_told_on_every_rank(tmp_path: Path) -> None:
    cases = {mistake.__name__: (mistaken, {"mistake": mistake}) for mistake in MISTAKES}
    results = run_ranks(2, cases, tmp_path)
    for mistake, expected in MISTAKES.items():
        for rank, (text, seconds, untouched) in enumerate(results[mistake.__name__]):
            with pytest.raises(ValueError, match=expected[rank]):
                raise ValueError(text)
            assert seconds < LONGEST_SECONDS
            assert untouched, mistake.__name__


OTHER: dict[str, Any] = {
    "draws_per_query": 2,
    "num_draws": 2,
    "share_draws": False,
    "top_k": 9,
    "score_transform": soft_cap,
    "hardness": 1.5,
    "in_batch": True,
    "staleness_correction": "none",
    "weigh_positives": False,
    "reduction": "sum",
    "evict": "fifo",
    "refresh_stalest": 3,
    "placement": "replicated",
    "scale": 2.0,
}
"""What rank 1 is given; rank 0 has the default, or "global" for the batch."""


def differing(rank: int, world: int, *, name: str) -> tuple[str, bool]:
    """The error's text, and whether the state is as it was and the next step works."""
    correct, given = arguments(rank, world), arguments(rank, world)
    given["state"] = correct["state"]
    if name == "share_draws":  # of draws of each query
        given["draws_per_query"] = 2
    before = snapshot(correct["state"])
    if rank == 1:
        given[name] = OTHER[name]
    with pytest.raises(ValueError, match="expected the same") as caught:
        negcache_fn.step_(**step_keywords(**given))
    untouched = same_snapshot(before, snapshot(correct["state"]))
    negcache_fn.step_(**step_keywords(**correct)).loss.backward()
    return str(caught.value), untouched


def test_ranks_that_differ_in_one_option_or_the_scale(tmp_path: Path) -> None:
    assert OTHER.keys() == {field.name for field in dataclasses.fields(negcache_fn.StepOptions)} | {"scale"}
    results = run_ranks(2, {name: (differing, {"name": name}) for name in OTHER}, tmp_path)
    for name, of_ranks in results.items():
        for text, untouched in of_ranks:
            assert untouched, name
            assert name.replace("score_transform", "score transform") in text
            assert "expected the same" in text


def differing_functions(rank: int, world: int, *, function: str, name: str) -> str:
    given = arguments(rank, world)
    state, queries, group = given["state"], given["queries"], given["group"]
    documents = torch.ones(4, DIM)
    draw = negcache_fn.sample_gumbel(state, queries, group=group)
    calls: dict[str, Callable[..., Any]] = {
        "sample_gumbel": functools.partial(negcache_fn.sample_gumbel, state, queries),
        "loss": functools.partial(negcache_fn.loss, queries, documents, draw.embedding.flatten(0, 1), draw),
        "exact_loss": functools.partial(negcache_fn.exact_loss, state, queries, documents),
        "top_negatives": functools.partial(negcache_fn.top_negatives, state, queries, 3),
    }
    with pytest.raises(ValueError, match="expected the same") as caught:
        calls[function](group=group, **({name: OTHER[name]} if rank else {}))
    return str(caught.value)


def test_ranks_that_differ_in_other_functions(tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        f"{function}-{name}": (differing_functions, {"function": function, "name": name})
        for function in ("sample_gumbel", "loss", "exact_loss", "top_negatives")
        for name in ("scale", "score_transform")
    }
    for name, of_ranks in run_ranks(2, cases, tmp_path).items():
        for text in of_ranks:
            assert name.split("-")[1].replace("_", " ") in text


def test_group_and_placement_are_checked() -> None:
    state = whole_cache(torch.float32)
    with pytest.raises(TypeError, match=r"group is a str; expected a torch\.distributed process group"):
        negcache_fn.sample_gumbel(state, torch.ones(2, DIM), group="gloo")
    with pytest.raises(ValueError, match="placement is 'replicated' without a group"):
        negcache_fn.sample_gumbel(state, torch.ones(2, DIM), placement="replicated")
    with pytest.raises(ValueError, match="in_batch is 'global' without a group"):
        negcache_fn.exact_loss(state, torch.ones(2, DIM), torch.ones(2, DIM), in_batch="global")
    with pytest.raises(ValueError, match="expected True, False or 'global'"):
        negcache_fn.exact_loss(state, torch.ones(2, DIM), torch.ones(2, DIM), in_batch="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="capacity is 1000; expected a multiple of 1024, such as 1024"):
        distributed.local_capacity(1000)


def capacities(rank: int, world: int) -> tuple[int, str]:
    with pytest.raises(
        ValueError, match="leaves some of the 3 ranks without any; expected a multiple of 3072"
    ) as caught:
        distributed.local_capacity(4096, dist.group.WORLD)
    return distributed.local_capacity(5120, dist.group.WORLD), str(caught.value)


def test_no_rank_is_left_without_slots(tmp_path: Path) -> None:
    assert [rows for rows, _ in run_ranks(3, {"capacities": (capacities, {})}, tmp_path)["capacities"]] == [
        2048,
        2048,
        1024,
    ]
