"""Draws for the batch from several sharded caches, merged by the ranks: those of one rank that has the whole caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import negcache_fn
from negcache_fn import distributed
from tests.support.builders import assert_same_state, make_state, unit
from tests.support.processes import run_ranks

DIM, BATCH, DRAWS, SCALE = 4, 12, 18, 3.0
CAPACITIES = (3072, 6144, 7168)  # in parts of 1, 2 and 3 groups on three ranks, the last one smaller


def whole_caches(few: bool) -> list[Any]:
    """Documents with their own numbers; or so few that all are drawn."""
    states: list[Any] = []
    for number, capacity in enumerate(CAPACITIES):
        names = torch.arange(capacity) + 10_000 * number
        live = torch.arange(capacity) % 1024 == number if few else None
        embeddings = unit(capacity, DIM, number).double()
        states.append(make_state(embeddings, live=live, ids=names, features=names, seed=number, step=3))
    return states


def together(rank: int, world: int, *, alone: bool = False, few: bool = False, right: bool = False) -> dict[str, Any]:
    """A step over three caches, merged from the left or from the right."""
    group = None if alone else dist.group.WORLD
    states = whole_caches(few)
    if group is not None:
        states = [distributed.shard(state, group) for state in states]
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    queries, documents = (unit(BATCH, DIM, seed).double()[part].requires_grad_() for seed in (9, 8))
    ids = torch.arange(BATCH)[part] * 700
    options: dict[str, Any] = {"scale": SCALE, "group": group}
    draws = [
        negcache_fn.sample_gumbel(
            state, queries, num_draws=DRAWS, importance=torch.ones_like(ids).double(), exclude_ids=ids, **options
        )
        for state in states
    ]
    first, second, third = draws
    if right:
        draw = negcache_fn.merge_draws(first, negcache_fn.merge_draws(second, third, group=group), group=group)
    else:
        draw = negcache_fn.merge_draws(negcache_fn.merge_draws(first, second, group=group), third, group=group)
    names = negcache_fn.take_drawn(states, draw, group=group)
    fresh = torch.sin(names[:, None] * torch.arange(1.0, 5.0)).double().requires_grad_()
    in_batch: Any = True if alone else "global"
    loss = negcache_fn.loss(queries, documents, fresh, draw, in_batch=in_batch, ids=ids, **options)
    gradients = torch.autograd.grad(loss, [queries, documents, fresh])
    nothing = torch.zeros(1, dtype=torch.bool)
    after = [
        negcache_fn.update(state, names[:1], documents[:1], cacheable=nothing, refresh=refresh, group=group)
        for state, refresh in zip(states, negcache_fn.split_refresh(draw, fresh), strict=True)
    ]
    if group is not None:
        after = [distributed.unshard(state, group) for state in after]
    return {
        "drawn": [getattr(draw, name)[0] for name in ("slot", "source", "id", "score", "perturbed")],
        "threshold": draw.threshold,
        "normalizer": draw.log_normalizer.detach(),
        "names": names,
        "loss": loss.detach(),
        "gradients": [gradient / world for gradient in gradients],
        "states": after,
    }


@pytest.mark.parametrize("world", [2, 3])
def test_merged_by_ranks_is_merged_whole(world: int, tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        "left": (together, {}),
        "right": (together, {"right": True}),
        "few": (together, {"few": True}),
    }
    results = run_ranks(world, cases, tmp_path)
    for name, of_ranks in results.items():
        expected = together(0, 1, alone=True, few=name == "few")
        if name == "few":
            assert int((expected["drawn"][0] >= 0).sum()) == sum(CAPACITIES) // 1024 - 1  # one is excluded
        assert len(set(expected["drawn"][1].tolist())) == 3  # sources
        for key in ("drawn", "gradients"):
            for place, wanted in enumerate(expected[key]):
                found = torch.cat([of_rank[key][place] for of_rank in of_ranks])
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        for key in ("normalizer", "names"):
            found = torch.cat([of_rank[key] for of_rank in of_ranks])
            torch.testing.assert_close(found, expected[key], rtol=1e-12, atol=1e-12)
        mean = torch.stack([of_rank["loss"] for of_rank in of_ranks]).mean()
        torch.testing.assert_close(mean, expected["loss"], rtol=1e-12, atol=1e-12)
        for of_rank in of_ranks:
            torch.testing.assert_close(of_rank["threshold"], expected["threshold"], rtol=1e-12, atol=1e-12)
            for state, wanted in zip(of_rank["states"], expected["states"], strict=True):
                assert_same_state(state, wanted)
