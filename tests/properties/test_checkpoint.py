"""A state saves and loads as it is, and a run cut in two is the run in one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

import negcache_fn
from tests.support.builders import assert_same_state, same_bits, unit
from tests.support.checks.steps import Tower, documents, warm
from tests.support.options import step_keywords


def through_torch_save(state: TensorDictBase, folder: Path) -> TensorDictBase:
    """`torch.save` and `torch.load(weights_only=True)` of the state itself."""
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def through_memmap(state: TensorDictBase, folder: Path) -> TensorDictBase:
    """`memmap` to files and back."""
    state.memmap(str(folder / "state"))
    return TensorDict.load_memmap(str(folder / "state"))


def through_state_dict(state: TensorDictBase, folder: Path) -> TensorDictBase:
    """`state_dict`, saved, loaded into a new empty cache."""
    torch.save(state.state_dict(), folder / "dict.pt")
    fresh = negcache_fn.init_cache(len(state["items", "id"]), 6, documents(1, 0))
    fresh.load_state_dict(torch.load(folder / "dict.pt", weights_only=True))
    return fresh


def through_to(state: TensorDictBase, folder: Path) -> TensorDictBase:
    """`.to` and `.clone`."""
    return state.to("cpu").clone().lock_()


WAYS = {
    "torch.save": through_torch_save,
    "memmap": through_memmap,
    "state_dict": through_state_dict,
    "to": through_to,
}


class Run:
    """Two towers, an optimiser, a cache: all there is to a training run."""

    def __init__(self) -> None:
        self.towers = torch.nn.ModuleList([Tower(seed=1), Tower(seed=2)])
        self.optimizer = torch.optim.Adam(self.towers.parameters(), lr=0.01)
        self.state = negcache_fn.init_cache(11, 6, documents(1, 0), seed=8)

    def steps(self, start: int, stop: int) -> list[torch.Tensor]:
        """Trains, and gives the losses."""
        losses = []
        for n in range(start, stop):
            queries, batch = self.towers[0](documents(3, 100 + n)), documents(4, n)
            options: dict[str, Any] = {"ids": torch.arange(4) + n, "draws_per_query": 2, "refresh_stalest": 1}
            out = negcache_fn.step(self.state, queries, batch, self.towers[1], scale=8.0, **step_keywords(**options))
            out.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state = out.state
            losses.append(out.loss.detach())
        return losses


@pytest.mark.parametrize("way", WAYS)
def test_round_trip(way: str, tmp_path: Path) -> None:
    """Same value, same draws, and a further step."""
    tower = Tower()
    state = warm(tower, 9, ids=True)
    back = WAYS[way](state, tmp_path)
    assert_same_state(back, state)
    assert back["items"].batch_size == torch.Size([9])
    options: dict[str, Any] = {"scale": 5.0, "draws_per_query": 3}
    for one, other in zip(
        negcache_fn.sample_gumbel(back, unit(3, 6, 0), **options),
        negcache_fn.sample_gumbel(state, unit(3, 6, 0), **options),
        strict=True,
    ):
        assert same_bits(one, other)
    after = negcache_fn.step(back, unit(3, 6, 0), documents(5, 1), tower).state
    assert_same_state(after, negcache_fn.step(state, unit(3, 6, 0), documents(5, 1), tower).state)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_cut_in_two_is_the_run_in_one(way: str, tmp_path: Path) -> None:
    """Losses, weights and cache, bit for bit, whatever a global generator did in between."""
    whole = Run()
    losses = whole.steps(0, 8)
    first = Run()
    early = first.steps(0, 4)
    torch.save([first.towers.state_dict(), first.optimizer.state_dict()], tmp_path / "towers.pt")
    state = WAYS[way](first.state, tmp_path)
    second = Run()
    weights, moments = torch.load(tmp_path / "towers.pt", weights_only=True)
    second.towers.load_state_dict(weights)
    second.optimizer.load_state_dict(moments)
    second.state = state
    torch.manual_seed(12345)
    late = second.steps(4, 8)
    assert all(same_bits(a, b) for a, b in zip(losses, early + late, strict=True))
    assert_same_state(second.state, whole.state)
    for one, other in zip(second.towers.parameters(), whole.towers.parameters(), strict=True):
        assert same_bits(one, other)


def test_state_of_one_tensor_features_round_trips(tmp_path: Path) -> None:
    """Where features are a plain tensor leaf."""
    state = negcache_fn.init_cache(4, 2, torch.zeros(1, 3, dtype=torch.int64), embedding_dtype=torch.bfloat16)
    state = negcache_fn.update(state, torch.ones(2, 3, dtype=torch.int64), unit(2, 2, 0))
    for way in (through_torch_save, through_memmap):
        assert_same_state(way(state, tmp_path), state)


def test_in_place_steps_on_a_memory_map(tmp_path: Path) -> None:
    """A memory-mapped cache is updated where it lies, or says that it cannot be."""
    tower = Tower()
    mapped = through_memmap(warm(tower, 9), tmp_path)
    expected = negcache_fn.step(mapped, unit(3, 6, 0), documents(5, 1), tower).state
    negcache_fn.step_(mapped, unit(3, 6, 0), documents(5, 1), tower)
    assert_same_state(mapped, expected)
    assert_same_state(TensorDict.load_memmap(str(tmp_path / "state")), expected)
