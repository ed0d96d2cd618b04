"""The modules where others move, cast and load them: dtypes that lose numbers, the meta device, Trainers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import negcache_fn
from negcache_fn.nn import Cache, NegativeCacheLoss, Scale
from tests.support.builders import assert_same_state, same_snapshot, snapshot, unit


def filled(dtype: torch.dtype = torch.float32, rows: int = 5, **options: Any) -> NegativeCacheLoss:
    state = negcache_fn.init_cache(8, 4, torch.zeros(1, 3), embedding_dtype=dtype)
    return NegativeCacheLoss(negcache_fn.update(state, unit(rows, 3, 0), unit(rows, 4, 1)), **options)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_a_learnable_scale_stays_wide(cast: torch.dtype) -> None:
    """200 steps of 1e-3 move it as far as in float32; bfloat16 would not move at all."""
    reached = []
    for module in (Scale(20.0, learnable=True), nn.Sequential(Scale(20.0, learnable=True)).to(cast)[0]):
        (parameter,) = module.parameters()
        assert parameter.dtype == torch.float32
        optimizer = torch.optim.SGD([parameter], lr=1e-3)
        for _ in range(200):
            module().log().backward()  # a gradient of 1 in the logarithm
            optimizer.step()
            optimizer.zero_grad()
        reached.append(float(module().detach()))
    assert reached[0] == reached[1] == pytest.approx(20.0 * math.exp(-0.2), rel=1e-4)


def test_a_learnable_scale_under_another_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        scale = Scale(20.0, learnable=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(scale().detach()) == pytest.approx(20.0)
    assert scale.double()().dtype == torch.float64
    assert scale.to("meta")().device.type == "meta"


@pytest.mark.parametrize(("scale", "bound"), [(100.0, 100.0), (20.0, 20.0), (99.9, 100.0)])
def test_a_learnable_scale_is_bounded(scale: float, bound: float) -> None:
    """It stays at the bound to within a step, and comes back from it at once."""
    module = Scale(scale, learnable=True, max_scale=bound)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for sign in (-1, 1):
        for _ in range(5):
            (sign * module().log()).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert float(module().detach()) <= bound * (1 + 1e-6)
        if sign < 0:
            assert float(module().detach()) == pytest.approx(bound, rel=0.011)
    assert float(module().detach()) < bound * 0.97


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"scale": 200.0, "learnable": True}, ValueError, "scale is 200.0; expected at most max_scale, which is 100.0"),
        ({"scale": 2.0, "max_scale": 0.0}, ValueError, "max_scale is 0.0; expected a number above 0"),
        ({"scale": 2.0, "max_scale": "x"}, TypeError, "max_scale is 'x', a str; expected a number above 0"),
        ({"scale": 2.0, "learnable": 1}, TypeError, "learnable is 1; expected True or False"),
    ],
)
def test_scale_says_what_does_not_fit(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Scale(**arguments)
    assert Scale(200.0)() == 200.0  # a number is what it is


def test_trainers_leave_the_scale_out_of_weight_decay() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(3, 4), "loss": filled(learnable_scale=True)})
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)  # pyright: ignore[reportArgumentType]
    assert decayed == ["encoder.weight"]


@pytest.mark.parametrize("way", ["half", "load", "assign"])
def test_no_embedding_becomes_infinite(way: str) -> None:
    """1e6 is infinite in float16: an error before anything is written. In an empty slot it is no matter."""
    wide = filled()
    wide.state["items", "embedding"][3, 1] = 1e6
    narrow = filled(torch.float16)
    before = snapshot(wide.state, narrow.state)
    says = r"embedding.* at slot 3 is not finite in torch.float16; expected embeddings that fit"
    if way == "half":
        with pytest.raises(ValueError, match=says):
            wide.half()
        assert wide.bfloat16().state["items", "embedding"].isfinite().all()
        return
    if way == "assign":
        narrow.load_state_dict(wide.state_dict(), assign=True)
        assert_same_state(narrow.state, wide.state)
        return
    with pytest.raises(RuntimeError, match=says):
        narrow.load_state_dict(wide.state_dict())
    assert same_snapshot(before, snapshot(wide.state, narrow.state))
    wide.state["items", "embedding"][3, 1] = 1.0
    wide.state["items", "embedding"][7, 1] = 1e6  # empty
    narrow.load_state_dict(wide.state_dict())
    negcache_fn.validate(narrow.state)
    negcache_fn.validate(wide.half().state)


def test_loading_into_a_module_on_the_meta_device() -> None:
    criterion = filled(learnable_scale=True)
    other = filled(learnable_scale=True).to("meta")
    assert copy.deepcopy(other).state.device is None
    with (
        pytest.warns(UserWarning, match="which is a no-op"),
        pytest.raises(RuntimeError, match="is on the meta device and takes no values: load with assign=True"),
    ):
        other.load_state_dict(criterion.state_dict())
    with pytest.raises(ValueError, match="the cache is on the meta device and has no values to move"):
        other.to_empty(device="cpu")
    other.load_state_dict(criterion.state_dict(), assign=True)
    assert_same_state(other.state, criterion.state)
    assert other.state.is_locked
    other(unit(2, 4, 3), unit(2, 3, 3), nn.Linear(3, 4)).backward()


def test_a_cache_is_loaded_as_a_whole() -> None:
    criterion, other = filled(), filled(rows=2)
    before = snapshot(other.state)
    partial = {name: value for name, value in criterion.state_dict().items() if "embedded_at" not in name}
    for assign in (False, True):
        other.load_state_dict(partial, strict=False, assign=assign)
        assert same_snapshot(before, snapshot(other.state))


def test_to_empty_keeps_what_there_is() -> None:
    criterion = filled()
    before = snapshot(criterion.state)
    criterion.to_empty(device="cpu")
    assert same_snapshot(before, snapshot(criterion.state))


class Config(transformers.PretrainedConfig):
    model_type = "tiny"
    with_loss = True


class Model(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.encoder = nn.Linear(3, 4)
        if config.with_loss:
            self.criterion = filled()
        self.post_init()

    def forward(self, rows: Tensor) -> Tensor:
        return self.criterion(self.encoder(rows), rows, self.encoder)


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_from_pretrained_is_refused_by_name(tmp_path: Path) -> None:
    """It makes the model on the meta device, and knows of parameters and buffers alone. Afterwards, all is well."""
    model = Model(Config(with_loss=True))
    model(unit(2, 3, 5)).backward()
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(
        ValueError, match=r"state would be .* meta device, as under from_pretrained.*; expected a cache"
    ):
        Model.from_pretrained(tmp_path / "whole")
    loaded = Model.from_pretrained(tmp_path / "whole", with_loss=False)
    loaded.criterion = NegativeCacheLoss(negcache_fn.init_cache(8, 4, torch.zeros(1, 3)))
    assert torch.equal(loaded.encoder.weight, model.encoder.weight)
    loaded(unit(2, 3, 5)).backward()
    for state in (filled().state, filled().to("meta").state):
        with torch.device("meta"), pytest.raises(ValueError, match=r"state would be .* meta device"):
            Cache(state)


def test_a_group_is_checked_where_it_is_written(group_of_one: dist.ProcessGroup) -> None:
    assert NegativeCacheLoss(filled().state, group=group_of_one).group is group_of_one
    with pytest.raises(TypeError, match=r"group is a int; expected a torch\.distributed process group"):
        NegativeCacheLoss(filled().state, group=3)  # type: ignore[arg-type]
