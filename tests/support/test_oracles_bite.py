"""Every check passes on a naive right implementation and fails on each broken one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from tensordict import TensorDictBase
from torch import Tensor

import negcache_fn
from tests.cache.test_update import CacheMachine
from tests.support import oracles, reference
from tests.support.builders import make_state, unit
from tests.support.checks import draws, exact, for_batch, losses, noise, updates
from tests.support.checks.problems import Scenario, scenarios
from tests.support.reference import Reference

SCENARIOS = scenarios()
RIGHT = Reference()


def check_sampling(it: Reference) -> None:
    """What test_sampling asks, over a state on which each fault shows."""
    slots = torch.arange(40)
    state = make_state(
        unit(40, 4, 0),
        live=slots % 5 != 3,
        ids=torch.where(slots % 2 == 0, slots, -1),
        log_weight=torch.linspace(-2, 2, 40),
    )
    queries, names = unit(2, 4, 1), torch.tensor([0, 2, 38, 36, 34, 32])
    limit = negcache_fn.FalseNegatives(max_score=torch.tensor([0.5, 1.0]))
    for options in ({}, {"exclude_ids": names}, {"top_k": 6}, {"false_negatives": limit}):
        draws.fields(it.sample_gumbel, state, queries, scale=3.0, draws_per_query=9, **options)
        draws.distribution(it.sample_gumbel, state, queries, scale=3.0, copies=256, **options)
    draws.cutoff_separates(it.sample_gumbel, state, queries, 6, scale=3.0)
    draws.many_steps(it.sample_gumbel, state, queries[0], steps=400, scale=3.0)
    draws.joint_independence(it.sample_gumbel, steps=20)
    draws.pairs_are_independent(it.sample_gumbel, make_state(unit(3, 4, 0)), unit(4, 4, 1), steps=150, scale=2.0)
    draws.perturbed_values(it.sample_gumbel, state, queries, steps=20, scale=3.0)


def check_loss(it: Reference) -> None:
    """What test_objective asks, over the scenarios on which each fault shows."""
    for name in (
        "two samples",
        "ids, own positives only",
        "duplicate ids",
        "log-weights",
        "transform",
        "top_k",
        "several positives",
        "margin, log-weights, transform",
        "all at once",
    ):
        scenario = SCENARIOS[name]
        losses.expected_gradient_exact(it.loss, scenario, share_draws=True, staleness_correction="none")
        losses.expected_gradient_exact(it.loss, scenario, share_draws=False, staleness_correction="self_normalized")
        losses.follows_formula(it.loss, replace(scenario, drift=0.5), share_draws=True, staleness_correction="none")


def check_correction(it: Reference) -> None:
    """What test_objective asks of the staleness corrections."""
    scenario = replace(SCENARIOS["no in-batch"], drift=0.7, scale=1.0)
    losses.follows_formula(it.loss, scenario, share_draws=True, staleness_correction="self_normalized")
    losses.converges_to_fresh(it.loss, share_draws=False)


def check_batch_sampling(it: Reference) -> None:
    """What test_for_batch asks of a sampler, over states on which each fault shows."""
    slots, weights = torch.arange(40), torch.linspace(-2, 2, 40)
    state = make_state(
        unit(40, 4, 0), live=slots % 5 != 3, ids=torch.where(slots % 2 == 0, slots, -1), log_weight=weights
    )
    queries, names, some = unit(2, 4, 1), torch.tensor([0, 2, 38, 36, 34, 32]), torch.tensor([0.1, 1.0])
    limit = negcache_fn.FalseNegatives(max_score=torch.tensor([0.5, 1.0]))
    for options in ({}, {"exclude_ids": names}, {"top_k": 6}, {"false_negatives": limit}):
        for num_draws in (3, 60):
            options = options | {"num_draws": num_draws, "importance": some, "scale": 3.0}
            for_batch.fields(it.sample_gumbel, state, queries, **options)
    for_batch.race_law(it.sample_gumbel, state, queries, num_draws=3, importance=some, scale=3.0)
    small = make_state(unit(6, 4, 0), live=slots[:6] != 3, ids=slots[:6], log_weight=weights[::7])
    options = {"exclude_ids": torch.tensor([5]), "importance": some, "scale": 2.0}
    for_batch.ordered_law(it.sample_gumbel, small, queries, num_draws=2, **options)
    for_batch.inclusion(it.sample_gumbel, make_state(unit(6, 4, 0)), queries, num_draws=2)


OF_THE_BATCH = ("plain", "ids, own positives only", "top_k", "margin, log-weights, transform", "all at once")


def check_batch_loss(it: Reference) -> None:
    """What test_for_batch asks of the loss, over the scenarios on which each fault shows."""
    for name in (*OF_THE_BATCH, "nothing left for one", "top_k of one"):
        for correction in ("none", "self_normalized"):
            for_batch.follows_formula(it.loss, SCENARIOS[name], staleness_correction=correction)


def check_batch_mean(it: Reference) -> None:
    """The same by single draws and by the mean, whatever formula the weights follow."""
    for name in OF_THE_BATCH:
        for_batch.exact_where_fresh(negcache_fn.sample_gumbel, it.loss, SCENARIOS[name])
        for_batch.expected_gradient_exact(it.loss, SCENARIOS[name])
    for_batch.exact_where_all_are_drawn(negcache_fn.sample_gumbel, it.loss, Scenario(rows=2, documents=2, capacity=3))
    for_batch.converges(it.loss)


def check_update(it: Reference) -> None:
    """What test_updating and test_purity ask."""
    updates.history(negcache_fn.init_cache, it.update)
    updates.update_is_pure(negcache_fn.init_cache, it.update)


def fails(check: Callable[..., None], *arguments: Any) -> None:
    """The check must raise an AssertionError, not just any error."""
    with pytest.raises(AssertionError):
        check(*arguments)


CHECKS = [
    *(check_sampling, check_loss, check_correction, check_update),
    *(check_batch_sampling, check_batch_loss, check_batch_mean),
]


@pytest.mark.parametrize("check", CHECKS)
def test_checks_pass_on_the_naive_implementation(check: Callable[[Reference], None]) -> None:
    """Otherwise a failure on a fault would mean nothing."""
    check(RIGHT)


@pytest.mark.parametrize("fault", reference.SAMPLING_FAULTS)
def test_sampling_checks_bite(fault: str) -> None:
    """Each broken sampler is found."""
    fails(check_sampling, Reference(fault))


@pytest.mark.parametrize("fault", reference.LOSS_FAULTS)
def test_loss_checks_bite(fault: str) -> None:
    """Each broken loss is found."""
    fails(check_correction if fault == "correction upside down" else check_loss, Reference(fault))


@pytest.mark.parametrize("fault", reference.BATCH_SAMPLING_FAULTS)
def test_checks_of_sampling_for_the_batch_bite(fault: str) -> None:
    """Each broken sampler is found."""
    fails(check_batch_sampling, Reference(fault))


@pytest.mark.parametrize("fault", reference.BATCH_LOSS_FAULTS)
def test_checks_of_the_loss_for_the_batch_bite(fault: str) -> None:
    """Each broken loss is found."""
    fails(check_batch_loss, Reference(fault))


BIASED = (
    *("weights forget the threshold", "inclusion without its inverse", "normalizer without gradient"),
    *("stale scores without gradient", "forgets exclusions", "missing draws count"),
)


@pytest.mark.parametrize(
    "fault", [*BIASED, "stale scores without gradient", "forgets exclusions", "missing draws count"]
)
def test_checks_of_means_for_the_batch_bite(fault: str) -> None:
    """Each biased loss is found, whatever formula it follows."""
    fails(check_batch_mean, Reference(fault))


@pytest.mark.parametrize("fault", reference.UPDATE_FAULTS)
def test_update_checks_bite(fault: str) -> None:
    """Each broken update is found."""
    fails(check_update, Reference(fault))


@pytest.mark.parametrize("fault", ["", *reference.UPDATE_FAULTS])
def test_cache_machine_bites(fault: str) -> None:
    """The random life finds each broken update too, and nothing in the right one."""

    class Machine(CacheMachine):
        pure = staticmethod(Reference(fault).update)
        in_place = None

    quick = settings(max_examples=60 if fault else 10, stateful_step_count=25, phases=[Phase.generate], database=None)
    if fault:
        with pytest.raises(AssertionError):
            run_state_machine_as_test(Machine, settings=quick)
    else:
        run_state_machine_as_test(Machine, settings=quick)


def test_uncorrected_loss_does_not_converge() -> None:
    """Passing off "none" as "self_normalized" is found."""

    def uncorrected(*arguments: Any, **options: Any) -> Tensor:
        return RIGHT.loss(*arguments, **{**options, "staleness_correction": "none"})

    fails(lambda: losses.converges_to_fresh(uncorrected, share_draws=False))
    fails(lambda: losses.converges_in_sampling(uncorrected, "self_normalized", share_draws=True, repeats=4))


@pytest.mark.parametrize("fault", ["first duplicate", "no positive", "float32", "gradient"])
def test_exact_loss_checks_bite(fault: str) -> None:
    """A naive exact loss passes; an inexact one, one without gradient, one with a class too few do not."""

    def naive(state: TensorDictBase, queries: Tensor, documents: Tensor, *, broken: str = "", **options: Any) -> Tensor:
        ids, in_batch = options["ids"], options["in_batch"]
        names = None if ids is None else ids.tolist()
        exclude = oracles.excluded_ids(names, len(queries), in_batch=in_batch)
        shared = {"scale": options["scale"], "transform": options["score_transform"]}
        scores = oracles.cache_scores(
            queries.detach() if broken == "gradient" else queries,
            state["items", "embedding"],
            live=(state["items", "embedded_at"] >= 0).tolist(),
            log_weight=state["items", "log_weight"],
            ids=state["items", "id"].tolist(),
            exclude=None if broken == "no positive" else exclude,
            top_k=options["top_k"],
            **shared,
        )
        logits = oracles.log_normalizer(scores)
        logits = logits.float().double() if broken == "float32" else logits
        if broken == "first duplicate":
            names = None
        given = oracles.cross_entropy(
            queries, documents, logits, ids=names, log_weights=options["log_weights"], in_batch=in_batch, **shared
        )
        return {"none": given, "sum": given.sum(), "mean": given.mean()}[options["reduction"]]

    exact.counts_every_class(naive)
    fails(lambda: exact.counts_every_class(lambda *a, **o: naive(*a, broken=fault, **o)))


def uniform(seed: Tensor, step: Tensor, row: Tensor, quad: Tensor, *, level: int) -> Tensor:
    """Independent uniforms of 53 bits, a stream for each (seed, step, row, level)."""
    stream = np.random.default_rng([int(seed), int(step), int(row), level])
    return torch.from_numpy(stream.random((len(quad), 4)))


def gumbel(*counters: Tensor, level: int, bits: int = 53, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Gumbel noise from `bits` bits."""
    grid = 2.0**bits
    value = (torch.floor(uniform(*counters, level=level) * grid) + 0.5) / grid
    return shift - scale * torch.log(-torch.log1p(-value))


def test_noise_checks_pass_on_right_noise() -> None:
    """Double precision noise passes them all."""
    noise.moments(gumbel)
    noise.kolmogorov_smirnov(gumbel)
    noise.streams_differ(gumbel)
    noise.upper_tail(gumbel, repeats=1)


def test_noise_checks_bite() -> None:
    """A 23-bit tail, wrong location or scale, a clipped tail, and streams that repeat are found."""
    fails(noise.upper_tail, lambda *c, level: gumbel(*c, level=level, bits=23))
    fails(noise.upper_tail, lambda *c, level: gumbel(*c, level=level).clamp(max=12.0))
    fails(noise.moments, lambda *c, level: gumbel(*c, level=level, shift=0.01))
    fails(noise.moments, lambda *c, level: gumbel(*c, level=level, scale=1.01))
    fails(noise.kolmogorov_smirnov, lambda *c, level: gumbel(*c, level=level).clamp(max=4.0))
    fails(noise.streams_differ, lambda seed, step, row, quad, level: gumbel(seed, step, row, quad, level=0))
    fails(noise.streams_differ, lambda seed, step, row, quad, level: gumbel(seed, step, 0 * row, quad, level=level))
    fails(noise.streams_differ, lambda seed, step, row, quad, level: gumbel(seed % 2**32, step, row, quad, level=level))


@pytest.mark.parametrize("bits", [23, 24])
def test_extreme_checks_bite(bits: int) -> None:
    """-log(-log(u)) in float32, the usual shortcut, is not finite at one end or stops short at the other."""

    def shortcut(word: int) -> Tensor:
        value = torch.tensor((word >> (32 - bits)) / 2.0**bits, dtype=torch.float32)
        return -torch.log(-torch.log(value.clamp_min(2.0**-bits)))

    fails(noise.extremes, shortcut)


def test_philox_checks_bite() -> None:
    """Nine rounds, or swapped words, are found."""

    def integers(rounds: int) -> Callable[..., tuple[Tensor, ...]]:
        def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            counters, keys = torch.stack(list(counter), -1), torch.stack(list(key), -1)
            flat = zip(counters.view(-1, 4).tolist(), keys.view(-1, 2).tolist(), strict=True)
            out = torch.tensor([oracles.philox4x32(c, k, rounds) for c, k in flat])
            return tuple(out.view(*counters.shape).unbind(-1))

        return philox

    noise.known_answers(integers(10))
    noise.same_as_integers(integers(10))
    fails(noise.known_answers, integers(9))
    fails(lambda: noise.same_as_integers(lambda c, k: integers(10)(c[::-1], k)))


def test_purity_check_bites() -> None:
    """A write, a moved generator and a changing answer are found; structure alone would not show the first."""
    state = make_state(unit(3, 2, 0))
    updates.pure(lambda s: s["items", "embedding"].sum(), state)
    fails(updates.pure, lambda s: s["items", "embedding"].mul_(2), state)
    fails(updates.pure, lambda s: s["items"].set_("log_weight", torch.ones(3)), state)
    fails(updates.pure, lambda s: torch.rand(()), state)
    counter = iter(range(9))
    fails(updates.pure, lambda s: torch.tensor(next(counter)), state)


def test_chi_square_is_calibrated() -> None:
    """p-values of right counts are uniform: under 0.05 in about one of twenty (5 standard errors of 400)."""
    chances = torch.softmax(2 * torch.randn(50, generator=torch.Generator().manual_seed(0)).double(), 0)
    generator, small = torch.Generator().manual_seed(1), 0
    for _ in range(400):
        drawn = torch.multinomial(chances, 2000, replacement=True, generator=generator)
        counts = torch.bincount(drawn, minlength=50).double().numpy()
        small += oracles.chi_square_pvalue(counts, chances.numpy()) < 0.05
    assert abs(small - 20) < 5 * math.sqrt(400 * 0.05 * 0.95)
    assert oracles.chi_square_pvalue(counts, (chances.flip(0)).numpy()) < oracles.FALSE_ALARM
