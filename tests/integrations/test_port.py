"""The port beside this package: what docs/migrating.md says is equal, what it says is not, and the converter.

The port lies outside of the repository: `NEGATIVE_CACHE_PORT` names the folder that holds `negative_cache` (or a
clone, which has it in `src`); without it `../shared/reference` is looked at, as for `--reference` of the benchmarks.
What needs the port is skipped where it is not. Its global noise is seeded here; where a test compares number by number
it is given our draws, or ties by slot, which `torch.topk` leaves open and the TensorFlow original has.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

import negcache_fn
from negcache_fn.integrations.port import convert_cache, convert_caches, main
from tests.support import oracles
from tests.support.builders import make_state, same_snapshot, snapshot, unit
from tests.support.options import step_keywords

ROOT = Path(__file__).parents[2]
FOLDERS = [os.environ.get("NEGATIVE_CACHE_PORT"), ROOT.parent / "shared" / "reference"]
PLACES = [Path(folder) / inside for folder in FOLDERS if folder for inside in ("", "src")]
FOUND = next((place for place in PLACES if (place / "negative_cache").is_dir()), None)
needs_port = pytest.mark.skipif(
    FOUND is None, reason="the port is neither where NEGATIVE_CACHE_PORT says nor in ../shared/reference"
)

B, C, D, F = 3, 12, 4, 5
BETA = 3.0
PORTS_LOSS: dict[str, Any] = {"in_batch": False, "share_draws": False, "staleness_correction": "none"}
PORTS_ESTIMATOR = PORTS_LOSS | {"draws_per_query": 1}
STANDARD_ERRORS = 6.5  # of 24 means or more: a two-sided t test, at most 1.3e-6 for each number compared


class Cache(NamedTuple):
    """Like the port's NegativeCache."""

    data: dict[str, Tensor]
    age: Tensor


class Largest(NamedTuple):
    """Like what torch.topk gives."""

    values: Tensor
    indices: Tensor


@pytest.fixture(scope="module")
def port() -> Iterator[Any]:
    assert FOUND is not None
    sys.path.insert(0, str(FOUND))
    names = ("negative_cache", "losses", "handlers", "retrieval_fns", "filter_fns", "util")
    modules = {name: importlib.import_module(f"negative_cache.{name}") for name in names}
    sys.path.remove(str(FOUND))
    with torch.random.fork_rng(devices=[]):
        yield SimpleNamespace(**modules)


@pytest.fixture
def ties_by_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest values, ties by place: as tf.math.top_k, and as here. The package uses the method, not this."""

    def topk(values: Tensor, k: int, **_: Any) -> Any:
        ordered = values.sort(dim=-1, descending=True, stable=True)
        return Largest(ordered.values[..., :k], ordered.indices[..., :k])

    monkeypatch.setattr(torch, "topk", topk)


class Drawn:
    """In place of the port's sampler: slots that were drawn elsewhere, [B, 1]."""

    def __init__(self) -> None:
        self.slots = torch.empty(0)

    def __call__(self, scores: Tensor) -> Tensor:
        assert (self.slots < scores.shape[1]).all()
        return self.slots


def scaled(scores: Tensor) -> Tensor:
    return BETA * scores


def documents(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Problem:
    """Queries, positives and a full cache, float64; `drift` is how stale it is."""

    def __init__(self, *, drift: float = 0.0, capacity: int = C) -> None:
        self.weight = 0.5 * torch.eye(F, dtype=torch.float64)[:D].contiguous().requires_grad_()
        self.queries = unit(B, D, 1, torch.float64).requires_grad_()
        self.positives, self.cached = documents(B, 2), documents(capacity, 3)
        self.embedding = self.encode(self.cached).detach() + drift * documents(capacity, 4)[:, :D]

    def encode(self, features: Any) -> Tensor:
        return (features if isinstance(features, Tensor) else features["x"]) @ self.weight.T

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.queries, self.weight

    def state(self) -> Any:
        return make_state(self.embedding, features={"x": self.cached})

    def cache(self, port: Any) -> Any:
        data = {"x": self.cached.clone(), "embedding": self.embedding.clone()}
        return port.negative_cache.NegativeCache(data, torch.zeros(len(self.cached), dtype=torch.int32))


def classification_loss(port: Any, **options: Any) -> Any:
    return port.losses.CacheClassificationLoss("embedding", ("x",), **({"score_transform": scaled} | options))


def handler_of(port: Any, cache: Any, loss: Any, *, use_lru: bool = True) -> Any:
    """A handler whose cache is this one."""
    specs = {
        key: port.negative_cache.FixedLenFeature(list(leaf.shape[1:]), leaf.dtype) for key, leaf in cache.data.items()
    }
    manager = port.negative_cache.CacheManager(specs, cache.age.shape[0], use_lru=use_lru)
    keys = [key for key in specs if key != "embedding"]
    handler = port.handlers.CacheLossHandler(manager, loss, "embedding", keys)
    for key, leaf in cache.data.items():
        handler.cache.data[key].copy_(leaf)
    handler.cache.age.copy_(cache.age)
    return handler


def gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, retain_graph=True))


def close(given: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)


# --- the loss: number by number, given the same draws ---------------------------------------------------------------


def capped(scores: Tensor) -> Tensor:
    return 4.0 * torch.tanh(scores / 4.0)


@needs_port
@pytest.mark.parametrize(("drift", "transform"), [(0.0, None), (0.3, None), (0.3, capped)])
@pytest.mark.parametrize(("reducer", "reduction"), [(torch.mean, "mean"), (torch.sum, "sum"), (None, "none")])
def test_same_draws_same_gradient(
    port: Any, drift: float, transform: Callable[[Tensor], Tensor] | None, reducer: Any, reduction: str
) -> None:
    """The arguments that reproduce the port's estimator: equal gradients per draw, stale or not; not equal values.

    Of queries, document tower and a learnable scale, with a score transform and without.
    """
    problem, state = Problem(drift=drift), Problem(drift=drift).state()
    scale = torch.tensor(BETA, dtype=torch.float64, requires_grad=True)
    leaves = (*problem.leaves(), scale)
    outer = transform or oracles.identity
    loss = classification_loss(port, reducer=reducer, score_transform=lambda scores: outer(scale * scores))
    loss._retrieval_fn = Drawn()
    drawn = set()
    for step in range(3):
        state["step"].fill_(1 + step)
        out = negcache_fn.step(
            state,
            problem.queries,
            {"x": problem.positives},
            problem.encode,
            scale=scale,
            options=negcache_fn.StepOptions(score_transform=transform, reduction=reduction, **PORTS_ESTIMATOR),
        )
        drawn.add(tuple(out.draw.slot.flatten().tolist()))
        loss._retrieval_fn.slots = out.draw.slot
        theirs = loss(
            problem.encode, problem.queries, problem.encode(problem.positives), {"cache": problem.cache(port)}
        )
        close(gradients(out.loss.sum(), leaves), gradients(theirs.training_loss.sum(), leaves))
        close(out.loss, theirs.interpretable_loss)
        assert not torch.isclose(theirs.training_loss, theirs.interpretable_loss).any()
        if reduction == "mean":
            close(out.metrics["exact_loss"], theirs.interpretable_loss)
            close(out.metrics["drift"], theirs.staleness)
    assert len(drawn) > 1


@needs_port
def test_value_of_the_training_loss_means_nothing(port: Any) -> None:
    """It is (1 - p) (negative - positive): 0 where the cross entropy is largest, at equal scores of many documents."""
    problem = Problem()
    problem.embedding = problem.encode(problem.positives)[:1].detach().repeat(C, 1)
    problem.cached = problem.positives[:1].repeat(C, 1)
    theirs = classification_loss(port)(
        problem.encode, problem.queries[:1], problem.encode(problem.positives)[:1], {"cache": problem.cache(port)}
    )
    close(theirs.training_loss.detach(), torch.tensor(0.0, dtype=torch.float64))
    close(theirs.interpretable_loss, torch.tensor(1.0 + C, dtype=torch.float64).log())


@needs_port
@pytest.mark.usefixtures("ties_by_slot")
@pytest.mark.parametrize(("use_lru", "evict"), [(True, "lru"), (False, "fifo")])
def test_same_draws_same_training(port: Any, use_lru: bool, evict: str) -> None:
    """Thirty steps of SGD with the port's handler and with `step`: the same weights, embeddings, documents and ages."""
    mine, theirs = Problem(drift=0.1), Problem(drift=0.1)
    loss = classification_loss(port)
    loss._retrieval_fn = Drawn()
    # The port keeps one age; here the documents came in one by one.
    age = torch.arange(C - 1, -1, -1, dtype=torch.int32)
    given = port.negative_cache.NegativeCache(theirs.cache(port).data, age)
    handler, state = handler_of(port, given, loss, use_lru=use_lru), convert_cache(given)
    assert state["step"] == C
    close(state["items", "embedding"], mine.embedding)
    for step in range(30):
        queries, batch = unit(B, D, 50 + step, torch.float64), documents(B, 100 + step)
        out = negcache_fn.step(
            state,
            queries,
            {"x": batch},
            mine.encode,
            scale=BETA,
            options=negcache_fn.StepOptions(evict=evict, **PORTS_ESTIMATOR),
        )
        loss._retrieval_fn.slots = out.draw.slot
        training_loss = handler.update_cache_and_compute_loss(
            theirs.encode, queries, theirs.encode(batch), {"x": batch}
        )
        for problem, value in ((mine, out.loss), (theirs, training_loss)):
            (gradient,) = torch.autograd.grad(value, [problem.weight])
            with torch.no_grad():
                problem.weight -= 0.05 * gradient
        state = out.state
    assert (mine.weight - Problem().weight).abs().max() > 0.01
    close(mine.weight, theirs.weight)
    close(state["items", "embedding"], handler.cache.data["embedding"])
    close(state["items", "features", "x"], handler.cache.data["x"])
    written_at = state["items", "embedded_at" if use_lru else "inserted_at"]
    assert torch.equal(state["step"] - 1 - written_at, handler.cache.age.long())


# --- the loss: in expectation, with the port's own noise ------------------------------------------------------------


def means(one: Callable[[int], list[Tensor]], rounds: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard error of each gradient over rounds, each itself a mean over many draws."""
    found = [one(round_) for round_ in range(rounds)]
    stacked = [torch.stack(values) for values in zip(*found, strict=True)]
    return [(values.mean(0), values.std(0) / rounds**0.5) for values in stacked]


def port_means(
    port: Any, problem: Problem, cache: Any, positives: Tensor, copies: int = 128, **options: Any
) -> list[tuple[Tensor, Tensor]]:
    loss = classification_loss(port, **options)
    torch.manual_seed(7)

    def one(_: int) -> list[Tensor]:
        queries, right = problem.queries.repeat(copies, 1), problem.encode(positives).repeat(copies, 1)
        return gradients(loss(problem.encode, queries, right, {"cache": cache}).training_loss, problem.leaves())

    return means(one)


def exact_gradients(problem: Problem, cached: Tensor, positives: Tensor, top_k: int | None = None) -> list[Tensor]:
    """Of the cross entropy over positive and cache, all of it encoded: plain torch, nothing of the package."""
    scores = BETA * problem.queries @ problem.encode(cached).T
    if top_k is not None:
        scores = scores.masked_fill(scores < scores.sort(dim=1).values[:, -top_k, None], -torch.inf)
    positive = BETA * (problem.queries * problem.encode(positives)).sum(1, keepdim=True)
    return gradients((torch.cat([positive, scores], 1).logsumexp(1) - positive[:, 0]).mean(), problem.leaves())


def off(estimates: list[tuple[Tensor, Tensor]], expected: list[Tensor]) -> float:
    """The largest deviation of any number, in standard errors."""
    pairs = zip(estimates, expected, strict=True)
    return max(float(((mean - right).abs() / (error + 1e-12)).max()) for (mean, error), right in pairs)


@needs_port
def test_full_cache_same_expected_gradient(port: Any) -> None:
    """The mean over 4096 of the port's draws is our exact gradient, for both towers."""
    problem = Problem()
    estimates = port_means(port, problem, problem.cache(port), problem.positives)
    exact = negcache_fn.exact_loss(
        problem.state(), problem.queries, problem.encode(problem.positives), scale=BETA, in_batch=False
    )
    expected = exact_gradients(problem, problem.cached, problem.positives)
    close(gradients(exact, (problem.queries,)), expected[:1])  # the cache is a constant there: no gradient through it
    assert off(estimates, expected) < STANDARD_ERRORS

    in_batch = negcache_fn.exact_loss(problem.state(), problem.queries, problem.encode(problem.positives), scale=BETA)
    assert off(estimates[:1], gradients(in_batch, (problem.queries,))) > 3 * STANDARD_ERRORS  # another loss

    def shared(step: int) -> list[Tensor]:
        """Sharing draws changes the noise, not the mean."""
        state = negcache_fn.resize(problem.state(), 16 * B)
        state["step"].fill_(1 + step)
        queries, right = problem.queries.repeat(16, 1), {"x": problem.positives.repeat(16, 1)}
        options = PORTS_ESTIMATOR | {"share_draws": True, "draws_per_query": 8}
        return gradients(
            negcache_fn.step(state, queries, right, problem.encode, scale=BETA, **step_keywords(**options)).loss,
            problem.leaves(),
        )

    assert off(means(shared, rounds=24), expected) < STANDARD_ERRORS


@needs_port
def test_empty_slots_are_documents_there(port: Any) -> None:
    """Zero embeddings with score 0, drawn and counted; nothing here. Equal again with zeros cached as documents."""
    problem, live = Problem(), 4
    cache = problem.cache(port)
    for leaf in cache.data.values():
        leaf[live:] = 0
    estimates = port_means(port, problem, cache, problem.positives)
    assert off(estimates, exact_gradients(problem, problem.cached[:live], problem.positives)) > 10 * STANDARD_ERRORS
    assert off(estimates, exact_gradients(problem, cache.data["x"], problem.positives)) < STANDARD_ERRORS

    state = negcache_fn.init_cache(C, D, {"x": problem.cached}, embedding_dtype=torch.float64)
    state = negcache_fn.update(state, {"x": problem.cached[:live]}, problem.embedding[:live])
    assert negcache_fn.score(state, problem.queries)[:, live:].eq(-torch.inf).all()
    zeros = torch.zeros(C - live, D, dtype=torch.float64)
    state = negcache_fn.update(state, {"x": cache.data["x"][live:]}, zeros)
    theirs = classification_loss(port)(
        problem.encode, problem.queries, problem.encode(problem.positives), {"cache": cache}
    )
    close(
        negcache_fn.exact_loss(
            state, problem.queries, problem.encode(problem.positives), scale=BETA, in_batch=False
        ).detach(),
        theirs.interpretable_loss,
    )


@needs_port
def test_numbers_of_the_page(port: Any) -> None:
    """One query, score of its positive 12: 131,072 empty slots cost .59, a copy of the positive log 2; nothing here."""
    query, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    data = {"x": torch.zeros(131_072, 1), "embedding": torch.zeros(131_072, 2)}
    loss = classification_loss(port, score_transform=lambda scores: 20 * scores)
    empty = port.negative_cache.NegativeCache(data, torch.zeros(131_072, dtype=torch.int32))

    def value(cache: Any) -> float:
        return float(loss(lambda _: positive, query, positive, {"cache": cache}).interpretable_loss)

    assert round(value(empty), 2) == 0.59
    copy = port.negative_cache.NegativeCache({"x": torch.ones(1, 1), "embedding": positive}, torch.zeros(1).int())
    assert round(value(copy), 2) == 0.69
    state = negcache_fn.init_cache(131_072, 2, data["x"])
    options: dict[str, Any] = {"scale": 20.0, "in_batch": False}
    assert negcache_fn.exact_loss(state, query, positive, **options) == 0
    ids = torch.tensor([5])
    state = negcache_fn.update(state, torch.ones(1, 1), positive, ids=ids)
    assert negcache_fn.exact_loss(state, query, positive, ids=ids, **options) == 0
    close(negcache_fn.exact_loss(state, query, positive, **options), torch.tensor(2.0).log(), 1e-6)


@needs_port
def test_drawn_empty_slot_becomes_a_document(port: Any) -> None:
    """It is encoded, written back with age 0, and has zeros for features: the converter takes it for empty."""
    weight = torch.randn(D, 3, generator=torch.Generator().manual_seed(0))
    cache = Cache({"x": torch.zeros(8, 3), "embedding": torch.zeros(8, D)}, torch.zeros(8, dtype=torch.int32))
    handler = handler_of(port, cache, classification_loss(port))
    torch.manual_seed(0)
    batch = torch.ones(2, 3)

    def encode(features: Any) -> Tensor:
        return features["x"] @ weight.T + 1.0  # a bias, as encoders have

    handler.update_cache_and_compute_loss(encode, torch.zeros(2, D), encode({"x": batch}), {"x": batch})
    renewed = (handler.cache.data["x"] == 0).all(1) & (handler.cache.data["embedding"] != 0).all(1)
    assert renewed.any()
    assert (handler.cache.age[renewed] == 0).all()
    live = convert_cache(handler.cache)["items", "embedded_at"] >= 0
    assert torch.equal(live, (handler.cache.data["x"] == 1).all(1))
    kept = convert_cache(handler.cache, empty="zero_embeddings")["items", "embedded_at"] >= 0
    assert torch.equal(kept, live | renewed)


@needs_port
def test_positives_in_the_cache_are_negatives_there(port: Any) -> None:
    """Left out here by id; without ids they count, as in the port."""
    problem = Problem()
    problem.positives = problem.cached[:B].clone()
    problem.queries = torch.nn.functional.normalize(problem.embedding[:B]).requires_grad_()
    estimates = port_means(port, problem, problem.cache(port), problem.positives)
    as_negatives = exact_gradients(problem, problem.cached, problem.positives)
    assert off(estimates, as_negatives) < STANDARD_ERRORS
    state, right = problem.state(), problem.encode(problem.positives)
    options: dict[str, Any] = {"scale": BETA, "in_batch": False}
    anonymous = negcache_fn.exact_loss(state, problem.queries, right, **options)
    close(gradients(anonymous, (problem.queries,)), as_negatives[:1])
    state["items", "id"].copy_(torch.arange(C))
    by_id = negcache_fn.exact_loss(state, problem.queries, right, ids=torch.arange(B), **options)
    assert off(estimates[:1], gradients(by_id, (problem.queries,))) > 3 * STANDARD_ERRORS


# --- top_k ----------------------------------------------------------------------------------------------------------


@needs_port
@pytest.mark.parametrize("apart", [True, False])
def test_top_k_of_groups(port: Any, apart: bool) -> None:
    """The best of each of `top_k` stretches of slots; the same as the exact one if the best lie in different ones."""
    top_k, query = 3, torch.eye(D, dtype=torch.float64)[:1]
    best = torch.tensor([0, 4, 8] if apart else [0, 1, 2])
    problem = Problem()
    problem.queries = query.requires_grad_()
    problem.cached = problem.cached.clone()
    problem.cached[:, 0] = torch.linspace(-2.0, 0.0, C, dtype=torch.float64)
    problem.cached[best, 0] = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    problem.embedding = problem.encode(problem.cached).detach()
    positives = problem.positives[:1]
    theirs = classification_loss(port, top_k=top_k)(
        problem.encode, query, problem.encode(positives), {"cache": problem.cache(port)}
    )
    exact = negcache_fn.exact_loss(
        problem.state(), query, problem.encode(positives), scale=BETA, in_batch=False, top_k=top_k
    )
    assert torch.isclose(theirs.interpretable_loss, exact, rtol=1e-12) == apart
    assert apart or theirs.interpretable_loss < exact
    estimates = port_means(port, problem, problem.cache(port), positives, top_k=top_k)
    expected = exact_gradients(problem, problem.cached, positives, top_k)
    close(gradients(exact, (query,)), expected[:1])
    if apart:
        assert off(estimates, expected) < STANDARD_ERRORS
    else:
        assert off(estimates, expected) > 3 * STANDARD_ERRORS
    example = port.util.approximate_top_k_with_indices(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), 2)[1]
    assert example.tolist() == [[0, 2]]  # the page's
    _, slots = negcache_fn.top_negatives(problem.state(), query, top_k)
    assert torch.equal(slots[0], best)
    grouped = port.util.approximate_top_k_with_indices(negcache_fn.score(problem.state(), query).detach(), top_k)[1]
    assert torch.equal(grouped[0].sort().values, best) == apart


@needs_port
def test_top_k_must_divide_the_capacity_there(port: Any) -> None:
    problem = Problem()
    with pytest.raises(RuntimeError, match="shape"):
        classification_loss(port, top_k=5)(
            problem.encode, problem.queries, problem.encode(problem.positives), {"cache": problem.cache(port)}
        )
    assert negcache_fn.sample_gumbel(problem.state(), problem.queries, draws_per_query=1, top_k=5).slot.shape == (B, 1)


@needs_port
@pytest.mark.parametrize("count", [1, 3])
def test_return_topk(port: Any, count: int) -> None:
    """The best rows of each query, as here with `top_negatives`; for 1 it is the drawn rows of all queries instead."""
    problem = Problem()
    handler = handler_of(port, problem.cache(port), classification_loss(port, top_k=C))
    handler.cache_loss._retrieval_fn = Drawn()
    _, best = negcache_fn.top_negatives(problem.state(), problem.queries, count)
    handler.cache_loss._retrieval_fn.slots = best[:, -1:]  # among all C, whatever the order
    _, found = handler.update_cache_and_compute_loss(
        problem.encode, problem.queries, problem.encode(problem.positives), {"x": problem.positives}, return_topk=count
    )
    ours = negcache_fn.take(problem.state(), best)["x"]
    if count == 1:
        assert len(found) == 1
        close(found[0]["x"], ours[:, 0])
    else:
        close(torch.stack([rows["x"] for rows in found]), ours)


# --- what is drawn --------------------------------------------------------------------------------------------------


@needs_port
@pytest.mark.parametrize("inv_temp", [1.0, 0.5])
def test_gumbel_max_retrieval(port: Any, inv_temp: float) -> None:
    """Both draw from softmax(inv_temp * scores): chi-square, false alarms with probability `oracles.FALSE_ALARM`."""
    problem, draws = Problem(), 4000
    state, query = problem.state(), problem.queries[:1].detach()
    scores = negcache_fn.score(state, query, scale=BETA)
    probability = oracles.probabilities(inv_temp * scores)[0]
    torch.manual_seed(3)
    theirs = port.retrieval_fns.GumbelMaxRetrievalFn(inv_temp)(scores.repeat(draws, 1))
    ours = negcache_fn.sample_gumbel(state, query, draws_per_query=draws, scale=inv_temp * BETA).slot
    for slots in (theirs, ours):
        counts = torch.bincount(slots.flatten(), minlength=C).numpy()
        assert oracles.chi_square_pvalue(counts, probability) > oracles.FALSE_ALARM
    at_other = oracles.probabilities(2 * inv_temp * scores)[0]
    assert oracles.chi_square_pvalue(counts, at_other) < oracles.FALSE_ALARM


@needs_port
def test_max_score_retrieval(port: Any) -> None:
    """The best slot; as a sampler of the loss it is `top_k=1`, but for the probability of the positive."""
    problem = Problem()
    state, right = problem.state(), problem.encode(problem.positives)
    best = port.retrieval_fns.MaxScoreRetrievalFn()(negcache_fn.score(state, problem.queries))
    assert torch.equal(best, negcache_fn.top_negatives(state, problem.queries, 1)[1])
    draw = negcache_fn.sample_gumbel(state, problem.queries, draws_per_query=1, scale=BETA, top_k=1)
    assert torch.equal(best, draw.slot)
    loss = classification_loss(port)
    loss._retrieval_fn = port.retrieval_fns.MaxScoreRetrievalFn()
    theirs = loss(problem.encode, problem.queries, right, {"cache": problem.cache(port)})
    negatives = problem.encode(problem.cached[best[:, 0]])
    ours = negcache_fn.loss(problem.queries, right, negatives, draw, scale=BETA, **PORTS_LOSS)
    assert ours < theirs.interpretable_loss  # against one document, not against all
    over_all = negcache_fn.sample_gumbel(state, problem.queries, draws_per_query=1, scale=BETA)
    draw = draw._replace(log_normalizer=over_all.log_normalizer)
    ours = negcache_fn.loss(problem.queries, right, negatives, draw, scale=BETA, **PORTS_LOSS)
    close(gradients(ours, problem.leaves()), gradients(theirs.training_loss, problem.leaves()))


@needs_port
def test_noise_is_global_there(port: Any) -> None:
    """The port advances torch's generator, and repeats itself only with it; here nothing of the kind."""
    scores = torch.zeros(64, 32)
    before = torch.get_rng_state()
    first = port.retrieval_fns.GumbelMaxRetrievalFn()(scores)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, port.retrieval_fns.GumbelMaxRetrievalFn()(scores))
    problem, before = Problem(), torch.get_rng_state()
    draws = [negcache_fn.sample_gumbel(problem.state(), problem.queries).slot for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)


# --- specs and writing ----------------------------------------------------------------------------------------------


def integer_cache(port: Any, capacity: int, *, use_lru: bool = True) -> tuple[Any, Any]:
    specs = {
        "x": port.negative_cache.FixedLenFeature(shape=[2], dtype=torch.int64),
        "embedding": port.negative_cache.FixedLenFeature(shape=[1], dtype=torch.float64),
    }
    manager = port.negative_cache.CacheManager(specs, capacity, use_lru=use_lru)
    return manager, manager.init_cache()


def row_of(number: int) -> tuple[dict[str, Tensor], Tensor]:
    return {"x": torch.full((1, 2), number)}, torch.full((1, 1), float(number), dtype=torch.float64)


def contents_there(cache: Any) -> dict[int, tuple[int, float]]:
    """Age and embedding by document."""
    rows = zip(cache.data["x"][:, 0].tolist(), cache.age.tolist(), cache.data["embedding"][:, 0].tolist(), strict=True)
    return {document: (age, embedding) for document, age, embedding in rows if document}


def contents_here(state: Any, name: str) -> dict[int, tuple[int, float]]:
    items = state["items"]
    ages = state["step"] - 1 - items[name]
    rows = zip(items["features", "x"][:, 0].tolist(), ages.tolist(), items["embedding"][:, 0].tolist(), strict=True)
    return {document: (age, embedding) for document, age, embedding in rows if document}


@needs_port
def test_specs_and_the_empty_cache(port: Any) -> None:
    """The tensors of `init_cache` there and here; both start with zeros, but here they are no documents."""
    specs = {
        "x": port.negative_cache.FixedLenFeature(shape=[7], dtype=torch.int32),
        "embedding": port.negative_cache.FixedLenFeature(shape=[D], dtype=torch.float16),
    }
    cache = port.negative_cache.CacheManager(specs, cache_size=C).init_cache()
    state = negcache_fn.init_cache(C, D, {"x": torch.zeros(1, 7, dtype=torch.int32)}, embedding_dtype=torch.float16)
    for theirs, ours in (("x", ("features", "x")), ("embedding", "embedding")):
        assert same_snapshot(snapshot(cache.data[theirs]), snapshot(state["items"][ours]))
    assert cache.age.eq(0).all()
    assert same_snapshot(snapshot(convert_cache(cache)), snapshot(state))


@needs_port
@pytest.mark.parametrize(("use_lru", "evict", "name"), [(True, "lru", "embedded_at"), (False, "fifo", "inserted_at")])
def test_eviction_order(port: Any, use_lru: bool, evict: str, name: str) -> None:
    """Forty updates, one document or one renewed document each, so that no ages tie: the same documents and ages.

    The port's own choice of slots stands: what is compared goes by document.
    """
    manager, cache = integer_cache(port, 6, use_lru=use_lru)
    state = negcache_fn.init_cache(6, 1, row_of(0)[0], embedding_dtype=torch.float64)
    nobody = torch.zeros(1, dtype=torch.bool)
    inserted: list[int] = []
    is_queue = True
    for number in range(1, 41):
        if number % 3 == 0 and len(contents_there(cache)) == 6:
            document = sorted(contents_there(cache))[number % 5]
            fresh = torch.full((1, 1), -float(number), dtype=torch.float64)
            (there,) = (cache.data["x"][:, 0] == document).nonzero()
            (here,) = (state["items", "features", "x"][:, 0] == document).nonzero()
            cache = manager.update_cache(
                cache, updated_item_data={"embedding": fresh}, updated_item_indices=there, new_items=None
            )
            state = negcache_fn.update(state, *row_of(0), cacheable=nobody, refresh=(here, fresh), evict=evict)
        else:
            inserted.append(number)
            features, embedding = row_of(number)
            cache = manager.update_cache(cache, new_items={**features, "embedding": embedding})
            state = negcache_fn.update(state, features, embedding, evict=evict)
        assert contents_here(state, name) == contents_there(cache)
        is_queue &= sorted(contents_there(cache)) == inserted[-6:]
    assert is_queue == (not use_lru)


@needs_port
@pytest.mark.usefixtures("ties_by_slot")
def test_update_with_masks(port: Any) -> None:
    """`new_items_mask` is `cacheable`; `updated_item_mask` is slot -1; renewed first, then inserted. Slot by slot."""
    manager, cache = integer_cache(port, 5)
    state = negcache_fn.init_cache(5, 1, row_of(0)[0], embedding_dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        features = {"x": torch.randint(1, 99, (3, 2), generator=generator)}
        embeddings, fresh = torch.randn(2, 3, 1, generator=generator, dtype=torch.float64)
        mask = torch.rand(3, generator=generator) < (0.0 if step == 4 else 0.6)
        slots = torch.randperm(5, generator=generator)[:3]
        renewed = (torch.rand(3, generator=generator) < 0.5) & (step > 5)
        cache = manager.update_cache(
            cache,
            new_items={**features, "embedding": embeddings},
            new_items_mask=mask,
            updated_item_data={"embedding": fresh},
            updated_item_indices=slots,
            updated_item_mask=renewed,
        )
        state = negcache_fn.update(
            state, features, embeddings, cacheable=mask, refresh=(torch.where(renewed, slots, -1), fresh)
        )
        close(state["items", "features", "x"], cache.data["x"])
        close(state["items", "embedding"], cache.data["embedding"])
        live = state["items", "embedded_at"] >= 0
        assert torch.equal((state["step"] - 1 - state["items", "embedded_at"])[live], cache.age.long()[live])
    assert live.all()


@needs_port
def test_update_writes_into_its_argument_there(port: Any) -> None:
    manager, before = integer_cache(port, 4)
    features, embedding = row_of(7)
    after = manager.update_cache(before, new_items={**features, "embedding": embedding})
    assert before.data["x"].sum() == 14
    assert before.data["x"].data_ptr() == after.data["x"].data_ptr()
    assert before.age.min() == -1  # no cache any more
    with pytest.raises(ValueError, match="age is -1 somewhere; expected 0 or more"):
        convert_cache(before)
    state = convert_cache(after)
    kept = snapshot(state)
    manager.update_cache(after, new_items={**row_of(8)[0], "embedding": row_of(8)[1]})
    assert same_snapshot(kept, snapshot(state))
    negcache_fn.update(state, *row_of(9))
    assert same_snapshot(kept, snapshot(state))


@needs_port
def test_narrow_features_are_padded_and_dtypes_kept(port: Any) -> None:
    """Zeros on the right in both. A wide row, or another dtype, is an error here that says so."""
    manager, cache = integer_cache(port, 3)
    narrow = {"x": torch.tensor([[5]])}
    embedding = torch.ones(1, 1, dtype=torch.float64)
    cache = manager.update_cache(cache, new_items={**narrow, "embedding": embedding})
    state = negcache_fn.init_cache(3, 1, row_of(0)[0], embedding_dtype=torch.float64)
    state = negcache_fn.update(state, narrow, embedding)
    assert cache.data["x"].sort(0, descending=True).values.tolist() == state["items", "features", "x"].tolist()
    wide = {"x": torch.ones(1, 3, dtype=torch.int64)}
    with pytest.raises(RuntimeError):
        manager.update_cache(cache, new_items={**wide, "embedding": embedding})
    with pytest.raises(ValueError, match="do not fit into the cache's slots"):
        negcache_fn.update(state, wide, embedding)
    manager.update_cache(cache, new_items={"x": torch.tensor([[1.9, 1.9]]), "embedding": embedding})
    assert (cache.data["x"] == 1).all(1).any()  # cut off silently
    with pytest.raises(TypeError, match=r"dtype torch\.float32; expected torch\.int64"):
        negcache_fn.update(state, {"x": torch.tensor([[1.9, 1.9]])}, embedding)


@needs_port
def test_is_in_cache_filter(port: Any) -> None:
    """There a document that is cached is kept out if asked; here its id finds it, and it is renewed or, asked, kept."""
    manager, cache = integer_cache(port, 3)
    cache = manager.update_cache(cache, new_items={**row_of(5)[0], "embedding": row_of(5)[1]})
    batch = {"x": torch.tensor([[5, 5], [6, 6]]), "embedding": torch.tensor([[50.0], [6.0]], dtype=torch.float64)}
    keep = port.filter_fns.IsInCacheFilterFn(("x",))(cache, batch)
    assert keep.tolist() == [False, True]
    twice = {key: leaf.clone() for key, leaf in cache.data.items()}
    twice = manager.update_cache(type(cache)(twice, cache.age.clone()), new_items=batch)
    assert (twice.data["x"][:, 0] == 5).sum() == 2  # without a filter
    cache = manager.update_cache(cache, new_items=batch, new_items_mask=keep)
    state = negcache_fn.init_cache(3, 1, row_of(0)[0], embedding_dtype=torch.float64)
    state = negcache_fn.update(state, *row_of(5), ids=torch.tensor([5]))
    features, ids = {"x": batch["x"]}, torch.tensor([5, 6])
    replaced = negcache_fn.update(state, features, batch["embedding"], ids=ids)
    assert contents_here(replaced, "embedded_at") == {5: (0, 50.0), 6: (0, 6.0)}
    kept = negcache_fn.update(
        state, features, batch["embedding"], ids=ids, cacheable=~torch.isin(ids, state["items", "id"])
    )
    assert contents_here(kept, "embedded_at") == contents_there(cache) == {5: (1, 5.0), 6: (0, 6.0)}
    with pytest.raises(NotImplementedError):
        port.filter_fns.IsInCacheFilterFn(("embedding",))(cache, batch)


# --- the handler ----------------------------------------------------------------------------------------------------


@needs_port
def test_handler_writes_what_metrics_hold(port: Any) -> None:
    """The two scalars of the writer; a handler that is empty in its state_dict; an evaluation that writes."""
    problem, written = Problem(drift=0.2), {}
    handler = handler_of(port, problem.cache(port), classification_loss(port))
    handler.cache_loss._retrieval_fn = Drawn()
    state = problem.state()
    out = negcache_fn.step(
        state,
        problem.queries,
        {"x": problem.positives},
        problem.encode,
        scale=BETA,
        options=negcache_fn.StepOptions(**PORTS_ESTIMATOR),
    )
    handler.cache_loss._retrieval_fn.slots = out.draw.slot
    writer = SimpleNamespace(add_scalar=lambda name, value, step: written.update({name: (value, step)}))
    call = (problem.encode, problem.queries, problem.encode(problem.positives), {"x": problem.positives})
    handler.update_cache_and_compute_loss(*call, writer=(writer, 7))
    assert set(written) == {"cache/interpretable_prediction_loss", "cache/staleness"}
    close(written["cache/interpretable_prediction_loss"][0], out.metrics["exact_loss"])
    close(written["cache/staleness"][0], out.metrics["drift"])
    assert dict(handler.state_dict()) == {}
    age = handler.cache.age.clone()
    kept = snapshot(state)
    with torch.no_grad():
        handler.update_cache_and_compute_loss(*call)
        evaluated = negcache_fn.step(state, problem.queries, {"x": problem.positives}, problem.encode)
    assert not torch.equal(handler.cache.age, age)
    assert evaluated.state is state
    assert same_snapshot(kept, snapshot(state))


@needs_port
@pytest.mark.usefixtures("ties_by_slot")
def test_several_caches(port: Any) -> None:
    """Two caches as one softmax: values, gradients per draw, and what is written to each, slot by slot."""
    problem = Problem(drift=0.2)
    sizes = {"body": 5, "title": 7}
    states = {}
    caches = {}
    first = 0
    for seed, (name, size) in enumerate(sizes.items()):
        rows = slice(first, first + size)
        data = {"x": problem.cached[rows].clone(), "embedding": problem.embedding[rows].clone()}
        caches[name] = port.negative_cache.NegativeCache(data, torch.arange(size, dtype=torch.int32))
        states[name] = convert_cache(caches[name], seed=seed)
        first += size
    converted = convert_caches(dict(reversed(caches.items())))
    assert list(converted) == list(states)
    for name, state in states.items():
        assert same_snapshot(snapshot(converted[name]), snapshot(state))

    specs = {
        "x": port.negative_cache.FixedLenFeature([F], torch.float64),
        "embedding": port.negative_cache.FixedLenFeature([D], torch.float64),
    }
    managers = {name: port.negative_cache.CacheManager(specs, size) for name, size in sizes.items()}
    loss = classification_loss(port)
    loss._retrieval_fn = Drawn()
    handler = port.handlers._MultiCacheLossHandler(managers, loss, "embedding", ("x",))
    handler.cache = caches

    draw = negcache_fn.merge_draws(
        *(negcache_fn.sample_gumbel(state, problem.queries, draws_per_query=1, scale=BETA) for state in states.values())
    )
    assert draw.source.unique().numel() == 2  # both are drawn from
    loss._retrieval_fn.slots = draw.slot + draw.source * sizes["body"]
    right = problem.encode(problem.positives)
    negatives = problem.encode(negcache_fn.take_drawn(list(states.values()), draw))
    value = negcache_fn.loss(problem.queries, right, negatives, draw, scale=BETA, **PORTS_LOSS)
    theirs = loss(problem.encode, problem.queries, right, caches)
    close(value, theirs.interpretable_loss)
    close(gradients(value, problem.leaves()), gradients(theirs.training_loss, problem.leaves()))

    arriving = {"body": documents(2, 11), "title": documents(1, 12)}
    handler.update_cache_and_compute_loss(
        problem.encode,
        problem.queries,
        right,
        {name: problem.encode(rows) for name, rows in arriving.items()},
        {name: {"x": rows} for name, rows in arriving.items()},
    )
    for (name, state), refresh in zip(states.items(), negcache_fn.split_refresh(draw, negatives), strict=True):
        after = negcache_fn.update(state, {"x": arriving[name]}, problem.encode(arriving[name]), refresh=refresh)
        close(after["items", "embedding"], handler.cache[name].data["embedding"])
        close(after["items", "features", "x"], handler.cache[name].data["x"])
        assert torch.equal(after["step"] - 1 - after["items", "embedded_at"], handler.cache[name].age.long())


@needs_port
def test_nothing_is_renewed_over_several_gpus_there(
    port: Any, group_of_one: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port's distributed loss, in one process without its CUDA calls: same gradient, nothing renewed."""

    def all_to_all(output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> None:  # gloo has none of lists
        for mine, sent in zip(output_tensor_list, input_tensor_list, strict=True):
            mine.copy_(sent)

    monkeypatch.setattr(dist, "all_to_all", all_to_all)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor)
    problem = Problem(drift=0.3, capacity=1024)
    loss = port.losses.DistributedCacheClassificationLoss("embedding", ("x",), score_transform=scaled)
    state = problem.state()
    options: dict[str, Any] = {"scale": BETA, **PORTS_ESTIMATOR}
    out = negcache_fn.step(
        state, problem.queries, {"x": problem.positives}, problem.encode, group=group_of_one, **step_keywords(**options)
    )
    # It asks twice: for a slot in each part, and for a part, of which there is one.
    answers = itertools.cycle([out.draw.slot, torch.zeros_like(out.draw.slot)])
    loss._retrieval_fn = lambda _: next(answers)
    cache = problem.cache(port)
    right = problem.encode(problem.positives)
    theirs = loss(problem.encode, problem.queries, right, {"cache": cache})
    close(theirs.interpretable_loss, out.loss)
    close(gradients(theirs.training_loss, problem.leaves()), gradients(out.loss, problem.leaves()))
    assert theirs.updated_item_indices == {"cache": None}
    handler = handler_of(port, cache, loss)
    handler.update_cache_and_compute_loss(problem.encode, problem.queries, right, {"x": problem.positives})
    changed = (handler.cache.data["embedding"] != problem.embedding).any(1)
    new = (handler.cache.data["x"] != problem.cached).any(1)
    assert torch.equal(changed, new)
    changed = (out.state["items", "embedding"] != problem.embedding).any(1)
    new = (out.state["items", "features", "x"] != problem.cached).any(1)
    assert (changed & ~new).any()


# --- the converter, without the port --------------------------------------------------------------------------------


def given_cache(**changes: Any) -> dict[str, Any]:
    """Six slots: two documents, one of them twice, an empty slot, an empty slot that was encoded, a zero embedding."""
    tokens = torch.tensor([[3, 4], [5, 6], [3, 4], [0, 0], [0, 0], [7, 0]], dtype=torch.int32)
    index = torch.tensor([[30], [50], [30], [0], [0], [70]])
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5], [0.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    data = {"tokens": tokens, "index": index, "embedding": embedding, **changes}
    return {"data": data, "age": torch.tensor([4, 2, 1, 6, 0, 5], dtype=torch.int32)}


def test_convert() -> None:
    """Ages, empty slots, ids and copies; the argument is neither changed nor shared."""
    given = given_cache()
    before = snapshot(given)
    state = convert_cache(given, data_keys=["tokens"], id_key="index", seed=9)
    items = state["items"]
    assert items["embedded_at"].tolist() == [-1, 3, 4, -1, -1, -1]
    assert items["inserted_at"].tolist() == items["embedded_at"].tolist()
    assert items["id"].tolist() == [-1, 50, 30, -1, -1, -1]
    assert (int(state["step"]), int(state["seed"]), state.is_locked) == (6, 9, True)
    assert items["features", "tokens"].tolist() == [[0, 0], [5, 6], [3, 4], [0, 0], [0, 0], [0, 0]]
    assert items["features", "tokens"].dtype == torch.int32
    assert set(items["features"].keys()) == {"tokens"}
    assert items["embedding"].tolist() == [[0, 0], [0, 1], [1, 0.5], [0, 0], [0, 0], [0, 0]]
    negcache_fn.validate(state)
    negcache_fn.step_(
        state, torch.randn(2, 2), {"tokens": torch.ones(2, 2, dtype=torch.int32)}, lambda batch: batch["tokens"].float()
    )
    assert same_snapshot(before, snapshot(given))


def test_converted_is_as_made_here() -> None:
    """Of a cache without holes: what `update` would have made, one document a step."""
    features, embeddings = documents(5, 0), unit(5, D, 1, torch.float64)
    state = negcache_fn.init_cache(8, D, {"x": features}, embedding_dtype=torch.float64, seed=4)
    for row in range(5):
        state = negcache_fn.update(state, {"x": features[row : row + 1]}, embeddings[row : row + 1])
    room = torch.zeros(3, F, dtype=torch.float64)
    data = {"x": torch.cat([features, room]), "embedding": torch.cat([embeddings, room[:, :D]])}
    cache = Cache(data, torch.tensor([4, 3, 2, 1, 0, 5, 5, 5], dtype=torch.int32))
    for given in (cache, cache._asdict()):
        assert same_snapshot(snapshot(convert_cache(given, seed=4)), snapshot(state))


@pytest.mark.parametrize(
    ("options", "live"),
    [
        ({}, [True, True, True, False, False, False]),
        ({"empty": "zero_embeddings"}, [True, True, True, False, True, False]),
        ({"empty": torch.tensor([False] * 5 + [True])}, [True] * 5 + [False]),
        ({"id_key": "index"}, [False, True, True, False, False, False]),
        ({"id_key": "index", "empty": torch.zeros(6, dtype=torch.bool)}, [False, True, True, False, True, True]),
    ],
)
def test_which_slots_are_empty(options: dict[str, Any], live: list[bool]) -> None:
    state = convert_cache(given_cache(), **options)
    assert (state["items", "embedded_at"] >= 0).tolist() == live
    negcache_fn.validate(state)


def test_copies_of_one_age_go_by_slot() -> None:
    given = given_cache()
    given["age"][:3] = 2
    assert convert_cache(given, id_key="index")["items", "id"].tolist() == [30, 50, -1, -1, -1, -1]


def test_anonymous_by_id() -> None:
    given = given_cache(index=torch.tensor([-1, 50, -1, 0, 0, 70]))
    assert convert_cache(given, id_key="index")["items", "id"].tolist() == [-1, 50, -1, -1, -1, -1]
    assert negcache_fn.occupancy(convert_cache(given, id_key="index")) == 0.5


def test_full_and_empty_caches() -> None:
    full = {"data": {"x": torch.ones(3), "embedding": torch.ones(3, 2)}, "age": torch.tensor([2, 9, 2])}
    state = convert_cache(full)
    assert (state["items", "embedded_at"].tolist(), int(state["step"])) == ([7, 0, 7], 10)
    nothing = {"data": {"x": torch.zeros(3), "embedding": torch.zeros(3, 2)}, "age": torch.zeros(3, dtype=torch.int32)}
    state = convert_cache(nothing)
    assert (float(negcache_fn.occupancy(state)), int(state["step"])) == (0.0, 0)


def test_dtypes_and_gradients() -> None:
    given = given_cache(embedding=torch.ones(6, 2, dtype=torch.bfloat16).requires_grad_())
    state = convert_cache(given, dtypes={"tokens": torch.int64})
    assert state["items", "features", "tokens"].dtype == torch.int64
    assert state["items", "embedding"].dtype == torch.bfloat16
    assert not state["items", "embedding"].requires_grad


def without(key: str) -> dict[str, Any]:
    given = given_cache()
    del given["data"][key]
    return given


@pytest.mark.parametrize(
    ("cache", "options", "error", "message"),
    [
        (torch.zeros(3), {}, TypeError, "cache is a Tensor; expected the port's NegativeCache"),
        ({"data": {}}, {}, TypeError, "cache is a dict; expected the port's NegativeCache"),
        (given_cache(), {"embedding_key": "emb"}, ValueError, "embedding_key names 'emb'; expected one of"),
        (given_cache(), {"data_keys": ["x"]}, ValueError, "data_keys names 'x'; expected one of"),
        (given_cache(), {"data_keys": ["embedding"]}, ValueError, "data_keys names 'embedding'; expected one of"),
        (given_cache(), {"data_keys": []}, ValueError, "data_keys is empty"),
        (given_cache(), {"id_key": "x"}, ValueError, "id_key names 'x'; expected one of"),
        (given_cache(), {"id_key": "tokens"}, ValueError, r"data\['tokens'\] has shape \(6, 2\); expected \[C\]"),
        (given_cache(index=torch.ones(6)), {"id_key": "index"}, TypeError, "dtype torch.float32; expected integers"),
        (given_cache(), {"dtypes": {"x": torch.int64}}, ValueError, r"dtypes has keys \['x'\]; expected some of"),
        (given_cache(), {"empty": "some"}, ValueError, "empty is 'some'; expected one of 'zeros'"),
        (given_cache(), {"empty": torch.zeros(6)}, TypeError, "empty has dtype torch.float32; expected torch.bool"),
        (given_cache(embedding=torch.ones(6)), {}, ValueError, r"shape \(6,\); expected \[C, D\]"),
        (given_cache(embedding=torch.ones(6, 2).int()), {}, TypeError, "dtype torch.int32; expected a floating dtype"),
        (given_cache(embedding=torch.full((6, 2), torch.nan)), {}, ValueError, "is not finite at slot 0"),
        (given_cache(tokens=torch.ones(5, 2)), {}, ValueError, r"data\['tokens'\] has shape \(5, 2\); expected \[6"),
        (given_cache(tokens=[1]), {}, TypeError, r"data\['tokens'\] is a list; expected a tensor"),
        (given_cache() | {"age": torch.zeros(6)}, {}, TypeError, "age has dtype torch.float32; expected integers"),
        (given_cache() | {"age": torch.zeros(5).int()}, {}, ValueError, r"age has shape \(5,\); expected \[6\]"),
        (given_cache() | {"age": torch.full((6,), -1)}, {}, ValueError, "age is -1 somewhere; expected 0 or more"),
    ],
)
def test_errors(cache: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert_cache(cache, **options)
    with pytest.raises(error, match=rf"in the cache 'b': .*{message}"):
        convert_caches({"b": cache}, **options)


# --- the script -----------------------------------------------------------------------------------------------------


def test_script(tmp_path: Path) -> None:
    source, target = tmp_path / "cache.pt", tmp_path / "state.pt"
    torch.save(Cache(**given_cache())._asdict(), source)
    options = ["--data-keys", "tokens", "--id-key", "index", "--dtype", "tokens=int64", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "negcache_fn.integrations.port", source, target, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "cache: 2 documents in 6 slots, step 6\n"
    state = torch.load(target, weights_only=True)
    assert isinstance(state, TensorDict)
    expected = convert_cache(
        given_cache(), data_keys=["tokens"], id_key="index", dtypes={"tokens": torch.int64}, seed=3
    )
    assert (state == expected).all()
    negcache_fn.validate(state)


def test_script_with_several_caches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "cache.pt", tmp_path / "state.pt"
    torch.save({"title": given_cache(), "body": given_cache()}, source)
    assert main([str(source), str(target), "--empty", "zero_embeddings", "--dtype", "tokens=int64"]) == 0
    assert capsys.readouterr().out == "body: 4 documents in 6 slots, step 6\ntitle: 4 documents in 6 slots, step 6\n"
    states = torch.load(target, weights_only=True)
    assert [(name, int(state["seed"])) for name, state in states.items()] == [("body", 0), ("title", 1)]
    assert all(state["items", "features", "tokens"].dtype == torch.int64 for state in states.values())


def test_script_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "cache.pt", tmp_path / "state.pt"
    call = [str(source), str(target)]
    assert main(call) == 1
    assert "No such file" in capsys.readouterr().err
    torch.save(Cache(**given_cache()), source)  # a class that is not known to weights_only
    assert main(call) == 1
    assert "torch.save(handler.cache._asdict()" in capsys.readouterr().err
    torch.save([1], source)
    assert main(call) == 1
    assert "holds a list; expected a dict" in capsys.readouterr().err
    torch.save(given_cache(), source)
    assert main([*call, "--embedding-key", "emb"]) == 1
    assert "embedding_key names 'emb'" in capsys.readouterr().err
    assert not target.exists()
    with pytest.raises(SystemExit):
        main([*call, "--dtype", "tokens"])
    assert "is not KEY=DTYPE" in capsys.readouterr().err
