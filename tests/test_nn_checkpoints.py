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


class Tower(torch.nn.Module):
    """A model that holds its loss, as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(3, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.criterion = NegativeCacheLoss(negcache_fn.init_cache(8, 4, torch.zeros(1, 3)))

    def train_on(self, seed: int) -> None:
        torch.manual_seed(seed)
        documents = torch.randn(3, 3)
        loss = self.criterion(self.encoder(documents), documents, self.encoder, ids=torch.arange(3) + 10 * seed)
        loss.backward()
        with torch.no_grad():
            for parameter in self.encoder.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


def average_floats(average: torch.Tensor, value: torch.Tensor) -> None:
    if average.is_floating_point():
        average.mul_(0.9).add_(value * 0.1)


def average_floats_and_copy_others(average: torch.Tensor, value: torch.Tensor) -> None:
    average_floats(average, value)
    if not average.is_floating_point():
        average.copy_(value)


def average_all(average: torch.Tensor, value: torch.Tensor) -> None:
    average.copy_(0.9 * average + 0.1 * value)  # integers are truncated, without an error


@pytest.mark.parametrize("update", [average_floats, average_floats_and_copy_others, average_all])
def test_an_average_in_place_leaves_the_cache_of_a_copy_alone(update: Any) -> None:
    """The weights of the copy are averaged, its cache is whole, and the copy trains on as another copy would."""
    model = Tower()
    for seed in (1, 2):
        model.train_on(seed)
    average, untouched = copy.deepcopy(model), copy.deepcopy(model)
    before, weight = snapshot(average.criterion.state), model.encoder.weight.detach().clone()
    for seed in (3, 4):
        model.train_on(seed)
        of_average, of_model = average.state_dict(), model.state_dict()
        assert of_average.keys() == of_model.keys()
        for mine, value in zip(of_average.values(), of_model.values(), strict=True):
            update(mine, value)
    assert not torch.equal(average.encoder.weight, weight)
    assert not same_snapshot(snapshot(model.criterion.state), before)
    assert same_snapshot(snapshot(average.criterion.state), before)
    negcache_fn.validate(average.criterion.state)
    untouched.encoder.load_state_dict(average.encoder.state_dict())
    for one in (average, untouched):
        one.train_on(9)
    assert same_snapshot(snapshot(average.criterion.state), snapshot(untouched.criterion.state))
    saved = average.state_dict()  # of what the copy holds now, as that of any module
    assert torch.equal(saved["criterion.cache.items/embedding"], average.criterion.state["items", "embedding"])
    restored = Tower()
    restored.load_state_dict(saved)
    assert same_snapshot(snapshot(restored.criterion.state), snapshot(average.criterion.state))


def test_a_loop_that_averages_integers_in_place_is_stopped_by_torch() -> None:
    model = Tower()
    average = copy.deepcopy(model)
    before = snapshot(average.criterion.state)
    pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    with pytest.raises(RuntimeError, match="can't be cast"):
        _ = [mine.mul_(0.9).add_(value * 0.1) for mine, value in pairs]
    assert same_snapshot(snapshot(average.criterion.state), before)


def test_a_copy_of_a_copy_is_one() -> None:
    average = copy.deepcopy(copy.deepcopy(criterion(1.0)))
    before = snapshot(average.state)
    average.state_dict()["cache.items/id"].add_(1)
    assert same_snapshot(snapshot(average.state), before)
    original = criterion(1.0)
    original.state_dict()["cache.items/id"].add_(1)  # shares memory, as that of buffers
    assert original.state["items", "id"][:2].tolist() == [6, 8]


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("rule", [None, get_ema_multi_avg_fn(0.9)])
def test_torchs_averages_of_a_model_that_holds_its_loss(use_buffers: bool, rule: Any) -> None:
    model = Tower()
    model.train_on(1)
    average = AveragedModel(model, multi_avg_fn=rule, use_buffers=use_buffers)
    before = snapshot(average.module.criterion.state)
    for seed in (2, 3):
        model.train_on(seed)
        average.update_parameters(model)
    assert same_snapshot(snapshot(average.module.criterion.state), before)
    average.module.train_on(4)
    negcache_fn.validate(average.module.criterion.state)
    restored = AveragedModel(Tower(), multi_avg_fn=rule, use_buffers=use_buffers)
    restored.load_state_dict(average.state_dict())
    assert same_snapshot(snapshot(restored.module.criterion.state), snapshot(average.module.criterion.state))


def trained_towers() -> tuple[Tower, Tower]:
    """At two times of one run."""
    early = Tower()
    early.train_on(1)
    late = copy.deepcopy(early)
    late.train_on(2)
    return early, late


@pytest.mark.parametrize("update", [average_floats, average_floats_and_copy_others, average_all])
def test_an_average_of_dictionaries_is_refused(update: Any) -> None:
    """Even where ids stay integers: only the fingerprint, an average itself, shows it."""
    early, late = trained_towers()
    average = {name: value.clone() for name, value in early.state_dict().items()}
    for name, value in late.state_dict().items():
        update(average[name], value)
    before = snapshot(late.criterion.state)
    with pytest.raises(RuntimeError, match=r"criterion.cache.items is an average of several caches; expected one"):
        late.load_state_dict(average)
    assert same_snapshot(snapshot(late.criterion.state), before)


def test_a_dictionary_of_one_cache_may_be_cast_and_averaged_with_itself() -> None:
    early, late = trained_towers()
    saved = late.state_dict()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in saved.items()}
        early.load_state_dict(cast)
        assert torch.equal(early.criterion.state["items", "id"], late.criterion.state["items", "id"])
    early.load_state_dict(
        {
            key: value.mul(0.9).add(value * 0.1).to(value.dtype) if value.is_floating_point() else value
            for key, value in saved.items()
        }
    )
    without = {key: value for key, value in saved.items() if "fingerprint" not in key}
    with pytest.raises(RuntimeError, match="fingerprint"):
        early.load_state_dict(without)
