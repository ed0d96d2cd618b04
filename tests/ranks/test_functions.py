"""The functions a step is made of, called one by one: sharded and single give the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import negcache_fn
from negcache_fn import distributed
from negcache_fn._ranks.group import ranks_of
from tests.ranks.test_equivalence import assert_same
from tests.support.processes import run_ranks
from tests.support.sharded_training import CAPACITY, DIM, features, train, whole_cache

BATCH = 12
SCALE = 2.0


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    vectors = torch.randn(3, BATCH, DIM, generator=generator, dtype=torch.float64)
    return {"queries": vectors[0], "documents": vectors[1], "ids": torch.arange(BATCH) * 500}


def together(rank: int, world: int, *, alone: bool = False) -> dict[str, Any]:
    """Everything of this rank's part of the batch; of the whole batch if alone."""
    state = whole_cache(torch.float64)
    group = None if alone else dist.group.WORLD
    options: dict[str, Any] = {"scale": SCALE, "group": group}
    in_batch: Any = True
    if group is not None:
        state, in_batch = distributed.shard(state, group), "global"
    part = {name: values.view(world, -1, *values.shape[1:])[rank] for name, values in inputs().items()}
    queries, documents = part["queries"].requires_grad_(), part["documents"].requires_grad_()
    ids = part["ids"]
    scores, slots = negcache_fn.top_negatives(state, queries, 70, exclude_ids=ids, **options)
    most, most_slots = negcache_fn.top_negatives(state, queries, CAPACITY - 3, **options)
    draw = negcache_fn.sample_gumbel(state, queries, draws_per_query=3, exclude_ids=ids, **options)
    own = negcache_fn.sample_gumbel(state, queries, draws_per_query=3, exclude_ids=ids[:, None], top_k=9, **options)
    limit = torch.linspace(-1.0, 4.0, BATCH, dtype=torch.float64).view(world, -1)[rank]
    known = negcache_fn.FalseNegatives(ids[:, None] + torch.tensor([1, 7]), limit)
    options["false_negatives"] = known
    limited = negcache_fn.sample_gumbel(state, queries, draws_per_query=3, exclude_ids=ids, **options)
    below, below_slots = negcache_fn.top_negatives(state, queries, 70, exclude_ids=ids[:, None], **options)
    del options["false_negatives"]
    taken = negcache_fn.take(state, draw.slot, group=group)
    fresh = (draw.embedding.flatten(0, 1) * 1.1).requires_grad_()
    loss = negcache_fn.loss(queries, documents, fresh, draw, in_batch=in_batch, ids=ids, **options)
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    del options["scale"]
    exact = negcache_fn.exact_loss(state, queries, documents, scale=scale, in_batch=in_batch, ids=ids, **options)
    hard = negcache_fn.exact_loss(state, queries, documents, scale=scale, in_batch=False, ids=ids, top_k=50, **options)
    margin = negcache_fn.FalseNegatives(known.ids, lambda positive: positive + 1.0)
    options["false_negatives"] = margin
    masked = negcache_fn.exact_loss(state, queries, documents, scale=scale, in_batch=in_batch, ids=ids, **options)
    gradients = torch.autograd.grad(loss + exact + 2 * hard + 3 * masked, [queries, documents, fresh, scale])
    updated = negcache_fn.update(
        state,
        features(ids, torch.float64),
        documents,
        ids=ids,
        refresh=(draw.slot[:, 0], documents * 0.5),
        evict="fifo",
        group=group,
    )
    whole = updated if group is None else distributed.unshard(updated, group)
    counts, edges = negcache_fn.age_histogram(state, bins=7, group=group)
    return {
        "ages": torch.stack([counts, edges[1:]]),
        "rows": {
            "scores": scores,
            "slots": slots,
            "most": most,
            "most_slots": most_slots,
            "draw": draw.slot,
            "own": own.slot,
            "limited": limited.slot,
            "limited_normalizer": limited.log_normalizer,
            "below": below,
            "below_slots": below_slots,
            "normalizer": draw.log_normalizer,
            "cutoff": own.cutoff,
            "embedding": draw.embedding,
            "id": draw.id,
            "tokens": taken["text"]["tokens"],
            "kept": taken["kept"],
        },
        "gradients": [gradient / world for gradient in gradients],
        "losses": torch.stack([loss, exact, hard, masked]).detach(),
        "state": whole,
    }


def test_a_group_of_one_is_nothing_special(group_of_one: dist.ProcessGroup) -> None:
    found, expected = together(0, 1), together(0, 1, alone=True)
    for name, value in expected["rows"].items():
        torch.testing.assert_close(found["rows"][name], value, rtol=1e-12, atol=1e-12)
    for gradient, wanted in zip(found["gradients"], expected["gradients"], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
    assert bool((found["state"] == expected["state"]).all())
    with pytest.raises(ValueError, match="top_k is 0"):
        negcache_fn.sample_gumbel(expected["state"], inputs()["queries"], top_k=0, group=group_of_one)
    small = negcache_fn.init_cache(100, DIM, torch.zeros(1, 3), embedding_dtype=torch.float64)
    with pytest.raises(ValueError, match="the shards of the ranks have"):
        negcache_fn.sample_gumbel(small, inputs()["queries"], group=group_of_one)


@pytest.mark.parametrize(
    "options", [{"in_batch": "global", "refresh_stalest": 2}, {"share_draws": False, "draws_per_query": 2}], ids=str
)
def test_a_step_in_a_group_of_one(group_of_one: dist.ProcessGroup, options: dict[str, Any]) -> None:
    for placement in ("sharded", "replicated"):
        found = train(0, 1, steps=2, dtype=torch.float64, wrap="none", placement=placement, **options)
        expected = train(0, 1, steps=2, dtype=torch.float64, alone=True, **options)
        assert_same("one", found, expected)


def test_parts_of_a_step(tmp_path: Path) -> None:
    expected = together(0, 1, alone=True)
    for world in (2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        of_ranks = run_ranks(world, {"together": (together, {})}, folder)["together"]
        for name, value in expected["rows"].items():
            found = torch.cat([of_rank["rows"][name] for of_rank in of_ranks])
            torch.testing.assert_close(
                found, value, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert all(torch.equal(of_rank["ages"], expected["ages"]) for of_rank in of_ranks)
        losses = torch.stack([of_rank["losses"] for of_rank in of_ranks]).mean(0)
        torch.testing.assert_close(losses, expected["losses"], rtol=1e-12, atol=1e-12)
        for number, gradient in enumerate(expected["gradients"][:3]):
            found = torch.cat([of_rank["gradients"][number] for of_rank in of_ranks])
            torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)
        of_scale = torch.stack([of_rank["gradients"][3] for of_rank in of_ranks]).sum()
        torch.testing.assert_close(of_scale, expected["gradients"][3], rtol=1e-12, atol=1e-12)
        for of_rank in of_ranks:
            for key, value in expected["state"].items(include_nested=True, leaves_only=True):
                assert torch.equal(of_rank["state"][key], value), key


def gradient_of_gathered(rank: int, world: int) -> torch.Tensor:
    values = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.full((2 * world,), 1.0 if rank == 0 else 2.0**-8, dtype=torch.bfloat16)
    (ranks_of(dist.group.WORLD).gather(values) * weights).sum().backward()
    assert values.grad is not None
    return values.grad


def test_gradients_of_half_precision_are_added_in_float32(tmp_path: Path) -> None:
    """Added one after the other in bfloat16, the small ones of two ranks would be lost."""
    for found in run_ranks(3, {"gathered": (gradient_of_gathered, {})}, tmp_path)["gathered"]:
        assert found.tolist() == [1 + 2.0**-7] * 2


def ages(rank: int, world: int) -> list[Tensor]:
    state = whole_cache(torch.float64).clone()
    state["step"].fill_(50)
    group = dist.group.WORLD
    assert group is not None
    own = distributed.local_capacity(CAPACITY, group)
    of_first = own if rank == 0 else CAPACITY - own
    state["items", "embedded_at"].copy_(torch.where(torch.arange(CAPACITY) < of_first, 49, 10))
    part = distributed.shard(state, group)
    return [*negcache_fn.age_histogram(part, bins=4, group=group), *negcache_fn.age_histogram(state, bins=4)]


def test_bins_reach_the_oldest_document_of_any_rank(tmp_path: Path) -> None:
    for counts, edges, expected, expected_edges in run_ranks(2, {"ages": (ages, {})}, tmp_path)["ages"]:
        assert torch.equal(counts, expected)
        assert torch.equal(edges, expected_edges)
        assert (counts > 0).tolist() == [True, False, False, True]
