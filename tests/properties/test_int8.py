"""Int8 storage is float32 storage of the rows that it decodes to: in draws, losses, gradients, mining and steps.

Without kernels the two run the same arithmetic, so they must agree bit for bit.
"""

from __future__ import annotations

import importlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import negcache_fn
from negcache_fn import distributed, nn
from negcache_fn._cache import select
from negcache_fn._kernels.cpu import call as cpu
from tests.support import oracles, strategies
from tests.support.builders import assert_same_state, is_close, same_bits, unit
from tests.support.checks.steps import Tower, documents

SCALE_KEY = ("items", "embedding_scale")


def quantised(state: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
    """The state in int8, and as float32 with the same rows; empty slots hold garbage in both."""
    items = dict(state["items"].items())
    embedding = items["embedding"].double()
    scale = (embedding.abs().amax(1) / 127).half().float()  # any positive number would do
    rows = (embedding / scale.double().clamp(min=1e-9)[:, None]).round().clamp(-127, 127)
    rows = rows.to(torch.int8)  # without negative zeros
    stored = {"embedding": rows, "embedding_scale": scale}
    decoded = {"embedding": (rows.double() * scale.double()[:, None]).float()}
    return tuple(
        TensorDict(
            {
                "items": TensorDict(items | columns, batch_size=[len(scale)]),
                "step": state["step"].clone(),
                "seed": state["seed"].clone(),
            },
            batch_size=[],
        ).lock_()
        for columns in (stored, decoded)
    )


def decoded(state: TensorDictBase) -> Tensor:
    """[C, D] float64."""
    items = state["items"]
    return items["embedding"].double() * items["embedding_scale"].double()[:, None]


@pytest.fixture
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "supports", lambda *_: False)


def assert_same(found: Any, expected: Any) -> None:
    for name, value, wanted in zip(expected._fields, found, expected, strict=True):
        assert same_bits(value, wanted), f"{name}: {value} against {wanted}"


def example(*, storage: torch.dtype = torch.int8, capacity: int = 90, seed: int = 0) -> TensorDictBase:
    """Two thirds full."""
    state = negcache_fn.init_cache(capacity, 6, documents(1, 0), embedding_dtype=storage, seed=4)
    rows = 2 * capacity // 3
    return negcache_fn.update(state, documents(rows, seed), 3 * unit(rows, 6, seed), ids=torch.arange(rows))


@pytest.mark.usefixtures("_plain")
@given(case=strategies.cases(), num_draws=st.integers(1, 5), double=st.booleans())
def test_scores_draws_and_losses_are_those_of_the_decoded_rows(
    case: strategies.Case, num_draws: int, double: bool
) -> None:
    wide = torch.float64 if double else torch.float32
    results: list[list[Any]] = []
    for state in quantised(case.state):
        negcache_fn.validate(state)
        queries = case.queries.to(wide).requires_grad_()
        rows, options = case.documents.to(wide).requires_grad_(), case.sample_options
        draw = negcache_fn.sample_gumbel(state, queries, **options)
        options = {**options, "num_draws": num_draws}
        del options["draws_per_query"]
        of_batch = negcache_fn.sample_gumbel(state, queries, **options)
        found: list[Any] = []
        for drawn in (draw, of_batch):
            assert drawn.embedding.dtype == torch.float32
            fresh = (drawn.embedding.flatten(0, 1).to(wide) + 0.1).requires_grad_()
            losses = negcache_fn.loss(queries, rows, fresh, drawn, **case.loss_options)
            gradients = torch.autograd.grad(losses.nan_to_num().sum(), [queries, rows, fresh], allow_unused=True)
            found += [losses, *gradients, *drawn]
        exact = negcache_fn.exact_loss(state, queries, rows, **case.exact_options)
        found += [exact, *torch.autograd.grad(exact.sum(), [queries, rows], allow_unused=True)]
        mining = {key: case.sample_options[key] for key in ("scale", "score_transform", "exclude_ids")}
        found += negcache_fn.top_negatives(state, queries, len(state["items", "id"]), **mining)
        mining.pop("exclude_ids")
        found.append(negcache_fn.score(state, queries, **mining))
        results.append(found)
    for value, wanted in zip(*results, strict=True):
        assert (value is None) == (wanted is None)
        assert value is None or same_bits(value, wanted), f"{value} against {wanted}"


@pytest.mark.usefixtures("_plain")
@pytest.mark.parametrize("transform", [None, strategies.soft_cap])
@pytest.mark.parametrize("segment", [2**19, 4096])
def test_caches_that_are_read_by_parts(transform: Any, segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a pass, and segments of a cache: each part has its own scales."""
    monkeypatch.setattr(select, "_SEGMENT", segment)
    results: list[list[Tensor]] = []
    for state in quantised(example(storage=torch.float32, capacity=7000)):
        queries = unit(3, 6, 5).requires_grad_()
        draw = negcache_fn.sample_gumbel(state, queries, num_draws=9, scale=9.0, score_transform=transform)
        scores, slots = negcache_fn.top_negatives(state, queries, 300, scale=9.0, score_transform=transform)
        gradient = torch.autograd.grad(draw.log_normalizer.sum(), queries)[0]
        results.append([*(value.detach() for value in draw), scores, slots, gradient])
    for value, wanted in zip(*results, strict=True):
        assert same_bits(value, wanted)


@given(case=strategies.cases())
def test_the_normalizer_and_the_score_of_a_draw_are_the_exact_ones(case: strategies.Case) -> None:
    """With the kernels, against float64."""
    state, _ = quantised(case.state)
    items = state["items"]
    scores = oracles.cache_scores(
        case.queries,
        decoded(state),
        live=(items["embedded_at"] >= 0).tolist(),
        log_weight=items["log_weight"],
        scale=case.scale,
        transform=case.transform,
    )
    options: dict[str, Any] = {"scale": case.scale, "score_transform": case.transform, "draws_per_query": 2}
    draw = negcache_fn.sample_gumbel(state, case.queries, **options)
    assert is_close(draw.log_normalizer, oracles.log_normalizer(scores), 2e-5, 1 + case.scale)
    for i, slots in enumerate(draw.slot.tolist()):
        for m, slot in enumerate(slots):
            if slot >= 0:
                assert is_close(draw.score[i, m], scores[i, slot], 2e-5, 1 + case.scale)
                assert torch.equal(draw.embedding[i, m].double(), decoded(state)[slot])


@given(seed=st.integers(0, 999), rows=st.integers(1, 7), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_update_writes_what_float64_storage_would_round(seed: int, rows: int, dtype: torch.dtype) -> None:
    """Both columns, of the same rows, in the same slots; a row that has no scale stays out."""
    generator = torch.Generator().manual_seed(seed)
    states = [example(storage=storage, capacity=9) for storage in (torch.int8, torch.float64)]
    embeddings, fresh = torch.randn(2, rows, 6, generator=generator, dtype=dtype) * 10 ** torch.randn(1).to(dtype)
    embeddings[rows // 2] *= float(torch.tensor([1.0, 0.0, math.nan, math.inf])[seed % 4])
    ids = torch.randint(-1, 12, (rows,), generator=generator)
    refresh = (torch.randint(-1, 9, (rows,), generator=generator), fresh)
    before, expected = (
        negcache_fn.update(state, documents(rows, seed), embeddings, ids=ids, refresh=refresh) for state in states
    )
    for key, value in expected.items(True, True):
        if key != ("items", "embedding"):
            assert torch.equal(before[key], value), key
    alive = expected["items", "embedded_at"] >= 0
    rounding = expected["items", "embedding"].abs().amax(1) / 127 * 0.51
    error = (decoded(before) - expected["items", "embedding"]).abs().amax(1)
    assert bool((error <= rounding)[alive].all())
    assert not bool(before[SCALE_KEY][~alive].any())
    negcache_fn.validate(before)


@pytest.mark.usefixtures("_plain")
@pytest.mark.parametrize("options", [{"num_draws": 5, "refresh_stalest": 3}, {"draws_per_query": 2, "top_k": 20}])
def test_a_step_is_that_of_the_decoded_rows(options: dict[str, Any]) -> None:
    """The first of a run: loss, metrics, draws and gradients bit for bit, and what is written rounded again."""
    outs: list[negcache_fn.StepOutput] = []
    gradients: list[Tensor] = []
    for state in quantised(example(storage=torch.float32)):
        tower = Tower(seed=2)
        queries = tower(documents(3, 7))
        more = {"ids": torch.arange(5), "scale": 5.0, "options": negcache_fn.StepOptions(**options)}
        out = negcache_fn.step(state, queries, documents(5, 8), tower, **more)
        gradients.append(
            torch.cat([gradient.flatten() for gradient in torch.autograd.grad(out.loss, tower.parameters())])
        )
        outs.append(out)
    found, expected = outs
    assert same_bits(*gradients)
    assert same_bits(found.loss, expected.loss)
    assert_same(found.draw, expected.draw)
    for name, value in expected.metrics.items():
        assert same_bits(found.metrics[name], value), name
    after, wanted = found.state["items"], expected.state["items"]
    assert torch.equal(after["embedded_at"], wanted["embedded_at"])
    error = (decoded(found.state) - wanted["embedding"].double()).abs().amax(1)
    assert bool((error <= wanted["embedding"].double().abs().amax(1) * 0.51 / 127).all())
    assert float(error.max()) > 0


@pytest.mark.no_cover
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{"num_draws": 5, "refresh_stalest": 3}, {"draws_per_query": 2}])
def test_compiled_steps_equal_eager_ones(backend: str, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def forward(state: TensorDictBase, questions: Any, batch: Any, tower: Tower) -> negcache_fn.StepOutput:
        given_options = {"ids": torch.arange(5) + 70, "scale": 5.0, "options": negcache_fn.StepOptions(**options)}
        return negcache_fn.step_(state, tower(questions), batch, tower, **given_options)

    compiled = torch.compile(forward, fullgraph=True, backend=counter)
    results: list[tuple[TensorDictBase, list[float]]] = []
    for function in (forward, compiled):
        tower, losses, state = Tower(seed=2), [], example()
        optimizer = torch.optim.SGD(tower.parameters(), lr=0.05)
        for n in range(4):
            out = function(state, documents(3, 100 + n), documents(5, n), tower)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(out.loss.detach()))
        results.append((state, losses))
    torch._dynamo.reset()
    assert counter.frame_count == 1
    (eager, expected), (other, losses) = results
    assert losses == pytest.approx(expected, rel=1e-5)
    for key, value in eager.items(True, True):
        if key == ("items", "embedding"):
            assert int((other[key].int() - value.int()).abs().max()) <= 1
        elif key == SCALE_KEY:
            assert is_close(other[key], value, 1e-4, 0.0)
        else:
            assert torch.equal(other[key], value), key


def encoder(batch: Any) -> Tensor:
    return Tower(seed=5)(batch).detach()


def test_every_way_to_move_a_cache_keeps_both_columns(tmp_path: Path) -> None:
    state = example()
    for moved in (
        state.clone(),
        negcache_fn.resize(negcache_fn.resize(state, 150), 90),
        negcache_fn.offload_features(state),
        negcache_fn.memory_mapped(state, tmp_path / "mapped"),
        nn.Cache(state).half().state,
    ):
        assert_same_state(moved, state)
    smaller = negcache_fn.resize(state, 20)
    assert torch.equal(decoded(smaller), decoded(state)[:20])
    empty = negcache_fn.reset(state)
    assert not bool(empty[SCALE_KEY].any()) and not bool(empty["items", "embedding"].any())
    renewed = negcache_fn.reembed(state, encoder)
    alive = state["items", "embedded_at"] >= 0
    error = (decoded(renewed) - encoder(state["items", "features"]).double()).abs().amax(1)[alive]
    assert 0 < float((error / renewed[SCALE_KEY][alive]).max()) < 0.51
    assert torch.equal(decoded(renewed)[~alive], decoded(state)[~alive])


def test_round_trips_through_checkpoints(tmp_path: Path) -> None:
    state, path = example(capacity=1024), tmp_path / "state.pt"
    torch.save(state, path)
    assert_same_state(torch.load(path, weights_only=False), state)
    distributed.save_checkpoint(tmp_path / "folder", 3, {"cache": distributed.checkpointable(state)})
    other = negcache_fn.reset(state)
    distributed.load_checkpoint(tmp_path / "folder", {"cache": distributed.checkpointable(other)})
    assert_same_state(other, state)
    module = nn.Cache(negcache_fn.reset(state))
    module.load_state_dict(nn.Cache(state).state_dict())
    assert_same_state(module.state, state)
    floats = nn.Cache(example(storage=torch.float32, capacity=1024))
    with pytest.raises(RuntimeError, match=r"Missing key.*embedding_scale"):
        module.load_state_dict(floats.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*embedding_scale"):
        floats.load_state_dict(module.state_dict())
    assert_same_state(module.state, state)


def test_states_of_another_structure_are_named() -> None:
    def changed(**columns: Tensor | None) -> TensorDictBase:
        state = example(capacity=9).clone().unlock_()
        for name, column in columns.items():
            state["items"].pop(name)
            if column is not None:
                state["items"].set(name, column)
        return state

    with pytest.raises(
        ValueError, match=r"keys \['embedded_at', 'embedding', 'features', .* expected .*embedding_scale"
    ):
        negcache_fn.validate(changed(embedding_scale=None))
    with pytest.raises(
        ValueError, match=r"keys .*'embedding_scale'.*expected \['embedded_at', 'embedding', 'features'"
    ):
        negcache_fn.validate(changed(embedding=torch.zeros(9, 6)))
    with pytest.raises(TypeError, match=r"embedding_scale'\] has dtype torch\.float64; expected torch\.float32"):
        negcache_fn.validate(changed(embedding_scale=torch.ones(9, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"embedding_scale'] has shape \(9, 1\)"):
        negcache_fn.validate(changed(embedding_scale=torch.ones(9, 1)))
    for wrong in (math.nan, math.inf, -1.0):
        scales = torch.ones(9)
        scales[2] = wrong
        with pytest.raises(
            ValueError, match=r"embedding_scale'] is .* at slot 2; expected a finite number of 0 or more"
        ):
            negcache_fn.validate(changed(embedding_scale=scales))
    scales = torch.ones(9)
    scales[8] = math.nan  # an empty slot
    negcache_fn.validate(changed(embedding_scale=scales))


def test_merged_draws_may_come_from_other_storages() -> None:
    queries, states = unit(3, 6, 1), [example(storage=storage) for storage in (torch.int8, torch.float32)]
    states[1] = states[1].clone().unlock_()
    states[1]["seed"] = torch.tensor(11)
    draws = [negcache_fn.sample_gumbel(state, queries, num_draws=20) for state in states]
    merged = negcache_fn.merge_draws(*draws)
    assert set(merged.source.flatten().tolist()) == {0, 1}
    rows = [decoded(states[0]), states[1]["items", "embedding"].double()]
    for source, slot, row in zip(merged.source[0].tolist(), merged.slot[0].tolist(), merged.embedding[0], strict=True):
        assert torch.equal(rows[source][slot], row.double())
