"""Features of another float dtype, as mixed precision makes them; and encoders that write into their features."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import negcache_fn
from negcache_fn.nn import NegativeCacheLoss
from tests.support.builders import assert_same_state, same_snapshot, snapshot, unit

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def documents(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"image": unit(rows, 3, seed, dtype), "tokens": torch.full((rows, 2), seed)}


def empty(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return negcache_fn.init_cache(8, 4, documents(1, 0, dtype), **options)


class Encoder(nn.Module):
    """In the dtype of its features; notes what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(unit(3, 4, 7))
        self.seen: list[torch.dtype] = []

    def forward(self, features: Any) -> Tensor:
        self.seen.append(features["image"].dtype)
        return features["image"] @ self.weight.to(features["image"].dtype) + features["tokens"].sum(1, keepdim=True)


@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("slot", FLOATS)
def test_floats_are_cast_to_the_slots(slot: torch.dtype, given: torch.dtype) -> None:
    batch = documents(2, 1, given)
    state = negcache_fn.update(empty(slot), batch, unit(2, 4, 0))
    found = state["items", "features", "image"]
    assert found.dtype == slot
    assert torch.equal(found[:2], batch["image"].to(slot))


@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("options", [{}, {"draws_per_query": 2}, {"refresh_stalest": 2}])
def test_the_encoder_sees_the_dtype_of_the_batch(options: dict[str, Any], given: torch.dtype) -> None:
    encoder, state = Encoder(), negcache_fn.update(empty(), documents(6, 0), unit(6, 4, 0))
    out = negcache_fn.step(
        state, unit(2, 4, 1), documents(2, 1, given), encoder, options=negcache_fn.StepOptions(**options)
    )
    assert set(encoder.seen) == {given}
    assert out.state["items", "features", "image"].dtype == torch.float32
    out.loss.backward()
    negcache_fn.validate(out.state)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": torch.ones(2, 3, dtype=torch.int64), "tokens": torch.ones(2, 2, dtype=torch.int64)},
        {"image": torch.ones(2, 3), "tokens": torch.ones(2, 2)},
        {"image": torch.ones(2, 3), "tokens": torch.ones(2, 2, dtype=torch.int32)},
        {"image": torch.ones(2, 3, dtype=torch.complex64), "tokens": torch.ones(2, 2, dtype=torch.int64)},
    ],
)
def test_nothing_else_is_cast(wrong: dict[str, Tensor]) -> None:
    state = empty()
    before = snapshot(state)
    with pytest.raises(TypeError, match=r"features\['(image|tokens)'\] has dtype .*; expected torch\.(float32|int64)"):
        negcache_fn.update_(state, wrong, unit(2, 4, 0))
    assert same_snapshot(before, snapshot(state))


def test_what_would_become_infinite_never_enters() -> None:
    """Left out and counted, like an embedding that is not finite; infinite as given is the user's own."""
    state = negcache_fn.update(empty(torch.float16), documents(2, 1), unit(2, 4, 0), ids=torch.tensor([10, 11]))
    batch = documents(3, 2)
    batch["image"][0, 1], batch["image"][2, 0] = 1e6, math.inf
    ids = torch.tensor([10, 11, 12])
    found = negcache_fn.update(state, batch, unit(3, 4, 1), ids=ids)
    expected = negcache_fn.update(state, batch, unit(3, 4, 1), ids=ids, cacheable=torch.tensor([False, True, True]))
    assert_same_state(found, expected)
    assert found["items", "id"][:4].tolist() == [10, 11, 12, -1]
    assert found["items", "features", "image"][2, 0] == math.inf
    out = negcache_fn.step(state, unit(2, 4, 1), batch, lambda rows: torch.ones(len(rows["image"]), 4), ids=ids)
    assert int(out.metrics["non_finite"]) == 1
    assert bool(out.state["items", "features", "image"][:2].isfinite().all())


class Writing(Encoder):
    """As sentence-transformers' modules do: puts its results into the dictionary it is given; and writes in place."""

    def forward(self, features: Any) -> Tensor:
        image = features["image"]
        image.sub_(0.5).mul_(3.0)
        features["tokens"] += 1
        features["embeddings"] = image @ self.weight + features["tokens"].sum(1, keepdim=True)
        return features["embeddings"]


class Reading(Encoder):
    """The same, without a trace."""

    def forward(self, features: Any) -> Tensor:
        return ((features["image"] - 0.5) * 3.0) @ self.weight + (features["tokens"] + 1).sum(1, keepdim=True)


WAYS: dict[str, Callable[[Any], Any]] = {
    "step": lambda encode: stepped(encode),
    "step per query": lambda encode: stepped(encode, options=negcache_fn.StepOptions(draws_per_query=2)),
    "refresh": lambda encode: stepped(encode, options=negcache_fn.StepOptions(refresh_stalest=3)),
    "max_score": lambda encode: stepped(
        encode,
        options=negcache_fn.StepOptions(draws_per_query=2),
        false_negatives=negcache_fn.FalseNegatives(max_score=lambda positive: positive + 1.0),
    ),
    "TensorDict": lambda encode: stepped(encode, batch=TensorDict(documents(3, 5), [3])),
    "chunked": lambda encode: stepped(negcache_fn.chunked(encode, 2)),
    "prefill": lambda encode: (negcache_fn.prefill(filled(), [documents(3, 2), documents(2, 3)], encode),),
    "reembed": lambda encode: (negcache_fn.reembed(filled(), encode, batch_size=2),),
}


def filled() -> Any:
    return negcache_fn.update(empty(), documents(6, 4), unit(6, 4, 0))


def stepped(encode: Any, *, batch: Any = None, **keywords: Any) -> tuple[Any, ...]:
    """State and gradient; the batch is as it was."""
    queries, batch = unit(2, 4, 1).requires_grad_(), documents(3, 5) if batch is None else batch
    before = snapshot(batch)
    out = negcache_fn.step(filled(), queries, batch, encode, **keywords)
    gradients = torch.autograd.grad(out.loss, [queries, *encode.parameters()])
    assert same_snapshot(before, snapshot(batch))
    return (out.state, *gradients)


@pytest.mark.parametrize("way", WAYS)
def test_an_encoder_may_write_into_its_features(way: str) -> None:
    found, expected = WAYS[way](Writing()), WAYS[way](Reading())
    torch.testing.assert_close(found[0].to_dict(), expected[0].to_dict())
    for gradient, right in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(gradient, right)


class Half(lightning.LightningModule):
    """A module whose precision Lightning chooses, the cache's example being float32."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.documents = nn.Linear(3, 4), nn.Linear(3, 4)
        with torch.device("cpu"):
            self.criterion = NegativeCacheLoss(
                negcache_fn.init_cache(16, 4, torch.zeros(1, 3, dtype=torch.float32)), learnable_scale=True
            )

    def forward(self, rows: Tensor) -> Tensor:
        return self.criterion(self.queries(rows), rows, self.documents)

    def training_step(self, rows: Tensor, _: int) -> Tensor:
        return self(rows)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(unit(8, 3, 0), batch_size=4)  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("ignore")  # Lightning's own
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_lightning(precision: Any, tmp_path: Path) -> None:
    module = Half()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        precision=precision,
        default_root_dir=tmp_path,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(module)
    state = module.criterion.state
    assert float(negcache_fn.occupancy(state)) == 0.5
    assert state["items", "features"].dtype == torch.float32
    negcache_fn.validate(state)


class Tower(nn.Module):
    """Both towers and the loss, as one forward call for FSDP2."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.documents = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, rows: Tensor, criterion: NegativeCacheLoss) -> Tensor:
        return criterion(self.queries(rows), rows, self.documents)


def test_fully_sharded_with_cast_inputs(group_of_one: dist.ProcessGroup) -> None:
    torch.manual_seed(0)
    model, criterion = Tower(), NegativeCacheLoss(negcache_fn.init_cache(16, 4, torch.zeros(1, 3)))
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for seed in range(2):
        model(unit(4, 3, seed), criterion).backward()
    features = criterion.state["items", "features"]
    assert features.dtype == torch.float32
    assert torch.equal(features[:4], unit(4, 3, 0).bfloat16().float())
    assert all(parameter.grad is not None for parameter in model.parameters())
