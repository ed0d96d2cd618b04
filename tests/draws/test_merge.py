"""Several caches as one softmax: what was drawn comes from the right one and goes back to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDictBase
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import negcache_fn
from negcache_fn import distributed
from tests.support.builders import assert_same_state, is_close, make_state, same_snapshot, snapshot, unit
from tests.support.checks import draws
from tests.support.processes import run_ranks


def cache(capacity: int, seed: int, first: int, live: Tensor | None = None) -> TensorDictBase:
    """Documents `first ...`, whose number is their feature and their id."""
    names = torch.arange(first, first + capacity)
    features = {"name": names.clone(), "nested": {"twice": 2.0 * names[:, None]}}
    return make_state(unit(capacity, 4, seed), live=live, ids=names, features=features, seed=seed, step=3)


def merged(states: list[TensorDictBase], queries: Tensor, **options: Any) -> negcache_fn.Draw:
    """The draw of the union."""
    draw = negcache_fn.sample_gumbel(states[0], queries, **options)
    for state in states[1:]:
        draw = negcache_fn.merge_draws(draw, negcache_fn.sample_gumbel(state, queries, **options))
    return draw


@given(
    capacities=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    samples=st.integers(1, 3),
    emptied=st.integers(0, 4),
    step=st.integers(0, 99),
)
def test_features_and_refreshes_are_those_of_the_source(
    capacities: list[int], samples: int, emptied: int, step: int
) -> None:
    """Caches of different sizes, one perhaps empty: every document comes from, and goes back to, its own."""
    states = [
        cache(size, n + step, 100 * n, torch.zeros(size, dtype=torch.bool) if n == emptied else None)
        for n, size in enumerate(capacities)
    ]
    draw = merged(states, unit(5, 4, 99), draws_per_query=samples, scale=2.0)
    taken = negcache_fn.take_drawn(states, draw)
    slots, sources = draw.slot.flatten().tolist(), draw.source.flatten().tolist()
    for row, (slot, source) in enumerate(zip(slots, sources, strict=True)):
        if slot >= 0:
            assert int(taken["name"][row]) == 100 * source + slot
            assert float(taken["nested", "twice"][row]) == 2.0 * (100 * source + slot)
    embeddings = unit(len(slots), 4, 5)
    given_back = negcache_fn.split_refresh(draw, embeddings)
    assert len(given_back) == len(states)
    for source, (of_source, fresh) in enumerate(given_back):
        expected = [slot if mine == source else -1 for slot, mine in zip(slots, sources, strict=True)]
        assert of_source.tolist() == expected
        assert torch.equal(fresh, embeddings)


def test_refresh_goes_to_the_right_cache() -> None:
    """After an update of each, exactly the drawn slots have the fresh embedding, each in its own cache."""
    states = [cache(9, 1, 0), cache(40, 2, 100), cache(5, 3, 200)]
    draw = merged(states, unit(6, 4, 9), draws_per_query=2, scale=2.0)
    fresh = unit(12, 4, 7)
    nothing = torch.zeros(1, dtype=torch.bool)
    for source, (state, refresh) in enumerate(zip(states, negcache_fn.split_refresh(draw, fresh), strict=True)):
        example = {"name": torch.zeros(1).long(), "nested": {"twice": torch.zeros(1, 1)}}
        after = negcache_fn.update(state, example, unit(1, 4, 0), cacheable=nothing, refresh=refresh)
        expected = state["items", "embedding"].clone()
        for row, (slot, mine) in enumerate(zip(draw.slot.flatten(), draw.source.flatten(), strict=True)):
            if int(mine) == source:
                expected[slot] = fresh[row]
        assert torch.equal(after["items", "embedding"], expected)
        changed = (after["items", "embedding"] != state["items", "embedding"]).any(1)
        assert torch.equal(after["items", "embedded_at"] == 3, changed)
        assert int(after["step"]) == 4


def test_caches_for_some_queries_only() -> None:
    """With a limit of -inf a query has the exact softmax over the caches that are left to it."""
    states = [cache(60, 1, 0), cache(40, 2, 100)]
    queries, mine = unit(2, 4, 9), torch.tensor([0, 1])
    shut = [torch.where(mine == n, torch.inf, -torch.inf) for n in range(2)]
    parts = [
        negcache_fn.sample_gumbel(
            state, queries, draws_per_query=50, scale=2.0, false_negatives=negcache_fn.FalseNegatives(max_score=limit)
        )
        for state, limit in zip(states, shut, strict=True)
    ]
    draw = negcache_fn.merge_draws(*parts)
    assert torch.equal(draw.source, mine[:, None].expand(-1, 50))
    for row, state in enumerate(states):
        exact = draws.exact_scores(state, queries[row : row + 1], scale=2.0).logsumexp(1)
        assert is_close(draw.log_normalizer[row : row + 1], exact, 1e-5)
    # Nor do draws of others count for a query that may not use their cache.
    negatives = draw.embedding.flatten(0, 1)
    documents = unit(2, 4, 8)
    loss = negcache_fn.loss(queries, documents, negatives, draw, scale=2.0, reduction="none")
    for row, part in enumerate(parts):
        alone = part._replace(**{name: getattr(part, name)[row : row + 1] for name in part._fields[:-1]})
        own = negcache_fn.loss(
            queries[row : row + 1],
            torch.cat([documents[row : row + 1], documents[1 - row : 2 - row]]),
            alone.embedding.flatten(0, 1),
            alone,
            scale=2.0,
            reduction="none",
        )
        assert is_close(loss[row : row + 1], own, 1e-5)


def two_caches(rank: int, world: int, *, alone: bool = False) -> dict[str, Any]:
    """A step over two caches, sharded or not."""
    group = None if alone else dist.group.WORLD
    states = [cache(3072, 1, 0), cache(4096, 2, 10_000)]
    if group is not None:
        states = [distributed.shard(state, group) for state in states]
    queries = unit(8, 4, 9).view(world, -1, 4)[rank]
    draw = merged(states, queries, draws_per_query=2, scale=3.0, group=group)
    taken = negcache_fn.take_drawn(states, draw, group=group)
    fresh = torch.sin(taken["name"][:, None] * torch.arange(1.0, 5.0))
    example = {"name": taken["name"][:1], "nested": {"twice": taken["nested", "twice"][:1]}}
    after = [
        negcache_fn.update(
            state, example, fresh[:1], cacheable=torch.zeros(1, dtype=torch.bool), refresh=refresh, group=group
        )
        for state, refresh in zip(states, negcache_fn.split_refresh(draw, fresh), strict=True)
    ]
    if group is not None:
        after = [distributed.unshard(state, group) for state in after]
    return {"name": taken["name"], "states": after}


def test_sharded_caches_are_whole_ones(tmp_path: Path) -> None:
    """The same documents and the same states on two ranks."""
    expected = two_caches(0, 1, alone=True)
    found = run_ranks(2, {"two": (two_caches, {})}, tmp_path)["two"]
    assert torch.equal(torch.cat([of_rank["name"] for of_rank in found]), expected["name"])
    for of_rank in found:
        for state, right in zip(of_rank["states"], expected["states"], strict=True):
            assert_same_state(state, right)


@pytest.mark.no_cover
def test_compiles_whole() -> None:
    """Drawing from two caches, taking and refreshing: one graph, equal to eager."""
    states, queries = [cache(70, 1, 0), cache(200, 2, 1000)], unit(3, 4, 9)

    def whole(first: TensorDictBase, second: TensorDictBase) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        draw = merged([first, second], queries, scale=2.0, draws_per_query=2)
        taken = negcache_fn.take_drawn([first, second], draw)
        return taken["name"], negcache_fn.split_refresh(draw, draw.embedding.flatten(0, 1))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole, fullgraph=True, backend=counter)
    for _ in range(3):
        name, given_back = compiled(*states)
    expected, right = whole(*states)
    assert counter.frame_count == 1
    assert torch.equal(name, expected)
    for (slots, fresh), (wanted, same) in zip(given_back, right, strict=True):
        assert torch.equal(slots, wanted)
        assert torch.equal(fresh, same)


def test_wrong_arguments_are_named() -> None:
    """Another number of caches, other features, other embeddings; nothing is changed."""
    states = [cache(9, 1, 0), cache(7, 2, 100)]
    draw = merged(states, unit(3, 4, 9), draws_per_query=4)
    before = snapshot(states, draw)
    with pytest.raises(ValueError, match="states has 1 caches; expected 2"):
        negcache_fn.take_drawn(states[:1], draw)
    other = make_state(unit(7, 4, 0), features={"name": torch.zeros(7)})
    with pytest.raises(ValueError, match=r"states\[1\] has features .*expected those of states\[0\]"):
        negcache_fn.take_drawn([states[0], other], draw)
    with pytest.raises(ValueError, match=r"embeddings has shape \(2, 4\); expected \[12, 4\]"):
        negcache_fn.split_refresh(draw, unit(2, 4, 0))
    with pytest.raises(TypeError, match="draw is a tuple; expected a Draw"):
        negcache_fn.take_drawn(states, (1, 2))  # pyright: ignore[reportArgumentType]
    assert same_snapshot(before, snapshot(states, draw))


@pytest.mark.parametrize("number", [{"draws_per_query": 2}, {"num_draws": 3}])
def test_equal_noise_is_refused(number: dict[str, int]) -> None:
    """Caches of the default seed at the same step: everything would come from one of them."""
    queries = unit(4, 4, 9)
    first, second, third = (
        negcache_fn.sample_gumbel(cache(40, seed, 100 * n), queries, **number) for n, seed in enumerate((1, 1, 2))
    )
    says = r"b has the noise of seed 1 at step 3, as a has, .*; expected caches of different seeds"
    with pytest.raises(ValueError, match=says):
        negcache_fn.merge_draws(first, second)
    with pytest.raises(ValueError, match=says):
        negcache_fn.merge_draws(negcache_fn.merge_draws(first, third), second)
    assert negcache_fn.merge_draws(first, third).noise.tolist() == [[1, 3], [2, 3]]


@pytest.mark.no_cover
def test_equal_noise_is_refused_in_a_graph() -> None:
    states, queries = [cache(40, 1, 0), cache(40, 1, 100)], unit(4, 4, 9)
    compiled = torch.compile(merged, fullgraph=True, backend="eager")
    compiled([states[0], cache(40, 2, 100)], queries)
    with pytest.raises(ValueError, match="b has the noise of seed 1 at step 3"):
        compiled(states, queries)


@pytest.mark.parametrize("number", [{"draws_per_query": 2}, {"num_draws": 3}])
def test_other_exclusions_are_refused(number: dict[str, int]) -> None:
    """One side's would count for both."""
    queries = unit(2, 4, 9)
    excluded = torch.tensor([[3, -1], [5, 6]])
    first = negcache_fn.sample_gumbel(cache(40, 1, 0), queries, exclude_ids=excluded, **number)
    second, third = (
        negcache_fn.sample_gumbel(cache(40, 2, 100), queries, exclude_ids=ids, **number)
        for ids in (excluded.flip(0), excluded)
    )
    with pytest.raises(ValueError, match="b has other excluded ids than a; expected the same exclusions"):
        negcache_fn.merge_draws(first, second)
    negcache_fn.merge_draws(first, third)
    of_all = [
        negcache_fn.sample_gumbel(cache(40, seed, 100 * seed), queries, exclude_ids=ids, **number)
        for seed, ids in ((1, torch.tensor([101])), (2, torch.tensor([201])))
    ]
    negcache_fn.merge_draws(*of_all)  # none of them is drawn


@pytest.mark.parametrize("number", [{"draws_per_query": 2}, {"num_draws": 3}])
def test_labels_merge(number: dict[str, int]) -> None:
    """Those of the documents with the documents; the queries' must be the same."""
    queries, cached = unit(2, 4, 9), torch.arange(40) % 3
    first, second, third = (
        negcache_fn.sample_gumbel(
            cache(40, seed, 100 * seed),
            queries,
            false_negatives=negcache_fn.FalseNegatives(labels=negcache_fn.Labels(torch.tensor(of), cached=cached)),
            **number,
        )
        for seed, of in ((1, [0, 2]), (2, [0, 2]), (3, [2, 0]))
    )
    merged = negcache_fn.merge_draws(first, second)
    assert torch.equal(merged.label, cached[merged.slot])
    assert torch.equal(merged.exclude_labels, torch.tensor([[0], [2]]))
    with pytest.raises(ValueError, match="b has other excluded labels than a; expected the same exclusions"):
        negcache_fn.merge_draws(first, third)
    plain = negcache_fn.sample_gumbel(cache(40, 4, 400), queries, **number)
    with pytest.raises(ValueError, match="b was drawn without labels; expected them as for a"):
        negcache_fn.merge_draws(first, plain)
    with pytest.raises(ValueError, match="b was drawn with labels; expected them as for a"):
        negcache_fn.merge_draws(plain, first)
