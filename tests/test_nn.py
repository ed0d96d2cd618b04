"""The step as a module: equal to the function, and a good module."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import negcache_fn
from negcache_fn.nn import NegativeCacheLoss, Scale
from tests.support.options import step_keywords
from tests.support.processes import run_ranks

DIM, WIDTH = 4, 3
Features = dict[str, Tensor]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, DIM)

    def forward(self, features: Features) -> Tensor:
        return self.linear(features["text"]) + features["tokens"].sum(1, keepdim=True)


def documents(seed: int, rows: int = 2) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return {
        "text": torch.randn(rows, WIDTH, generator=generator),
        "tokens": torch.randint(3, (rows, 2), generator=generator),
    }


def queries(seed: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(1000 + seed))


def empty(capacity: int = 8, **options: Any) -> TensorDictBase:
    return negcache_fn.init_cache(capacity, DIM, documents(0), **options)


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder()


def filled(**options: Any) -> NegativeCacheLoss:
    criterion, encode = (
        NegativeCacheLoss(empty(), **step_keywords(draws_per_query=2, **options)),
        encoder(),
    )
    for seed in range(3):
        criterion(queries(seed), documents(seed), encode)
    return criterion


def same(one: TensorDictBase, other: TensorDictBase) -> bool:
    return bool((one == other).all())


def test_is_the_step() -> None:
    options: dict[str, Any] = {
        "draws_per_query": 3,
        "staleness_correction": "none",
        "evict": "fifo",
        "refresh_stalest": 1,
    }
    criterion, state, encode = NegativeCacheLoss(empty(), scale=3.0, **step_keywords(**options)), empty(), encoder()
    for seed in range(5):
        ids, mask = torch.tensor([seed, seed + 1]), torch.tensor([True, seed % 2 == 0])
        found = criterion(queries(seed), documents(seed), encode, ids=ids, cacheable=mask, log_weights=torch.ones(2))
        expected = negcache_fn.step(
            state,
            queries(seed),
            documents(seed),
            encode,
            scale=3.0,
            ids=ids,
            cacheable=mask,
            log_weights=torch.ones(2),
            **step_keywords(**options),
        )
        state = expected.state
        assert torch.equal(found, expected.loss)
        assert same(criterion.state, state)
        assert criterion.metrics.keys() == expected.metrics.keys()


def test_learnable_scale() -> None:
    criterion = filled(learnable_scale=True, scale=5.0)
    scale = torch.tensor(5.0, requires_grad=True)
    out = negcache_fn.step(
        criterion.state,
        queries(9),
        documents(9),
        encoder(),
        scale=scale,
        options=negcache_fn.StepOptions(draws_per_query=2),
    )
    criterion(queries(9), documents(9), encoder()).backward()
    out.loss.backward()
    (logarithm,) = criterion.parameters()
    assert logarithm.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(logarithm.grad, scale.grad * 5)
    assert filled().scale == 20.0
    assert list(filled().parameters()) == []


def test_evaluation_writes_nothing() -> None:
    criterion = filled()
    before = criterion.state.clone()
    with torch.no_grad():
        criterion(queries(9), documents(9), encoder())
    assert same(criterion.state, before)
    criterion.eval()(queries(9), documents(9), encoder())  # the mode is that of dropout, and says nothing of gradients
    assert not same(criterion.state, before)


def test_state_dict_carries_the_cache(tmp_path: Path) -> None:
    criterion, other = filled(learnable_scale=True), NegativeCacheLoss(empty(), learnable_scale=True, scale=1.0)
    torch.save(criterion.state_dict(), tmp_path / "criterion.pt")
    other.load_state_dict(torch.load(tmp_path / "criterion.pt", weights_only=True))
    assert same(criterion.state, other.state)
    assert float(other.scaling().detach()) == float(criterion.scaling().detach())  # type: ignore[union-attr]
    names = {"embedding", "features/text", "features/tokens", "id", "embedded_at", "log_weight", "inserted_at"}
    expected = {*(f"cache.items/{name}" for name in names), "cache.step", "cache.seed", "cache.fingerprint"}
    expected.add("scaling.log_scale_bias")
    assert set(criterion.state_dict()) == expected
    assert other.state.is_locked


def test_state_dict_inside_of_a_model() -> None:
    model, other = (nn.ModuleDict({"encoder": encoder(), "loss": filled()}) for _ in range(2))
    other["loss"].state = empty()
    other.load_state_dict(model.state_dict())
    assert same(model["loss"].state, other["loss"].state)
    other["loss"].state = empty()
    set_model_state_dict(other, {name: value.clone() for name, value in get_model_state_dict(model).items()})
    assert same(model["loss"].state, other["loss"].state)


def test_state_dict_that_does_not_fit() -> None:
    criterion, other = filled(), NegativeCacheLoss(empty(6))
    before = other.state.clone()
    with pytest.raises(RuntimeError, match=r"cache.items/embedding has shape \(8, 4\); expected \(6, 4\)"):
        other.load_state_dict(criterion.state_dict())
    assert same(other.state, before)
    partial = {name: value for name, value in criterion.state_dict().items() if "embedded_at" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*cache.items/embedded_at"):
        NegativeCacheLoss(empty()).load_state_dict(partial)
    unknown = {**criterion.state_dict(), "cache.items/other": torch.zeros(8)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*cache.items/other"):
        NegativeCacheLoss(empty()).load_state_dict(unknown)


def test_casts_leave_numbers_alone() -> None:
    criterion = filled(learnable_scale=True)
    before = criterion.state.clone()
    items = criterion.half().state["items"]
    assert items["embedding"].dtype == torch.float16
    assert torch.equal(items["embedding"], before["items", "embedding"].half())
    for name in ("id", "embedded_at", "log_weight", "inserted_at", "features"):
        assert bool((items[name] == before["items", name]).all())
    assert items["features", "text"].dtype == torch.float32
    assert criterion.state.is_locked
    criterion(queries(9).half(), documents(9), lambda rows: encoder()(rows).half())
    criterion.double()
    assert criterion.state["items", "embedding"].dtype == torch.float64


def test_moves_as_a_whole() -> None:
    criterion = filled(learnable_scale=True).to("meta")
    assert {leaf.device.type for leaf in criterion.state.values(True, True)} == {"meta"}
    assert criterion.state.is_locked
    # Features that are elsewhere stay there.
    elsewhere = NegativeCacheLoss(negcache_fn.offload_features(empty(), device="meta"))
    assert elsewhere.double().state["items", "features", "text"].device.type == "meta"
    assert elsewhere.state["items", "embedding"].device.type == "cpu"


def _copies(criterion: NegativeCacheLoss) -> dict[str, NegativeCacheLoss]:
    saved = io.BytesIO()
    torch.save(criterion, saved)
    saved.seek(0)
    return {
        "deepcopy": copy.deepcopy(criterion),
        "pickle": pickle.loads(pickle.dumps(criterion)),
        "torch.load": torch.load(saved, weights_only=False),
        "average": AveragedModel(criterion).module,
    }


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "torch.load", "average"])
def test_copies_are_independent_and_go_on_alike(kind: str) -> None:
    criterion = filled(learnable_scale=True)
    other = _copies(criterion)[kind]
    assert other.state.is_locked
    assert same(criterion.state, other.state)
    loss = other(queries(9), documents(9), encoder())
    assert not same(criterion.state, other.state)
    assert torch.equal(criterion(queries(9), documents(9), encoder()), loss)
    assert same(criterion.state, other.state)


def test_copies_share_the_group(group_of_one: dist.ProcessGroup) -> None:
    criterion = NegativeCacheLoss(empty(1024), group=group_of_one)
    other = copy.deepcopy(criterion)
    assert other.group is group_of_one
    assert other.state["items", "id"].data_ptr() != criterion.state["items", "id"].data_ptr()


def test_state_can_be_assigned() -> None:
    criterion = filled()
    criterion.state = negcache_fn.resize(criterion.state, 16)
    criterion(queries(9), documents(9), encoder())
    assert "capacity=16, embedding_dim=4, draws_per_query=2" in repr(criterion)
    with pytest.raises(TypeError, match="state is a dict; expected a TensorDict"):
        criterion.state = {}  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.no_cover
def test_compiles_whole() -> None:
    criterion, plain, encode = filled(learnable_scale=True), filled(learnable_scale=True), encoder()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    for seed in range(10, 14):
        found, expected = (module(queries(seed), documents(seed), encode) for module in (compiled, plain))
        torch.testing.assert_close(found, expected)
        assert same(criterion.state, plain.state)
        assert torch.equal(criterion.metrics["occupancy"], plain.metrics["occupancy"])
    assert counter.frame_count == 1


def test_says_what_does_not_fit() -> None:
    with pytest.raises(TypeError, match=r"options is a dict; expected negcache_fn\.StepOptions"):
        NegativeCacheLoss(empty(), options={"draws_per_query": 3})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state is a dict; expected a TensorDict"):
        NegativeCacheLoss({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scale is 'x', a str; expected a number above 0"):
        Scale("x")  # type: ignore[arg-type]
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"scale is {scale}; expected a number above 0"):
            Scale(scale)


def data_parallel(rank: int, world: int) -> dict[str, Any]:
    """A model that owns its loss, wrapped: a cache for each rank, then one that is shared."""
    found: dict[str, Any] = {}
    for name in ("separate", "shared"):
        group = dist.group.WORLD if name == "shared" else None
        state = empty(1024, seed=rank if group is None else 0)
        torch.manual_seed(0)
        model = Model(NegativeCacheLoss(state, learnable_scale=True, group=group))
        wrapped = DistributedDataParallel(model)
        for seed in range(3):
            loss = wrapped(queries(10 * seed + rank), documents(10 * seed + rank))
            loss.backward()
        criterion = model.criterion
        found[name] = {
            "ids": criterion.state["items", "embedding"].clone(),
            "gradient": [p.grad for p in model.parameters()],
        }
    return found


class Model(nn.Module):
    def __init__(self, criterion: NegativeCacheLoss) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.criterion = criterion

    def forward(self, queries: Tensor, documents: Features) -> Tensor:
        return self.criterion(queries, documents, self.encoder)


def test_caches_are_not_broadcast(tmp_path: Path) -> None:
    results = run_ranks(2, {"wrapped": (data_parallel, {})}, tmp_path)["wrapped"]
    for name in ("separate", "shared"):
        first, second = (result[name] for result in results)
        assert not torch.equal(first["ids"], second["ids"])
        for one, other in zip(first["gradient"], second["gradient"], strict=True):
            assert torch.equal(one, other)
