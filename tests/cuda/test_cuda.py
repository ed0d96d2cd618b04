"""On a GPU: what a CPU computes, without waiting for the device, eager, compiled and as a CUDA graph."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from torch import Tensor

import negcache_fn
from negcache_fn._kernels.triton import call as triton
from tests.support.builders import make_state, unit
from tests.support.checks.steps import Tower, documents
from tests.support.options import step_keywords

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ROWS, TOTAL, CAPACITY, STEPS = 12, 16, 2048, 4

VARIANTS: dict[str, dict[str, Any]] = {
    "shared, ids, stalest": {"draws_per_query": 2, "ids": True, "refresh_stalest": 3},
    "for the batch": {"num_draws": 7, "ids": True, "refresh_stalest": 3},
    "for the batch, top_k": {"num_draws": 9, "top_k": 20, "staleness_correction": "none"},
    "own": {"draws_per_query": 3, "share_draws": False, "staleness_correction": "none", "in_batch": False},
    "top_k": {"draws_per_query": 2, "top_k": 20, "ids": True, "evict": "fifo"},
    "false negatives": {"draws_per_query": 2, "ids": True, "false_negatives": True},
}


def on_gpu(value: Any) -> Any:
    """Nested tensors, moved."""
    if isinstance(value, dict):
        return {key: on_gpu(item) for key, item in value.items()}
    if isinstance(value, negcache_fn.FalseNegatives):
        return value._replace(ids=on_gpu(value.ids))
    return value.cuda() if isinstance(value, Tensor) else value


def facts(variant: dict[str, Any], n: int) -> dict[str, Any]:
    """The variant's keywords, those that change at step n made."""
    made: dict[str, Any] = {
        "ids": torch.arange(TOTAL) * 7 % 23 + 9 * n,
        "false_negatives": negcache_fn.FalseNegatives(torch.arange(2 * ROWS).view(ROWS, 2) + 9 * n - 9),
    }
    return {key: made.get(key, value) for key, value in variant.items()}


def full_cache(tower: Tower, dtype: torch.dtype) -> TensorDictBase:
    state = negcache_fn.init_cache(CAPACITY, 6, documents(1, 0), seed=4, embedding_dtype=dtype)
    batch = documents(CAPACITY - 5, 7)
    with torch.no_grad():
        return negcache_fn.update(state, batch, tower(batch))


def train(device: str, variant: dict[str, Any], dtype: torch.dtype) -> tuple[list[Any], TensorDictBase, list[Tensor]]:
    """A few optimiser steps: what every step returns, the last state, the weights."""
    towers = [Tower(seed=seed).to(dtype) for seed in (1, 2)]
    state = full_cache(towers[1], dtype)
    move: Callable[[Any], Any] = on_gpu if device == "cuda" else lambda value: value
    towers, state = [tower.to(device) for tower in towers], state.to(device)
    weights = [weight for tower in towers for weight in tower.parameters()]
    optimizer, seen = torch.optim.SGD(weights, lr=0.05), []
    for n in range(STEPS):
        keywords = move(step_keywords(**facts(variant, n)))
        batch, questions = move(documents(TOTAL, n)), move(documents(ROWS, 100 + n))
        out = negcache_fn.step(state, towers[0](questions), batch, towers[1], scale=8.0, **keywords)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = out.state
        seen.append((out.loss.detach(), out.draw.slot, out.metrics))
    return seen, state, weights


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_training_is_that_of_a_cpu(name: str, dtype: torch.dtype) -> None:
    """The same draws, losses, metrics, weights and state, step after step; float32 takes the kernel."""
    expected, given = (train(device, VARIANTS[name], dtype) for device in ("cpu", "cuda"))
    # Noise is float32 whatever the dtype, and with it the threshold that weighs the draws for the batch.
    tolerance = 2e-4 if dtype == torch.float32 else 1e-7 if "num_draws" in VARIANTS[name] else 1e-9
    close = {"atol": tolerance, "rtol": tolerance}
    for one, other in zip(given[0], expected[0], strict=True):
        torch.testing.assert_close(one[0].cpu(), other[0], **close)
        assert torch.equal(one[1].cpu(), other[1])
        for key, value in other[2].items():
            torch.testing.assert_close(one[2][key].cpu(), value, check_dtype=False, **close)
    left, right = dict(given[1].items(True, True)), dict(expected[1].items(True, True))
    for key, value in right.items():
        torch.testing.assert_close(left[key].cpu(), value, **close)
    for one, other in zip(given[2], expected[2], strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), **close)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    tower = Tower(seed=2)
    state, tower = full_cache(tower, torch.float32).cuda(), tower.cuda()
    keywords = on_gpu(step_keywords(**facts(VARIANTS[name], 0)))
    batch, questions = on_gpu(documents(TOTAL, 0)), on_gpu(documents(ROWS, 100))

    def once() -> None:
        negcache_fn.step(state, tower(questions), batch, tower, scale=8.0, **keywords).loss.backward()

    once()  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_replay_as_a_cuda_graph() -> None:
    """`step_` captured once: the losses and states of eager steps, because step and seed lie in the state."""
    tower = Tower(seed=2)
    eager, tower = full_cache(tower, torch.float32).cuda(), tower.cuda()
    captured, batches = eager.clone(), [on_gpu(documents(TOTAL, n)) for n in range(STEPS)]
    batch, options = on_gpu(documents(TOTAL, 0)), step_keywords(draws_per_query=2)

    def call(state: TensorDictBase, batch: Any) -> Tensor:
        loss = negcache_fn.step_(state, tower(batch)[:ROWS], batch, tower, scale=8.0, **options).loss
        return loss.detach() + 0 * torch.autograd.grad(loss, tower.table)[0].sum()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(captured, batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = call(captured, batch)
    for key, value in eager.items(True, True):
        captured.get(key).copy_(value)
    for one in batches:
        batch["words"].copy_(one["words"])
        batch["extra"]["price"].copy_(one["extra"]["price"])
        graph.replay()
        torch.testing.assert_close(loss, call(eager, one), atol=1e-4, rtol=1e-4)
        assert torch.equal(captured["items", "embedded_at"], eager["items", "embedded_at"])


def test_a_compiled_step_is_the_eager_one() -> None:
    tower, queries = Tower(seed=2).cuda(), unit(ROWS, 6, 5).cuda().requires_grad_()
    start = full_cache(Tower(seed=2), torch.float32).cuda()
    keywords = on_gpu(step_keywords(**facts(VARIANTS["shared, ids, stalest"], 0)))
    seen = []
    for function in (negcache_fn.step_, torch.compile(negcache_fn.step_, fullgraph=True)):
        state = start.clone()
        for n in range(2):
            out = function(state, queries, on_gpu(documents(TOTAL, n)), tower, scale=8.0, **keywords)
        seen.append((out.loss.detach(), *torch.autograd.grad(out.loss, [queries, tower.table]), out.draw.slot))
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_stay_exact_under_autocast(storage: torch.dtype) -> None:
    state = make_state(unit(3000, 64, seed=0).to(storage)).cuda()
    queries, documents = unit(20, 64, seed=1).cuda().requires_grad_(), unit(20, 64, seed=2).cuda()
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            loss = negcache_fn.exact_loss(state, queries, documents, scale=20.0)
        gradients.append((loss.detach(), *torch.autograd.grad(loss, queries)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    wide = (20.0 * queries.double() @ state["items", "embedding"].double().T).logsumexp(1)
    torch.testing.assert_close(
        negcache_fn.sample_gumbel(state, queries, scale=20.0).log_normalizer.double(), wide, atol=1e-3, rtol=1e-4
    )


def test_draws_have_the_law_of_the_softmax() -> None:
    """Chi-square over 40 documents, 200 steps of 64 queries."""
    state = make_state(unit(40, 8, seed=0)).cuda()
    query = unit(1, 8, seed=1).cuda().expand(64, 8).contiguous()
    probability = (3.0 * query[:1].double() @ state["items", "embedding"].double().T).softmax(1)[0]
    counts = torch.zeros(40, device="cuda", dtype=torch.float64)
    for step in range(200):
        state = state.clone()
        state["step"].fill_(step)
        slots = negcache_fn.sample_gumbel(state, query, scale=3.0, draws_per_query=4).slot.flatten()
        counts += torch.bincount(slots, minlength=40)
    expected = probability * counts.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 73.4  # 39 degrees of freedom, p = .0007


def test_features_may_stay_on_the_cpu() -> None:
    tower = Tower(seed=2)
    whole = full_cache(tower, torch.float32).cuda()
    offloaded, tower = negcache_fn.offload_features(whole), tower.cuda()
    queries, losses = unit(ROWS, 6, 5).cuda(), []
    for state in (whole, offloaded):
        out = negcache_fn.step(state, queries, on_gpu(documents(TOTAL, 1)), tower, scale=8.0)
        losses.append(out.loss.detach())
        assert out.state["items", "features", "words"].device == state["items", "features", "words"].device
    torch.testing.assert_close(losses[0], losses[1])


def test_checkpoints_cross_devices() -> None:
    state, file = full_cache(Tower(), torch.bfloat16).cuda(), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=False)
    queries = unit(5, 6, 1)
    on_cpu = negcache_fn.sample_gumbel(loaded, queries, scale=5.0).slot
    assert torch.equal(negcache_fn.sample_gumbel(state, queries.cuda(), scale=5.0).slot.cpu(), on_cpu)


def test_the_other_functions_run() -> None:
    state, tower = full_cache(Tower(), torch.float32).cuda(), Tower().cuda()
    queries = unit(5, 6, 1).cuda()
    slots = negcache_fn.top_negatives(state, queries, 7, scale=5.0)
    cpu = negcache_fn.top_negatives(state.cpu(), queries.cpu(), 7, scale=5.0)
    for one, other in zip(slots, cpu, strict=True):
        torch.testing.assert_close(one.cpu(), other)
    state = negcache_fn.reembed(state, tower)
    negcache_fn.validate(state)
    assert int(negcache_fn.stalest(state, 5).numel()) == 5
    assert float(negcache_fn.age_histogram(state, bins=6)[0].sum()) > 0
    assert negcache_fn.resize(state, 100)["items"].batch_size == (100,)


@pytest.fixture
def nccl() -> Iterator[dist.ProcessGroup]:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", ["sharded", "replicated"])
def test_one_rank_by_nccl_is_no_group(placement: str, nccl: dist.ProcessGroup) -> None:
    tower, queries = Tower(seed=2).cuda(), unit(ROWS, 6, 5).cuda().requires_grad_()
    start, seen = full_cache(Tower(seed=2), torch.float32).cuda(), []
    for group in (None, nccl):
        options = {} if group is None else {"placement": placement}
        out = negcache_fn.step(
            start, queries, on_gpu(documents(TOTAL, 1)), tower, scale=8.0, group=group, **step_keywords(**options)
        )
        seen.append((out.loss.detach(), *torch.autograd.grad(out.loss, [queries, tower.table]), out.draw.slot))
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_kernel_is_in_use() -> None:
    """Where Triton is, no test here means plain torch."""
    assert triton.kernel() is not None
