"""Bad input is a ValueError or TypeError that names the argument, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

import negcache_fn
from tests.support.builders import at_step, same_snapshot, snapshot, unit
from tests.support.options import step_keywords

CAPACITY, DIM = 6, 4


def example(rows: int = 2, width: int = 3) -> dict[str, Any]:
    """Nested features: token ids and a float."""
    return {"tokens": {"input_ids": torch.ones(rows, width, dtype=torch.int64)}, "price": torch.ones(rows)}


def filled() -> TensorDictBase:
    """A cache with four documents of six."""
    state = negcache_fn.init_cache(CAPACITY, DIM, example(1))
    return negcache_fn.update(state, example(4), unit(4, DIM, 0), ids=torch.arange(4))


def encode(features: Any) -> Tensor:
    """Embeddings that depend on nothing but the rows' price."""
    return features["price"][:, None] * torch.ones(DIM)


def sampled(state: TensorDictBase, rows: int = 2) -> negcache_fn.Draw:
    """A good draw."""
    return negcache_fn.sample_gumbel(state, unit(rows, DIM, 1), draws_per_query=2)


@dataclass(frozen=True)
class Call:
    """A good call of a function, and one bad argument put in its place."""

    function: str
    argument: str
    value: Any
    error: type[Exception]
    says: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)


def good(function: str, state: TensorDictBase) -> dict[str, Any]:
    """Arguments by name with which each function works."""
    queries, documents = unit(2, DIM, 1), unit(3, DIM, 2)
    batch, embeddings = example(3), unit(3, DIM, 3)
    made: dict[str, dict[str, Any]] = {
        "init_cache": {"capacity": CAPACITY, "embedding_dim": DIM, "features": example()},
        "score": {"state": state, "queries": queries},
        "sample_gumbel": {"state": state, "queries": queries},
        "take": {"state": state, "slots": torch.tensor([0])},
        "loss": {"queries": queries, "documents": documents, "negatives": unit(4, DIM, 4), "draw": sampled(state)},
        "exact_loss": {"state": state, "queries": queries, "documents": documents},
        "update": {"state": state, "features": batch, "embeddings": embeddings},
        "step": {"state": state, "queries": queries, "features": batch, "encode": encode, "draws_per_query": 1},
        "top_negatives": {"state": state, "queries": queries, "n": 2},
        "stalest": {"state": state, "n": 2},
        "occupancy": {"state": state},
        "merge_draws": {"a": sampled(state), "b": sampled(at_step(state, 9))},
    }
    return made[function.rstrip("_")]


def called(name: str, arguments: dict[str, Any]) -> Any:
    """Calls the function; the options of a step are given as keywords here."""
    function: Callable[..., Any] = getattr(negcache_fn, name)
    return function(**(step_keywords(**arguments) if name.startswith("step") else arguments))


def wrong_documents() -> list[tuple[str, Any, type[Exception], tuple[str, ...]]]:
    """Feature batches that do not fit the slots, with what the message must say."""
    missing = {"tokens": {"input_ids": torch.ones(3, 3, dtype=torch.int64)}}
    extra = {**example(3), "title": torch.ones(3)}
    nested = {"tokens": {"words": torch.ones(3, 3, dtype=torch.int64)}, "price": torch.ones(3)}
    dtype = {**example(3), "price": torch.ones(3, dtype=torch.int64)}
    deep = {"tokens": {"input_ids": torch.ones(3, 3)}, "price": torch.ones(3)}
    longer, ranks = example(3, width=5), {**example(3), "price": torch.ones(3, 2)}
    ragged = {**example(3), "price": torch.ones(2)}
    return [
        ("missing key", missing, ValueError, ("price",)),
        ("unknown key", extra, ValueError, ("title",)),
        ("nested key", nested, ValueError, ("words",)),
        ("dtype", dtype, TypeError, ("price", "int64", "float32")),
        ("nested dtype", deep, TypeError, ("['tokens']['input_ids']", "float32", "int64")),
        ("longer than the slot", longer, ValueError, ("['tokens']['input_ids']", "5", "3")),
        ("dimensions", ranks, ValueError, ("price",)),
        ("rows differ", ragged, ValueError, ("2", "3")),
        ("larger than the cache", example(7), ValueError, ("7", "6")),
        ("a tensor for a dict", torch.ones(3), TypeError, ()),
        ("no features at all", None, TypeError, ()),
    ]


def calls() -> dict[str, Call]:
    """Every bad case."""
    made: list[tuple[str, Call]] = []

    def add(name: str, *arguments: Any, **extra: Any) -> None:
        made.append((f"{arguments[0]}-{name}", Call(*arguments, extra=extra)))

    for name in ("capacity", "embedding_dim"):
        for value in (0, -3):
            add(f"{name} {value}", "init_cache", name, value, ValueError, (str(value),))
        add(f"{name} no integer", "init_cache", name, 2.5, TypeError, ("2.5",))
    add("embedding_dtype", "init_cache", "embedding_dtype", torch.int64, (TypeError, ValueError), ("int64",))
    for value in ("a", None, 1.5):
        add(f"seed {value}", "init_cache", "seed", value, TypeError, (repr(value), "integer"))
    add("seed large", "init_cache", "seed", 2**63, ValueError, (str(2**63),))
    add("embedding_dtype name", "init_cache", "embedding_dtype", "float32", TypeError, ("float32",))
    add("embedding_dtype float8", "init_cache", "embedding_dtype", torch.float8_e4m3fn, TypeError, ("float8_e4m3fn",))
    add("features", "init_cache", "features", 3, TypeError, ("int",))
    add("features leaf", "init_cache", "features", {"x": [1, 2]}, TypeError, ("list", "x"))
    add("features 0-d", "init_cache", "features", {"x": torch.tensor(1)}, ValueError, ("x",))
    add("no features", "init_cache", "features", {}, ValueError, ())

    takes_queries = ("score", "sample_gumbel", "exact_loss", "top_negatives", "step", "step_", "loss")
    for name in takes_queries:
        add("queries D", name, "queries", unit(2, 5, 0), ValueError, ("5", "4"))
        add("queries 1-d", name, "queries", torch.ones(DIM), ValueError, ("(4,)",))
        add("queries dtype", name, "queries", torch.ones(2, DIM, dtype=torch.int64), TypeError, ("int64",))
        add("queries type", name, "queries", [[1.0] * DIM] * 2, TypeError, ("list",))
        add("scale dimensions", name, "scale", torch.ones(2), (ValueError, TypeError), ("(2,)",))
        add("scale type", name, "scale", "20", TypeError, ("str",))
        if name != "loss":
            add("queries device", name, "queries", torch.ones(2, DIM, device="meta"), ValueError, ("meta", "cpu"))

    takes_state = (
        "score",
        "sample_gumbel",
        "take",
        "exact_loss",
        "update",
        "update_",
        "step",
        "step_",
        "top_negatives",
    )
    for name in (*takes_state, "stalest", "occupancy"):
        add("state dict", name, "state", {"items": 3}, TypeError, ("dict",))
        add("state other", name, "state", TensorDict({"a": torch.ones(2)}, batch_size=[]), (ValueError, TypeError), ())

    for name in ("sample_gumbel", "step", "step_"):
        for value in (0, -1):
            add(f"draws_per_query {value}", name, "draws_per_query", value, ValueError, (str(value),))
            add(f"top_k {value}", name, "top_k", value, ValueError, (str(value),))
        add("draws_per_query type", name, "draws_per_query", 1.5, TypeError, ("1.5",))
    add("top_k", "exact_loss", "top_k", 0, ValueError, ("0",))
    add("top_k large", "sample_gumbel", "top_k", 7, ValueError, ("7", "6"))
    for value in (0, -1, 7):
        add(f"n {value}", "top_negatives", "n", value, ValueError, (str(value),))
    add("n", "stalest", "n", -1, ValueError, ("-1",))
    for name in ("sample_gumbel", "top_negatives"):
        add("exclude rows", name, "exclude_ids", torch.zeros(3, 1, dtype=torch.int64), ValueError, ("3", "2"))
        add("exclude 3-d", name, "exclude_ids", torch.zeros(2, 1, 1, dtype=torch.int64), ValueError, ("(2, 1, 1)",))
        add("exclude dtype", name, "exclude_ids", torch.zeros(2), TypeError, ("float32", "int64"))
    add("dtype", "take", "slots", torch.tensor([0.5]), TypeError, ("float32", "int64"))

    for name in ("loss", "exact_loss", "update", "update_", "step", "step_"):
        add("ids rows", name, "ids", torch.arange(5), ValueError, ("5", "3"))
        add("ids 2-d", name, "ids", torch.arange(3)[:, None], ValueError, ("(3, 1)",))
        add("ids dtype", name, "ids", torch.ones(3), TypeError, ("float32", "int64"))
        add("log_weights rows", name, "log_weights", torch.ones(2), ValueError, ("2", "3"))
        add("log_weights dtype", name, "log_weights", torch.ones(3, dtype=torch.int64), TypeError, ("int64",))
    for name in ("loss", "exact_loss", "step", "step_"):
        add("positive_rows rows", name, "positive_rows", torch.zeros(3, 1).long(), ValueError, ("(3, 1)", "[2, P]"))
        add("positive_rows 1-d", name, "positive_rows", torch.arange(2), ValueError, ("(2,)", "[2, P]"))
        add("positive_rows none", name, "positive_rows", torch.zeros(2, 0).long(), ValueError, ("(2, 0)",))
        add("positive_rows dtype", name, "positive_rows", torch.zeros(2, 1), TypeError, ("float32", "int64"))
        add("positive_rows type", name, "positive_rows", [[0], [1]], TypeError, ("list",))
        limited = {"false_negatives": negcache_fn.FalseNegatives(max_score=lambda positive: positive)}
        rows = torch.zeros(2, 2).long()
        add("limits by several", name, "positive_rows", rows, ValueError, ("max_score", "(2, 2)"), **limited)
        add("weigh_positives", name, "weigh_positives", 1, TypeError, ("1", "True or False"))
        add("reduction", name, "reduction", "average", ValueError, ("'average'", "'mean'", "'sum'", "'none'"))
    wrong: list[tuple[str, Any, type[Exception], tuple[str, ...]]] = [
        ("type", torch.ones(2, 3), TypeError, ("Tensor", "FalseNegatives")),
        ("ids 1-d", negcache_fn.FalseNegatives(torch.ones(2).long()), ValueError, ("false_negatives.ids", "(2,)")),
        ("ids rows", negcache_fn.FalseNegatives(torch.ones(3, 2).long()), ValueError, ("(3, 2)", "[2, P]")),
        ("ids dtype", negcache_fn.FalseNegatives(torch.ones(2, 2)), TypeError, ("float32", "int64")),
        ("max_score rows", negcache_fn.FalseNegatives(None, torch.ones(3)), ValueError, ("max_score", "(3,)", "[2]")),
        ("max_score dtype", negcache_fn.FalseNegatives(None, torch.ones(2).long()), ValueError, ("int64",)),
        ("max_score type", negcache_fn.FalseNegatives(None, "high"), TypeError, ("max_score", "str")),
    ]
    labels = torch.arange(2)
    wrong += [
        (f"labels {what}", negcache_fn.FalseNegatives(labels=given), error, says)
        for what, given, error, says in (
            ("type", labels, TypeError, ("Tensor", "negcache_fn.Labels")),
            ("rows", negcache_fn.Labels(torch.arange(3)), ValueError, ("labels.queries", "(3,)", "[2]")),
            ("2-d", negcache_fn.Labels(torch.ones(2, 1).long()), ValueError, ("labels.queries", "(2, 1)")),
            ("dtype", negcache_fn.Labels(torch.ones(2)), TypeError, ("labels.queries", "float32", "int64")),
            ("list", negcache_fn.Labels([0, 1]), TypeError, ("labels.queries", "list")),
            ("device", negcache_fn.Labels(labels.to("meta")), ValueError, ("labels.queries", "meta", "cpu")),
        )
    ]
    gives_wrong: list[tuple[str, Any, type[Exception], tuple[str, ...]]] = [
        ("max_score function", negcache_fn.FalseNegatives(None, lambda p: p.sum()), ValueError, ("()", "[2]")),
        ("max_score function of nothing", negcache_fn.FalseNegatives(None, lambda p: 3.0), ValueError, ("float",)),
    ]
    no_function = negcache_fn.FalseNegatives(max_score=lambda positive: positive)
    for name in ("sample_gumbel", "top_negatives", "loss", "exact_loss", "step", "step_"):
        for what, value, error, says in wrong:
            add(f"false_negatives {what}", name, "false_negatives", value, error, says)
        if name in ("sample_gumbel", "top_negatives"):
            add("false_negatives function", name, "false_negatives", no_function, TypeError, ("not known here", "[2]"))
            continue
        for what, value, error, says in gives_wrong:
            add(f"false_negatives {what}", name, "false_negatives", value, error, says)
    for name in ("loss", "exact_loss", "step", "step_"):
        for what, own, says in (("none", None, "NoneType"), ("rows", torch.arange(2), "(2,)")):
            known = negcache_fn.FalseNegatives(labels=negcache_fn.Labels(labels, own, torch.arange(CAPACITY)))
            error = TypeError if own is None else ValueError
            add(f"labels.documents {what}", name, "false_negatives", known, error, ("labels.documents", says, "[3]"))
    for name in ("sample_gumbel", "top_negatives", "exact_loss", "step", "step_"):
        for what, cached, says in (("none", None, "NoneType"), ("rows", torch.arange(2), "(2,)")):
            known = negcache_fn.FalseNegatives(labels=negcache_fn.Labels(labels, torch.arange(3), cached))
            error = TypeError if cached is None else ValueError
            says = ("labels.cached", says, f"[{CAPACITY}]")
            add(f"labels.cached {what}", name, "false_negatives", known, error, says)
    undrawn = negcache_fn.FalseNegatives(labels=negcache_fn.Labels(labels, torch.arange(3)))
    add("labels that were not drawn with", "loss", "false_negatives", undrawn, ValueError, ("labels", "sample_gumbel"))
    for name in ("step", "step_"):
        add("refresh_stalest share", name, "refresh_stalest", 1.5, ValueError, ("1.5", "0 ... 1"))
    for name in ("loss", "exact_loss"):
        add("documents D", name, "documents", unit(3, 5, 0), ValueError, ("5", "4"))
        add("documents rows", name, "documents", unit(1, DIM, 0), ValueError, ("1", "2"))
        add("documents 1-d", name, "documents", torch.ones(DIM), ValueError, ("(4,)",))
    for name in ("loss", "step", "step_"):
        known = ("'median'", "'self_normalized'", "'none'")
        add("staleness_correction", name, "staleness_correction", "median", ValueError, known)
    add("negatives rows", "loss", "negatives", unit(3, DIM, 0), ValueError, ("3", "4"))
    add("negatives D", "loss", "negatives", unit(4, 5, 0), ValueError, ("5", "4"))
    add("draw type", "loss", "draw", (1, 2), TypeError, ("tuple", "Draw"))
    add("draw rows", "loss", "draw", sampled(filled(), rows=3), ValueError, ("3", "2"), negatives=unit(6, DIM, 0))
    add("type", "merge_draws", "b", (1, 2), TypeError, ("tuple", "Draw"))
    add("rows", "merge_draws", "b", sampled(filled(), rows=3), ValueError, ("3", "2"))

    for name in ("update", "update_", "step", "step_"):
        for what, value, error, says in wrong_documents():
            too_large = what == "larger than the cache" and name.startswith("update")
            known = {"embeddings": unit(7, DIM, 0)} if too_large else {}
            add(f"features {what}", name, "features", value, error, says, **known)
        add("evict", name, "evict", "random", ValueError, ("'random'", "'lru'", "'fifo'"))
        add("mask rows", name, "cacheable", torch.ones(2, dtype=torch.bool), ValueError, ("2", "3"))
        add("mask dtype", name, "cacheable", torch.ones(3), TypeError, ("float32", "bool"))
    for name in ("update", "update_"):
        add("embeddings D", name, "embeddings", unit(3, 5, 0), ValueError, ("5", "4"))
        add("embeddings rows", name, "embeddings", unit(2, DIM, 0), ValueError, ("2", "3"))
        add("embeddings dtype", name, "embeddings", torch.ones(3, DIM, dtype=torch.int64), TypeError, ("int64",))
        add("embeddings device", name, "embeddings", torch.ones(3, DIM, device="meta"), ValueError, ("meta", "cpu"))
        bad_slots: list[tuple[str, Any, Any, type[Exception], tuple[str, ...]]] = [
            ("slots 2-d", torch.zeros(2, 1, dtype=torch.int64), unit(2, DIM, 0), ValueError, ("(2, 1)",)),
            ("slots dtype", torch.zeros(2), unit(2, DIM, 0), TypeError, ("float32", "int64")),
            ("rows", torch.zeros(3, dtype=torch.int64), unit(2, DIM, 0), ValueError, ("2", "3")),
            ("D", torch.zeros(2, dtype=torch.int64), unit(2, 5, 0), ValueError, ("5", "4")),
        ]
        for what, slots, fresh, error, says in bad_slots:
            add(f"refresh {what}", name, "refresh", (slots, fresh), error, says)
        add("refresh type", name, "refresh", torch.zeros(2), TypeError, ("Tensor",))
    for name in ("step", "step_"):
        add("refresh_stalest", name, "refresh_stalest", -1, ValueError, ("-1",))
        add("fewer documents than queries", name, "queries", unit(4, DIM, 1), ValueError, ("3", "4"))
        add("encode rows", name, "encode", lambda f: encode(f)[:-1], ValueError, ("4", "5"))
        add("encode D", name, "encode", lambda f: torch.ones(len(f["price"]), 7), ValueError, ("7", "4"))
        add("encode 1-d", name, "encode", lambda f: f["price"], ValueError, ("(5,)",))
        add("encode type", name, "encode", lambda f: None, TypeError, ("NoneType",))
        add("encode no function", name, "encode", 3, TypeError, ("int",))
    return dict(made)


CALLS = calls()
DISAGREE: dict[str, tuple[str, ...]] = {
    "loss-draw rows": ("draw", "queries"),
    "merge_draws-rows": ("a", "b"),
    **{f"{name}-features larger than the cache": ("features", "embeddings") for name in ("update", "update_")},
    **{f"{name}-embeddings rows": ("features", "embeddings") for name in ("update", "update_")},
}
"""Two arguments that disagree with each other: either may be named."""


@pytest.mark.parametrize("function", sorted({call.function for call in CALLS.values()}))
def test_the_good_call_works(function: str) -> None:
    """Otherwise the errors below might be about something else."""
    called(function, good(function, filled()))


@pytest.mark.parametrize("name", CALLS)
def test_bad_input_is_named_and_changes_nothing(name: str) -> None:
    """The message has the argument's name, what was given and what was expected; the state is as it was."""
    call, state = CALLS[name], filled()
    arguments = good(call.function, state) | call.extra | {call.argument: call.value}
    before = snapshot(state)
    with pytest.raises(call.error) as raised:
        called(call.function, arguments)
    message = str(raised.value)
    assert any(name in message for name in DISAGREE.get(name, (call.argument,))), message
    for word in call.says:
        assert word in message, f"{word!r} not in {message!r}"
    assert same_snapshot(before, snapshot(state))
    assert state.is_locked


@pytest.mark.parametrize("name", ["step", "step_"])
def test_an_encoder_that_raises_leaves_the_state(name: str) -> None:
    """Its own error comes through."""

    def broken(features: Any) -> Tensor:
        raise RuntimeError("out of memory")

    state = filled()
    before = snapshot(state)
    with pytest.raises(RuntimeError, match="out of memory"):
        called(name, good(name, state) | {"encode": broken})
    assert same_snapshot(before, snapshot(state))
