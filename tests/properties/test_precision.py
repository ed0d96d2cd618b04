"""Half precision, mixed dtypes and autocast: against float64, and no worse than naive code in the same dtype."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import normalize

import negcache_fn
from negcache_fn._cache.validate import validate
from tests.support import oracles, strategies
from tests.support.builders import assert_same_state, make_state, same_snapshot, snapshot, unit
from tests.support.options import step_keywords

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, torch.float64)
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
LEAST_INFINITE = {
    torch.float16: 2.0**16 * (1 - 2.0**-12),
    torch.bfloat16: 2.0**128 * (1 - 2.0**-9),
    torch.float32: 2.0**128 * (1 - 2.0**-25),
    torch.float64: math.inf,
}
dtypes = st.sampled_from(DTYPES)


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype`, or none."""
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def norm(rows: Tensor) -> float:
    """The largest norm of a row."""
    return float(rows.detach().double().norm(dim=-1).max())


@dataclass
class Sampled:
    """A batch with a draw; the leaves are what has a gradient: queries, documents, negatives, scale."""

    state: TensorDictBase
    draw: negcache_fn.Draw
    leaves: list[Tensor]
    log_weights: Tensor | None = None
    in_batch: bool = True
    share_draws: bool = True
    staleness_correction: str = "self_normalized"

    def losses(self, *, sampled: bool) -> Tensor:
        """[B] of the package: `loss` or `exact_loss`."""
        queries, documents, negatives, scale = self.leaves
        options: dict[str, Any] = {"scale": scale, "log_weights": self.log_weights, "in_batch": self.in_batch}
        options["reduction"] = "none"
        if not sampled:
            return negcache_fn.exact_loss(self.state, queries, documents, **options)
        options |= {"share_draws": self.share_draws, "staleness_correction": self.staleness_correction}
        return negcache_fn.loss(queries, documents, negatives, self.draw, **options)

    def truth(self, *, sampled: bool) -> tuple[Tensor, list[Tensor]]:
        """[B] in float64, and the leaves there: each number is what it is in its own dtype."""
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        queries, documents, negatives, scale = leaves
        items, slots = self.state["items"], self.draw.slot.flatten().clamp(min=0)
        weight, alive = items["log_weight"], (items["embedded_at"] >= 0).tolist()
        stale = oracles.cache_scores(queries, items["embedding"], live=alive, log_weight=weight, scale=scale)
        logit = oracles.log_normalizer(stale)
        if sampled:
            fresh = oracles.cache_scores(queries, negatives, log_weight=weight[slots], scale=scale)
            probability = torch.from_numpy(oracles.probabilities(stale))[:, slots] * (self.draw.slot.flatten() >= 0)
            logit = oracles.sampled_cache_logits(
                fresh,
                stale[:, slots],
                probability,
                logit.detach(),
                self.draw.slot.shape[1],
                share_draws=self.share_draws,
                staleness_correction=self.staleness_correction,
            )
        options: dict[str, Any] = {"log_weights": self.log_weights, "in_batch": self.in_batch, "scale": scale}
        return oracles.cross_entropy(queries, documents, logit, **options), leaves

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the softmax: that of queries and cache, at least float32."""
        of_both = torch.promote_types(self.leaves[0].dtype, self.state["items", "embedding"].dtype)
        return torch.promote_types(of_both, torch.float32)

    @property
    def terms(self) -> list[float]:
        """How large a term of each leaf's gradient can be; the last, times the scale, is the largest score."""
        queries, documents, negatives, scale = self.leaves
        alive = (self.state["items", "embedded_at"] >= 0)[:, None]
        cached = torch.where(alive, self.state["items", "embedding"].double(), 0.0)
        largest, size = max(norm(documents), norm(negatives), norm(cached)), float(scale.detach())
        return [size * largest, size * norm(queries), size * norm(queries), norm(queries) * largest]


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Zeros where there is none."""
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def error(given: Tensor, expected: Tensor) -> float:
    """Norm of the difference."""
    return float((given.detach().double() - expected.detach()).norm())


@st.composite
def problems(draw: st.DrawFn) -> Sampled:
    """Every dtype for every tensor; any occupancy and log-weights; ties and zeros; one query or several."""
    dim, rows, samples = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    total = rows + draw(st.sampled_from([0, 2]))
    state = draw(strategies.states(dim))
    queries = draw(strategies.vectors(rows, dim, draw(dtypes)))
    documents = draw(strategies.vectors(total, dim, draw(dtypes)))
    scale = torch.tensor(draw(st.sampled_from([1e-3, 1.0, 20.0, 100.0, 1000.0])), dtype=draw(dtypes))
    found = negcache_fn.sample_gumbel(state, queries, draws_per_query=samples, scale=scale)
    generator = torch.Generator().manual_seed(draw(strategies.seeds))
    stale = torch.where(found.slot[..., None] >= 0, found.embedding.double(), 0.5).flatten(0, 1)
    drift = torch.randn(stale.shape, generator=generator).double() / max(10.0, 3 * float(scale))
    log_weights = None
    if draw(st.booleans()):
        log_weights = torch.randn(total, generator=generator).to(draw(dtypes))
        log_weights[rows:] = draw(st.sampled_from([0.5, -math.inf]))
    leaves = [queries, documents, (stale + drift).to(draw(dtypes)), scale]
    return Sampled(
        state,
        found,
        [leaf.requires_grad_() for leaf in leaves],
        log_weights,
        in_batch=draw(st.booleans()),
        share_draws=draw(st.booleans()),
        staleness_correction=draw(st.sampled_from(["none", "self_normalized"])),
    )


@given(problem=problems(), low=st.sampled_from([None, *HALVES]), sampled=st.booleans())
def test_losses_and_gradients_of_any_mixture(problem: Sampled, low: torch.dtype | None, sampled: bool) -> None:
    """Float32 or wider whatever comes in and whatever autocast says; a gradient in the dtype of its tensor."""
    with autocast(low):
        losses = problem.losses(sampled=sampled)
    truth, twins = problem.truth(sampled=sampled)
    expected = problem.wide
    if problem.log_weights is not None:
        expected = torch.promote_types(expected, problem.log_weights.dtype)
    assert losses.dtype == expected
    score = problem.terms[3] * float(problem.leaves[3].detach())
    noise = (1e-12 if problem.wide == torch.float64 else 2e-6) * (4 + score)
    assert bool(((losses.detach() - truth.detach()).abs() <= noise).all())
    found, right = gradients(losses.sum(), problem.leaves), gradients(truth.sum(), twins)
    for leaf, mine, theirs, term in zip(problem.leaves, found, right, problem.terms, strict=True):
        assert mine.dtype == leaf.dtype
        rounding = 2 * ROUNDING[leaf.dtype] * (theirs.abs() + len(truth) * term)
        allowed = rounding + noise * len(truth) * term + torch.finfo(leaf.dtype).smallest_normal
        assert bool(((mine.double() - theirs).abs() <= allowed).all())


SEARCHES: list[Callable[[TensorDictBase, Tensor, float], Any]] = [
    lambda state, queries, scale: negcache_fn.sample_gumbel(state, queries, scale=scale, draws_per_query=2),
    lambda state, queries, scale: negcache_fn.sample_gumbel(state, queries, scale=scale, top_k=1),
    lambda state, queries, scale: negcache_fn.top_negatives(state, queries, 1, scale=scale),
    lambda state, queries, scale: negcache_fn.score(state, queries, scale=torch.tensor(scale).bfloat16()),
    lambda state, queries, scale: negcache_fn.sample_gumbel(
        state, queries, scale=scale, score_transform=strategies.soft_cap
    ),
]


@given(
    state=strategies.states(5),
    queries=dtypes.flatmap(lambda dtype: strategies.vectors(3, 5, dtype)),
    low=st.sampled_from(HALVES),
    scale=st.sampled_from([1.0, 100.0]),
    search=st.sampled_from(SEARCHES),
)
def test_searches_see_half_precision_as_the_numbers_it_holds(
    state: TensorDictBase, queries: Tensor, low: torch.dtype, scale: float, search: Callable[..., Any]
) -> None:
    """Draws, mined negatives and scores under autocast: bit for bit those of the same numbers in float32."""
    with autocast(low):
        found = search(state, queries, scale)
    wide = queries.to(torch.promote_types(queries.dtype, torch.float32))
    assert same_snapshot(snapshot(found), snapshot(search(state, wide, scale)))


def topics(dtype: torch.dtype, storage: torch.dtype, scale: float, *, length: float = 1.0) -> Sampled:
    """Queries that know the topic of their positive, of which the cache is full; fresh embeddings nearby."""
    rows, capacity, dim = 8, 300, 16
    centres = unit(rows, dim, 0, torch.float64)
    documents = normalize(centres + 0.3 * unit(rows, dim, 1, torch.float64), dim=1)
    topic = centres.repeat(capacity // rows + 1, 1)[:capacity]
    cached = normalize(topic + 0.3 * unit(capacity, dim, 2, torch.float64), dim=1)
    queries = length * normalize(centres + 0.3 * unit(rows, dim, 3).double(), dim=1)
    state = make_state(cached.to(storage))
    draw = negcache_fn.sample_gumbel(state, queries.to(dtype), draws_per_query=2, scale=scale)
    fresh = draw.embedding.double().flatten(0, 1) + 0.05 / scale * unit(2 * rows, dim, 4).double()
    leaves = [queries.to(dtype), documents.to(dtype), fresh.to(dtype), torch.tensor(scale, dtype=dtype)]
    return Sampled(state, draw, [leaf.requires_grad_() for leaf in leaves])


def naive(problem: Sampled, *, sampled: bool) -> Tensor:
    """[B]: the same loss written down in the dtype of the queries, with all of the cache's scores."""
    queries, documents, negatives, scale = problem.leaves
    positives = scale * (queries @ documents.T)
    stale = scale * (queries @ problem.state["items", "embedding"].to(queries.dtype).T)
    logit = stale.logsumexp(1)
    if sampled:
        slots = problem.draw.slot.flatten()
        stale, logit = stale.detach()[:, slots], logit.detach()
        log_weight = (stale - logit[:, None]) - (stale - logit[:, None]).logsumexp(0)
        fresh = scale * (queries @ negatives.T)
        logit = logit + (log_weight + fresh - stale).logsumexp(1) - log_weight.logsumexp(1)
    return torch.cat([positives, logit[:, None]], 1).logsumexp(1) - positives.diagonal()


@pytest.mark.parametrize("sampled", [True, False], ids=["loss", "exact_loss"])
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_error_is_at_most_that_of_naive_code(dtype: torch.dtype, scale: float, sampled: bool) -> None:
    """In the same dtype, up to one rounding of the result; both against float64."""
    problem = topics(dtype, dtype, scale)
    truth, twins = problem.truth(sampled=sampled)
    right = gradients(truth.mean(), twins)
    with autocast(dtype):
        mine = problem.losses(sampled=sampled)
    theirs = naive(problem, sampled=sampled)
    assert error(mine, truth) <= min(error(theirs, truth), 1e-5 * (1 + scale))
    pairs = zip(gradients(mine.mean(), problem.leaves), gradients(theirs.mean(), problem.leaves), right, strict=True)
    for one, other, exact in pairs:
        assert error(one, exact) <= error(other, exact) + 2 * ROUNDING[dtype] * float(exact.norm())


@pytest.mark.parametrize("sampled", [True, False], ids=["loss", "exact_loss"])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_rounded_once(dtype: torch.dtype, sampled: bool) -> None:
    """Near-duplicates of the positive in the cache, where the terms of batch and cache cancel."""
    problem = topics(dtype, torch.float32, 20.0)
    truth, twins = problem.truth(sampled=sampled)
    found = gradients(problem.losses(sampled=sampled).mean(), problem.leaves)
    for one, exact in zip(found, gradients(truth.mean(), twins), strict=True):
        assert bool(((one.double() - exact).abs() <= 1.01 * ROUNDING[dtype] * exact.abs() + 3e-5).all())


@pytest.mark.parametrize("scale", [100.0, 1000.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_backward_where_autocast_is_on(dtype: torch.dtype, scale: float) -> None:
    """`exact_loss` recomputes its scores in float32 there too."""
    problem = topics(dtype, torch.float32, scale)
    expected = gradients(problem.losses(sampled=False).sum(), problem.leaves)[:2]
    with autocast(dtype):
        found = gradients(problem.losses(sampled=False).sum(), problem.leaves)[:2]
    for one, other in zip(found, expected, strict=True):
        assert error(one, other.double()) <= 4 * ROUNDING[dtype] * float(other.double().norm())


@pytest.mark.parametrize("sampled", [True, False], ids=["loss", "exact_loss"])
@pytest.mark.parametrize("storage", DTYPES)
def test_scores_beyond_float16(storage: torch.dtype, sampled: bool) -> None:
    """Scale 1000 and queries of length 100: scores of 1e5, which naive code turns into NaN."""
    problem = topics(torch.float16, storage, 1000.0, length=100.0)
    with autocast(torch.float16):
        losses = problem.losses(sampled=sampled)
    truth, twins = problem.truth(sampled=sampled)
    assert not bool(torch.isfinite(naive(problem, sampled=sampled)).all())
    assert error(losses, truth) <= 2e-6 * 1e5
    found = gradients(losses.mean(), problem.leaves)
    for one, exact, term in zip(found, gradients(truth.mean(), twins), problem.terms, strict=True):
        assert bool(torch.isfinite(one).all())
        assert error(one, exact) <= 0.05 * term


@pytest.mark.parametrize(
    ("storage", "size"), [(torch.float16, 1e-7), (torch.bfloat16, 1e-39), (torch.float32, 1e-39), (torch.float16, 6e4)]
)
def test_extremes_of_storage(storage: torch.dtype, size: float) -> None:
    """Subnormal embeddings and the largest of float16 count for what they are."""
    embedding = (unit(130, 8, 0, torch.float64) * size).to(storage)
    queries = (unit(4, 8, 1, torch.float64) * min(20 / size, 1e38)).float()
    state = make_state(embedding)
    scores = oracles.cache_scores(queries, embedding)
    expected = oracles.log_normalizer(scores)
    assert error(negcache_fn.sample_gumbel(state, queries).log_normalizer, expected) <= 1e-4
    assert error(negcache_fn.score(state, queries), scores) <= 1e-4
    assert float(scores.abs().max()) > 1e-2


@given(
    storage=dtypes,
    given_dtype=dtypes,
    powers=st.lists(st.sampled_from([-8, 0, 0, 3, 5, 40]), min_size=1, max_size=6),
    seed=strategies.seeds,
)
def test_storage_rounds_once_or_leaves_out(
    storage: torch.dtype, given_dtype: torch.dtype, powers: list[int], seed: int
) -> None:
    """Half a unit in the last place at most; what would be infinite is not written, neither new nor refreshed."""
    rows = unit(len(powers), 3, seed, torch.float64) * 10.0 ** torch.tensor(powers)[:, None].double()
    rows = rows.clamp(-torch.finfo(given_dtype).max, torch.finfo(given_dtype).max).to(given_dtype)
    fits = (rows.double().abs() < LEAST_INFINITE[storage]).all(-1)
    features, names = torch.zeros(len(rows), 1), torch.arange(len(rows))
    empty = negcache_fn.init_cache(8, 3, features, embedding_dtype=storage)
    new = negcache_fn.update(empty, features, rows, ids=names)
    old = negcache_fn.update(empty, features, torch.ones(len(rows), 3), ids=names)
    renewed = negcache_fn.update(old, features[:1], torch.ones(1, 3), refresh=(names, rows))
    kept = int(fits.sum())
    assert new["items", "id"].tolist() == names[fits].tolist() + [-1] * (8 - kept)
    assert bool((renewed["items", "embedding"][: len(rows)][~fits] == 1.0).all())
    least = torch.tensor(torch.finfo(storage).smallest_normal, dtype=torch.float64)
    exact = rows[fits].double()
    for held in (new["items", "embedding"][:kept], renewed["items", "embedding"][: len(rows)][fits]):
        allowed = 1.001 * ROUNDING[storage] * torch.maximum(exact.abs(), least)
        assert bool(((held.double() - exact).abs() <= allowed).all())
    validate(new)
    validate(renewed)


def test_log_weight_beyond_float32_is_left_out() -> None:
    """As one that is infinite to begin with."""
    state = negcache_fn.init_cache(4, 2, torch.zeros(1, 1))
    weights = torch.tensor([1e39, 0.0, -1e39], dtype=torch.float64)
    state = negcache_fn.update(state, torch.zeros(3, 1), torch.ones(3, 2), log_weights=weights)
    validate(state)
    assert state["items", "log_weight"][:2].tolist() == [0.0, -math.inf]


def test_rows_too_large_for_storage_are_counted() -> None:
    """New documents and drawn ones; a drawn one keeps its embedding and its age."""
    cached, new = torch.ones(6, 2), torch.tensor([[1.0, 2.0], [1e5, 0.0], [0.0, -7e4]])
    cached[3:] = 1e6
    state = make_state(unit(6, 2, 0, torch.float16), features=cached, step=5)
    draws = {"in_batch": False, "draws_per_query": 4, "scale": 0.01}
    out = negcache_fn.step(state, torch.zeros(1, 2), new, lambda rows: rows, **step_keywords(**draws))
    slots = out.draw.slot.flatten().tolist()
    assert any(slot >= 3 for slot in slots)
    assert int(out.metrics["non_finite"]) == 2 + sum(slot >= 3 for slot in slots)
    items, before = out.state["items"], state["items"]
    assert int((items["inserted_at"] == 5).sum()) == 1
    for slot in {slot for slot in slots if slot >= 3}:
        assert torch.equal(items["embedding"][slot], before["embedding"][slot])
        assert int(items["embedded_at"][slot]) == 0
    validate(out.state)


class Recorded(nn.Module):
    """An encoder that keeps what it gave, to look at the gradient that came back."""

    def __init__(self, encode: nn.Module) -> None:
        super().__init__()
        self.encode = encode
        self.given = torch.empty(0)

    def forward(self, features: Tensor) -> Tensor:
        """[N, ...] -> [N, D]."""
        self.given = self.encode(features)
        self.given.retain_grad()
        return self.given


def towers(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Recorded, Recorded]:
    """Of queries and documents, both [rows, 5] to [rows, 6]."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Recorded] = []
    for _ in range(2):
        linear = nn.Linear(5, 6, dtype=dtype)
        for parameter in linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) / 2
        made.append(Recorded(linear))
    return made[0], made[1]


@pytest.mark.parametrize("function", [negcache_fn.step, negcache_fn.step_], ids=["step", "step_"])
@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("low", [None, *HALVES])
def test_whole_step(low: torch.dtype | None, storage: torch.dtype, function: Callable[..., Any]) -> None:
    """Towers under autocast, or in float64: loss, the gradients that reach the towers, and what is stored."""
    wide = torch.float64 if low is None else torch.float32
    features = unit(40, 5, 0, wide)
    questions, tower = towers(wide)
    state = negcache_fn.init_cache(24, 6, features, embedding_dtype=storage)
    state = negcache_fn.update(state, features[:20], tower.encode(features[:20]) + 0.01)
    before = state.clone()
    options = {"scale": 20.0, "draws_per_query": 2, "ids": torch.arange(30, 36)}
    with autocast(low):
        out = function(state, questions(unit(4, 5, 1, wide)), features[30:36], tower, **step_keywords(**options))
    out.loss.backward()
    queries, embeddings = questions.given, tower.given
    assert queries.dtype == embeddings.dtype == (low or torch.float64)
    given = [queries, embeddings[:6], embeddings[6:], torch.tensor(20.0)]
    problem = Sampled(before, out.draw, [leaf.detach() for leaf in given])
    truth, twins = problem.truth(sampled=True)
    noise = 1e-12 if problem.wide == torch.float64 else 2e-6
    score = 20 * problem.terms[3]
    assert out.loss.dtype == problem.wide
    assert abs(float(out.loss.detach()) - float(truth.mean().detach())) <= noise * (4 + score)
    of_queries, of_documents, of_draws, _ = gradients(truth.mean(), twins)
    assert queries.grad is not None
    assert embeddings.grad is not None
    for mine, theirs, term in (
        (queries.grad, of_queries, problem.terms[0]),
        (embeddings.grad, torch.cat([of_documents, of_draws]), problem.terms[1]),
    ):
        assert mine.dtype == (low or torch.float64)
        assert error(mine, theirs) <= (2 * ROUNDING[mine.dtype] + noise * (4 + score)) * term
    items, slots = out.state["items"], out.draw.slot.flatten()
    written = {int(slot): row for slot, row in zip(slots, embeddings[6:].detach(), strict=True)}
    assert sorted(items["id"][items["inserted_at"] == 1].tolist()) == list(range(30, 36))
    written |= {int((items["id"] == 30 + n).nonzero()): row for n, row in enumerate(embeddings[:6].detach())}
    assert items["embedding"].dtype == storage
    for slot, row in written.items():
        rounding = ROUNDING[storage] * row.double().abs()
        assert bool(((items["embedding"][slot].double() - row.double()).abs() <= rounding).all())
    fresh, stale = embeddings[6:].detach().double(), before["items", "embedding"][slots].double()
    drift = ((fresh - stale).square().sum(1) / fresh.square().sum(1)).mean()
    assert float(out.metrics["drift"]) == pytest.approx(float(drift), rel=1e-4)
    assert all(value.dtype == problem.wide for name, value in out.metrics.items() if name != "non_finite")


@pytest.mark.parametrize("storage", DTYPES)
def test_drift_of_storage_alone(storage: torch.dtype) -> None:
    """An encoder at rest drifts by the rounding of what is stored, and no more."""
    features = unit(12, 5, 0)
    questions, tower = towers()
    state = negcache_fn.init_cache(12, 6, features, embedding_dtype=storage)
    state = negcache_fn.update(state, features, tower(features))
    drift = float(negcache_fn.step(state, questions(features), features, tower).metrics["drift"])
    assert drift <= ROUNDING[storage] ** 2 + 1e-14
    assert storage not in HALVES or drift > ROUNDING[storage] ** 2 / 30


def training(scaler: torch.amp.GradScaler, steps: int, spoil: int = -1) -> list[dict[str, Any]]:
    """A loop in float16 on the CPU; at the step `spoil` one document overflows in its encoder."""
    features = unit(48, 5, 0)
    questions, tower = towers()
    optimizer = torch.optim.SGD([*questions.parameters(), *tower.parameters()], lr=0.01)
    state, log = negcache_fn.init_cache(16, 6, features), []
    for n, rows in enumerate(torch.arange(4 * steps).split(4)):
        before = [parameter.detach().clone() for parameter in optimizer.param_groups[0]["params"]]
        documents = features[rows] * (1e6 if n == spoil else 1.0) ** (torch.arange(4) == 2)[:, None]
        with torch.autocast("cpu", dtype=torch.float16):
            out = negcache_fn.step(state, questions(features[rows]), documents, tower, ids=rows, scale=20.0)
        scaler.scale(out.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        state = out.state
        validate(state)
        after = optimizer.param_groups[0]["params"]
        moved = not all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        log.append({"moved": moved, "scale": scaler.get_scale(), "state": state, "out": out})
    return log


def test_gradients_that_overflow_are_skipped_and_the_cache_goes_on() -> None:
    """The gradient scaler halves until gradients fit; a skipped step has filled the cache all the same."""
    log = training(torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=1000), 12)
    scale = 2.0**18
    for entry in log:
        scale = scale if entry["moved"] else scale / 2
        assert entry["scale"] == scale
    assert [entry["moved"] for entry in log[:2]] == [False, False]
    assert log[-1]["moved"]
    assert all(int(entry["out"].metrics["non_finite"]) == 0 for entry in log)
    plain = training(torch.amp.GradScaler("cpu", enabled=False), 1)
    assert_same_state(log[0]["state"], plain[0]["state"])


def test_documents_that_overflow_are_skipped_and_left_out() -> None:
    """An infinite class makes the loss so: no update of the weights, the document not cached, the rest is."""
    log = training(torch.amp.GradScaler("cpu", init_scale=128.0), 5, spoil=2)
    assert [entry["moved"] for entry in log] == [True, True, False, True, True]
    assert [int(entry["out"].metrics["non_finite"]) for entry in log] == [0, 0, 1, 0, 0]
    assert log[2]["scale"] == 64.0
    assert not math.isfinite(float(log[2]["out"].loss.detach()))
    assert sorted(log[2]["state"]["items", "id"].tolist()) == [-1] * 5 + [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11]


@pytest.mark.no_cover
@pytest.mark.parametrize("low", HALVES)
def test_compiled_under_autocast_equals_eager_under_autocast(low: torch.dtype) -> None:
    """One graph, autocast inside, three steps: losses, gradients, state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, at import
        importlib.import_module("torch._inductor.compile_fx")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    features, results = unit(24, 5, 0), []
    for compiled in (False, True):
        questions, tower = (recorded.encode for recorded in towers())
        state, losses = negcache_fn.init_cache(70, 6, features, embedding_dtype=low), []

        def forward(state: TensorDictBase, rows: Tensor, questions: Any = questions, tower: Any = tower) -> Any:
            with torch.autocast("cpu", dtype=low):
                queries = questions(rows)
                exact = negcache_fn.exact_loss(state, queries, tower(rows), scale=100.0)
                return negcache_fn.step(
                    state, queries, rows, tower, scale=100.0, options=negcache_fn.StepOptions(draws_per_query=2)
                ), exact

        call = torch.compile(forward, fullgraph=True, backend=counter) if compiled else forward
        for rows in features.split(8):
            out, exact = call(state, rows)
            (out.loss + exact).backward()
            state = out.state
            losses.append((out.loss.detach(), exact.detach(), out.draw.slot))
        weights = [*questions.parameters(), *tower.parameters()]
        results.append((state, losses, [weight.grad for weight in weights]))
    assert counter.frame_count == 1
    (state, losses, found), (other_state, other_losses, other_found) = results
    assert_same_state(state, other_state)
    assert same_snapshot(snapshot(losses), snapshot(other_losses))
    for one, other in zip(found, other_found, strict=True):
        assert error(one, other.double()) <= 4 * ROUNDING[low] * (1 + float(other.norm()))
    torch._dynamo.reset()
