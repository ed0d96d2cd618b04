"""An error in a function that a step calls back, on one rank, is an error on every rank, and nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import negcache_fn
from negcache_fn import distributed
from tests.support.builders import same_snapshot, snapshot
from tests.support.options import step_keywords
from tests.support.processes import run_ranks
from tests.support.sharded_training import DIM, Tower, features, whole_cache

LONGEST_SECONDS = 10
KINDS: dict[str, dict[str, Any]] = {
    "global": {"in_batch": "global", "num_draws": 12, "refresh_stalest": 2},
    "own": {"in_batch": True, "num_draws": 12},
    "queries": {"in_batch": "global", "draws_per_query": 2},
    "own draws": {"in_batch": False, "draws_per_query": 2, "share_draws": False},
    "replicated": {"in_batch": "global", "placement": "replicated"},
}


class Encoder:
    """A tower that goes wrong in one of its calls in a step."""

    def __init__(self, wrong: Callable[[Tensor], Tensor] | None, call: int) -> None:
        self.tower, self.wrong, self.call, self.calls = Tower(torch.float32, 1), wrong, call, 0

    def __call__(self, documents: Any) -> Tensor:
        embeddings = self.tower(documents)
        self.calls += 1
        return embeddings if self.wrong is None or self.calls != self.call else self.wrong(embeddings)


def fail(_: Tensor) -> Tensor:
    raise KeyError("no such word")


ENCODERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "raises": (fail, "no such word"),
    "columns": (lambda embeddings: embeddings[:, 1:], "the output of encode has shape"),
    "rows": (lambda embeddings: embeddings[1:], "the output of encode has shape"),
    "list": (lambda embeddings: embeddings.tolist(), "the output of encode is a list"),
}


def arguments(rank: int, world: int, kind: str) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    ids = torch.arange(4) + 4 * rank
    whole = whole_cache(torch.float32)
    return KINDS[kind] | {
        "state": whole.clone() if kind == "replicated" else distributed.shard(whole, group),
        "queries": torch.linspace(-1, 1, 4 * DIM).view(4, DIM).requires_grad_(),
        "features": features(ids, torch.float32),
        "encode": Encoder(None, 0),
        "ids": ids,
        "group": group,
    }


def failed(rank: int, world: int, *, kind: str, given: dict[str, Any], right: dict[str, Any]) -> tuple[str, bool]:
    """The error; whether it came soon, left the state as it was, and the next step works."""
    known = arguments(rank, world, kind) | right
    before = snapshot(known["state"])
    started = time.perf_counter()
    with pytest.raises((ValueError, TypeError, KeyError)) as caught:
        negcache_fn.step_(**step_keywords(**known | (given if rank == world - 1 else {})))
    soon = time.perf_counter() - started < LONGEST_SECONDS
    untouched = same_snapshot(before, snapshot(known["state"]))
    negcache_fn.step_(**step_keywords(**known)).loss.backward()
    return f"{type(caught.value).__name__} {caught.value}", soon and untouched


def encoder_fails(rank: int, world: int, *, kind: str, wrong: str, call: int) -> tuple[str, bool]:
    return failed(rank, world, kind=kind, given={"encode": Encoder(ENCODERS[wrong][0], call)}, right={})


@pytest.mark.parametrize("world", [2, 3])
def test_an_encoder_that_fails_on_one_rank(world: int, tmp_path: Path) -> None:
    cases: dict[str, Any] = {}
    for kind, options in KINDS.items():
        for wrong in ENCODERS if world == 2 else ["raises"]:
            for call in (1,) if "draws_per_query" in options else (1, 2):
                cases[f"{kind}-{wrong}-{call}"] = (encoder_fails, {"kind": kind, "wrong": wrong, "call": call})
    for name, (*others, own) in run_ranks(world, cases, tmp_path).items():
        text = ENCODERS[name.split("-")[1]][1]
        assert text in own[0], name
        for told, fine in others:
            assert told.startswith(
                "ValueError the step failed on another rank of the group, where it called back. rank"
            )
            assert f"rank {world - 1}: " in told
            assert text in told
            assert fine, name
        assert own[1], name


def limit_fails(rank: int, world: int, *, kind: str, limit: Callable[[Tensor], Tensor]) -> tuple[str, bool]:
    right = negcache_fn.FalseNegatives(max_score=plus_one)
    wrong = negcache_fn.FalseNegatives(max_score=limit)
    return failed(rank, world, kind=kind, given={"false_negatives": wrong}, right={"false_negatives": right})


def plus_one(positive: Tensor) -> Tensor:
    return positive + 1


def first_two(positive: Tensor) -> Tensor:
    return positive[:2]


def test_a_limit_that_fails_on_one_rank(tmp_path: Path) -> None:
    limits = {"raises": (fail, "no such word"), "shape": (first_two, "max_score gave (2,) for the positives' scores")}
    cases: dict[str, Any] = {
        f"{kind}-{name}": (limit_fails, {"kind": kind, "limit": limit})
        for kind in KINDS
        for name, (limit, _) in limits.items()
    }
    for name, of_ranks in run_ranks(2, cases, tmp_path).items():
        for told, fine in of_ranks:
            assert limits[name.split("-")[1]][1] in told, name
            assert fine, name


def other_embeddings(rank: int, world: int, *, kind: str, change: Callable[[Tensor], Tensor]) -> tuple[str, bool]:
    class Changed(Encoder):
        def __call__(self, documents: Any) -> Tensor:
            return change(super().__call__(documents))

    return failed(rank, world, kind=kind, given={"encode": Changed(None, 0)}, right={})


def halved(embeddings: Tensor) -> Tensor:
    return embeddings.bfloat16()


def frozen(embeddings: Tensor) -> Tensor:
    return embeddings.detach()


def test_embeddings_of_another_kind_on_one_rank(tmp_path: Path) -> None:
    changes = {
        "dtype": (halved, "[torch.float32 with a gradient, torch.bfloat16 with a gradient]"),
        "gradient": (frozen, "[torch.float32 with a gradient, torch.float32 without a gradient]"),
    }
    cases: dict[str, Any] = {
        f"{kind}-{name}": (other_embeddings, {"kind": kind, "change": change})
        for kind in KINDS
        for name, (change, _) in changes.items()
    }
    for name, of_ranks in run_ranks(2, cases, tmp_path).items():
        for told, fine in of_ranks:
            expected = f"the output of encode differs between the ranks of the group: {changes[name.split('-')[1]][1]}"
            assert expected in told, name
            assert fine, name


def finite_fails(rank: int, world: int) -> str:
    """A guarded encoder that raises before it is known whether its embeddings are finite."""
    group = dist.group.WORLD
    inner = Encoder(fail, rank)  # rank 1 fails in its first call
    encode = negcache_fn.require_finite(inner, group=group)
    documents = features(torch.arange(4), torch.float32)
    with pytest.raises((ValueError, KeyError)) as caught:
        encode(documents)
    encode(documents)
    return str(caught.value)


def test_a_guarded_encoder_that_fails_on_one_rank(tmp_path: Path) -> None:
    for told in run_ranks(2, {"finite": (finite_fails, {})}, tmp_path)["finite"]:
        assert "no such word" in told
