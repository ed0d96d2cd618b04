"""Every int64 but -1 is an id: half of all 64-bit hashes are negative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import negcache_fn
from negcache_fn._cache.ids import among
from tests.support.builders import unit

LEAST, MOST = -(2**63), 2**63 - 1
IDS = [LEAST, LEAST + 1, -(2**32), -2, 0, 1, MOST]


def filled(ids: list[int]) -> negcache_fn.StepOutput | Tensor:
    state = negcache_fn.init_cache(16, 4, torch.zeros(1, 1))
    rows = torch.arange(len(ids), dtype=torch.float32)[:, None]
    return negcache_fn.update(state, rows, unit(len(ids), 4, 0), ids=torch.tensor(ids))


@pytest.mark.parametrize("known", [0, 1, 16, 17, 300])
def test_ids_among_others(known: int) -> None:
    """Few are compared one by one, and many are searched for; -1 is among nothing."""
    generator = torch.Generator().manual_seed(known)
    some = torch.tensor([*IDS, -1, *range(40, 160)])
    ids, others = (some[torch.randint(0, len(some), size, generator=generator)] for size in ((50,), (4, known)))
    found = among(ids, others)
    assert found.tolist() == [[one != -1 and one in row for one in ids.tolist()] for row in others.tolist()]
    assert bool(found.any()) == (known > 1)


def test_a_document_seen_again_replaces_its_entry() -> None:
    state = filled(IDS)
    order = torch.arange(len(IDS) - 1, -1, -1)
    again = torch.tensor(IDS)[order]
    state = negcache_fn.update(state, 100.0 + order[:, None], unit(len(IDS), 4, 1), ids=again)
    assert state["items", "id"].tolist() == IDS + [-1] * 9
    assert state["items", "features"][:7, 0].tolist() == [100.0 + n for n in range(7)]
    negcache_fn.validate(state)
    # -1 names nothing: both come in.
    state = negcache_fn.update(state, torch.ones(2, 1), unit(2, 4, 2), ids=torch.tensor([-1, -1]))
    assert int((state["items", "embedded_at"] >= 0).sum()) == 9
    negcache_fn.validate(state)


def test_two_rows_of_one_id() -> None:
    """The last one counts, and in the batch the first alone is a class."""
    state = filled([-7, 3, -7])
    assert state["items", "id"][:3].tolist() == [3, -7, -1]
    assert float(state["items", "features"][1]) == 2.0
    state["items", "id"][0] = -7
    with pytest.raises(ValueError, match="'id'] is -7 at slot 1; expected an id that no other live slot has"):
        negcache_fn.validate(state)


@pytest.mark.parametrize("document", range(len(IDS)))
def test_is_excluded(document: int) -> None:
    """From draws for the batch and for each query, mining, the exact loss, and a step."""
    state, queries, name = filled(IDS), unit(2, 4, 3), IDS[document]
    slot = state["items", "id"].tolist().index(name)
    for exclude in (torch.tensor([name]), torch.tensor([[name], [name]])):
        for number in ({"num_draws": 7}, {"draws_per_query": 40}):
            drawn = negcache_fn.sample_gumbel(state, queries, exclude_ids=exclude, **number).slot
            assert sorted(set(drawn.flatten().tolist()) - {-1}) == [n for n in range(7) if n != slot]
        found = negcache_fn.top_negatives(state, queries, 7, exclude_ids=exclude)[1]
        assert slot not in found
    ids = torch.tensor([name, -1])
    exact = negcache_fn.exact_loss(state, queries, unit(2, 4, 4), ids=ids, reduction="none")
    scores = negcache_fn.score(state, queries)
    scores[:, slot] = -torch.inf
    batch = queries @ unit(2, 4, 4).T
    expected = torch.cat([batch, scores], 1).logsumexp(1) - batch.diagonal()
    torch.testing.assert_close(exact, expected)
    out = negcache_fn.step(state, queries, torch.ones(2, 1), torch.nn.Linear(1, 4), ids=ids)
    assert slot not in out.draw.slot


def test_mined_ids_may_be_negative() -> None:
    scores, ids = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[-5, -1, LEAST, 7]])
    assert negcache_fn.hard_negatives(scores, ids).tolist() == [[-5, LEAST, 7]]
    assert negcache_fn.hard_negatives(scores, ids, positives=torch.tensor([[-5]])).tolist() == [[LEAST, 7, -1]]


def test_negative_ids_are_counted() -> None:
    frequency = negcache_fn.observe(negcache_fn.init_frequency(500), torch.tensor([-5, -1, -1]))
    frequency = negcache_fn.observe(frequency, torch.tensor([-5, -1, LEAST]))
    found = negcache_fn.log_frequency(frequency, torch.tensor([-5, LEAST, -1])).exp()
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 1.0]))
