"""What needs memory for every slot is done a segment at a time; how long a segment is must not show."""

import pytest
import torch

import negcache_fn
from negcache_fn._cache import select

CAPACITY, DIM = 9000, 16


@pytest.mark.parametrize("slots", [4096, 8192])
def test_segments_do_not_show(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    state = negcache_fn.init_cache(CAPACITY, DIM, torch.zeros(1, 2), seed=3)
    for _ in range(17):  # some slots stay empty, ages differ
        features = torch.randn(500, 2, generator=generator)
        ids = torch.randperm(20_000, generator=generator)[:500]
        embeddings = torch.randn(500, DIM, generator=generator)
        state = negcache_fn.update(state, features, embeddings, ids=ids, log_weights=torch.full((500,), -0.5))
    queries = torch.randn(40, DIM, generator=generator)
    held = state["items", "id"]
    excluded = held[torch.randint(0, 4000, (40, 3), generator=generator)]

    def observe() -> list[torch.Tensor]:
        own = negcache_fn.sample_gumbel(state, queries, draws_per_query=3, exclude_ids=excluded)
        common = negcache_fn.sample_gumbel(state, queries, draws_per_query=3, exclude_ids=excluded.flatten())
        batch = (torch.ones(500, 2), torch.ones(500, DIM))
        updated = negcache_fn.update(state, *batch, ids=held[2000:4500:5], evict="fifo")
        leaves = [updated["items", name] for name in ("embedding", "id", "inserted_at")]
        return [*own[:3], *common[:3], negcache_fn.stalest(state, 4600), *leaves]

    in_one = observe()
    normalizers = [
        negcache_fn.sample_gumbel(state, queries, exclude_ids=ids).log_normalizer for ids in (excluded, None)
    ]
    monkeypatch.setattr(select, "_SEGMENT", slots)
    for whole, parts in zip(in_one, observe(), strict=True):
        assert torch.equal(whole, parts)
    for ids, expected in zip((excluded, None), normalizers, strict=True):
        torch.testing.assert_close(negcache_fn.sample_gumbel(state, queries, exclude_ids=ids).log_normalizer, expected)
