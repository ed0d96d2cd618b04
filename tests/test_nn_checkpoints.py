"""What enters a module's cache by a cast or a state dict is finite and of its kind, or the cache is as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import negcache_fn
from negcache_fn.nn import NegativeCacheLoss
from tests.support.builders import same_snapshot, snapshot


def criterion(value: float, dtype: torch.dtype = torch.float32) -> NegativeCacheLoss:
    """Two live slots of eight, one of which has this number."""
    state = negcache_fn.init_cache(8, 4, torch.zeros(1, 3), embedding_dtype=dtype)
    embeddings = torch.ones(2, 4, dtype=dtype)
    embeddings[1, 2] = value
    return NegativeCacheLoss(negcache_fn.update(state, torch.ones(2, 3), embeddings, ids=torch.tensor([5, 7])))


@pytest.mark.parametrize("cast", [torch.nn.Module.half, lambda module: module.to(torch.float16)])
def test_a_cast_does_not_make_numbers_infinite(cast: Any) -> None:
    module = criterion(1e6)
    before = snapshot(module.state)
    with pytest.raises(ValueError, match=r"embedding.* at slot 1 is not finite in torch.float16; expected"):
        cast(module)
    assert same_snapshot(snapshot(module.state), before)
    assert cast(criterion(1e3)).state["items", "embedding"][1, 2] == 1000
    assert cast(NegativeCacheLoss(negcache_fn.reset(module.state))).state["items", "embedding"].dtype == torch.float16


def test_a_state_dict_is_finite_in_this_dtype() -> None:
    module = criterion(2.0, torch.float16)
    before = snapshot(module.state)
    nan = criterion(1.0).state_dict()
    nan["cache.items/embedding"][0, 0] = float("nan")
    for given, slot in ((criterion(1e6).state_dict(), 1), (nan, 0)):
        with pytest.raises(RuntimeError, match=f"items/embedding at slot {slot} is not finite in torch.float16"):
            module.load_state_dict(given)
        assert same_snapshot(snapshot(module.state), before)
    fitting = criterion(1e3).state_dict()
    fitting["cache.items/embedding"][5, 0] = 1e6  # of an empty slot
    module.load_state_dict(fitting)
    assert module.state["items", "embedding"][1, 2] == 1000


def test_averaged_numbers_are_refused() -> None:
    """A loop that averages all of `state_dict()` makes floats of ids."""
    module = criterion(1.0)
    before = snapshot(module.state)
    average = {name: 0.9 * value + 0.1 * value for name, value in module.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"cache.items/id has dtype torch.float32; expected torch.int64: a cache is not"
    ):
        module.load_state_dict(average)
    assert same_snapshot(snapshot(module.state), before)


def test_torchs_averages_leave_the_cache_alone() -> None:
    module = criterion(1.0)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    before = snapshot(average.module.state)
    other = copy.deepcopy(module)
    other.load_state_dict(criterion(3.0).state_dict())
    average.update_parameters(other)
    assert same_snapshot(snapshot(average.module.state), before)
