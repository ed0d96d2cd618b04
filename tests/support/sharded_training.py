"""A training run whose result must not depend on the number of ranks."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import negcache_fn
from negcache_fn import distributed
from tests.support.options import step_keywords

CAPACITY = 7 * 1024  # 7 groups: parts of 4 and 3, of 3, 3 and 1, of 2, 2, 2 and 1
DIM, WIDTH = 8, 5
BATCH, EXTRAS = 12, 12  # of all ranks
DOCUMENTS = 9000


class Record(NamedTuple):
    losses: list[float]  # of all ranks
    slots: list[Tensor]  # [batch, k] or [1, M]
    gradients: dict[str, Tensor]  # of the last step
    metrics: dict[str, Tensor]  # of the last step
    state: TensorDictBase
    graphs: int  # compiled


def whole_cache(dtype: torch.dtype, seed: int = 3, storage: torch.dtype | None = None) -> TensorDictBase:
    """Almost full, so that the run fills it and then evicts; embeddings are stored in `dtype` by default."""
    generator = torch.Generator().manual_seed(seed)
    state = negcache_fn.init_cache(
        CAPACITY, DIM, features(torch.zeros(1, dtype=torch.int64), dtype), embedding_dtype=storage or dtype
    )
    for start in range(0, CAPACITY - 128, 1408):
        rows = torch.arange(start, min(start + 1408, CAPACITY - 128))
        embeddings = torch.randn(rows.shape[0], DIM, generator=generator, dtype=torch.float64).to(dtype)
        state = negcache_fn.update_(state, features(rows, dtype), embeddings, ids=rows)
    return state


def features(ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Of documents, from their number."""
    column = torch.arange(WIDTH)
    values = torch.sin(ids[:, None] * 0.37 + column * (1 + ids[:, None] % 7)).to(dtype)
    return {"text": {"values": values, "tokens": ids[:, None] * 10 + column}, "kept": ids % 2 == 0}


class Tower(torch.nn.Module):
    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(
            torch.randn(WIDTH, DIM, generator=generator, dtype=torch.float64).to(dtype) / 2
        )

    def forward(self, documents: Any) -> Tensor:
        values = documents["text"]["values"] @ self.weight
        return values + (documents["text"]["tokens"][:, :1] % 3) * documents["kept"][:, None] * 0.1


def train(
    rank: int,
    world: int,
    *,
    steps: int,
    dtype: torch.dtype,
    alone: bool = False,
    backend: str | None = None,
    wrap: Literal["ddp", "fsdp", "none"] = "ddp",
    placement: str = "sharded",
    start: TensorDictBase | None = None,
    storage: torch.dtype | None = None,
    **options: Any,
) -> Record:
    """Trains on this rank's part of every batch; `alone` is the run that all others must equal; `backend` compiles."""
    group = None if alone else dist.group.WORLD
    options = dict(options)
    with_ids, with_weights = options.pop("with_ids", True), options.pop("with_weights", False)
    margin, several = options.pop("margin", None), options.pop("positives", 0)
    labelled = options.pop("labels", False)
    if alone and options.get("in_batch") == "global":
        options["in_batch"] = True
    state = whole_cache(dtype, storage=storage) if start is None else start
    if options.pop("empty", False):
        state = negcache_fn.reset(state)
    if group is not None:
        state = distributed.shard(state, group) if placement == "sharded" else state.clone().lock_()
        options |= {"group": group, "placement": placement}
    queries_tower, documents_tower = Tower(dtype, 1), Tower(dtype, 2)
    scale = torch.nn.Parameter(torch.tensor(3.0, dtype=dtype))
    towers = [queries_tower, documents_tower]
    if group is not None and wrap == "ddp":
        towers = [DistributedDataParallel(tower) for tower in towers]
    elif group is not None and wrap == "fsdp":
        towers = [fully_shard(tower) for tower in towers]
    optimizer = torch.optim.SGD([*towers[0].parameters(), *towers[1].parameters(), scale], lr=0.05)
    counter = CompileCounterWithBackend(backend or "eager")
    step = torch.compile(negcache_fn.step_, fullgraph=True, backend=counter) if backend else negcache_fn.step_
    generator = torch.Generator().manual_seed(11)
    losses: list[float] = []
    slots: list[Tensor] = []
    for _ in range(steps):
        ids = torch.randint(0, DOCUMENTS, (BATCH + EXTRAS,), generator=generator)
        ids[1] = ids[0]  # two queries with one positive
        asked = torch.randint(0, DOCUMENTS, (BATCH,), generator=generator)
        weights = torch.randn(BATCH + EXTRAS, generator=generator)
        mask = torch.rand(BATCH + EXTRAS, generator=generator) < 0.9
        own = torch.cat([_part(torch.arange(BATCH), rank, world), BATCH + _part(torch.arange(EXTRAS), rank, world)])
        queries = towers[0](features(_part(asked, rank, world), dtype))
        positives = torch.randint(-1, DOCUMENTS, (BATCH, 3), generator=generator)
        if margin is not None:
            options["false_negatives"] = negcache_fn.FalseNegatives(
                _part(positives, rank, world), lambda positive: positive + margin
            )
        if labelled:
            cached = state["items", "features", "text", "tokens"][:, 0] // 10 % 7 - 1
            options["false_negatives"] = negcache_fn.FalseNegatives(
                None if not several else _part(positives, rank, world),
                labels=negcache_fn.Labels(ids[own][: BATCH // world] % 7 - 1, ids[own] % 7 - 1, cached),
            )
        facts = {"positive_rows": _positives(several, rank, world)} if several else {}
        out = step(
            state,
            queries,
            features(ids[own], dtype),
            towers[1],
            scale=scale,
            **facts,
            ids=ids[own] if with_ids else None,
            log_weights=weights[own].to(dtype) if with_weights else None,
            cacheable=mask[own],
            **step_keywords(**options),
        )
        optimizer.zero_grad()
        value = out.loss * (world / BATCH) if options.get("reduction") == "sum" else out.loss
        value.backward()
        loss = value.detach()
        drawn = out.draw.slot
        if group is not None:
            unwrapped = [queries_tower.weight, documents_tower.weight] if wrap == "none" else []
            distributed.average_gradients([scale, *unwrapped], group)
            dist.all_reduce(loss)
            loss /= world
            drawn = _gathered(drawn, world, dim=1 if out.draw.for_batch else 0)
        optimizer.step()
        losses.append(float(loss))
        slots.append(drawn)
    whole = state
    if group is not None and placement == "sharded":
        whole = distributed.unshard(state, group)
    gradients = {"queries": queries_tower.weight.grad, "documents": documents_tower.weight.grad, "scale": scale.grad}
    full = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    return Record(losses, slots, full, out.metrics, whole, counter.frame_count)


def _positives(count: int, rank: int, world: int) -> Tensor:
    """[B, P] its own document or an extra one of its rank, both or, of every third query, none; as rows of the rank."""
    rows = torch.arange(BATCH // world)
    own = torch.stack([rows + BATCH // world, rows], dim=1)[:, :count]
    number = _part(torch.arange(BATCH), rank, world)[:, None]
    return torch.where((number % 3 == 1) | (number % 5 + torch.arange(count) == 4), -1, own)


def _part(values: Tensor, rank: int, world: int) -> Tensor:
    return values.view(world, -1, *values.shape[1:])[rank]


def _gathered(values: Tensor, world: int, dim: int) -> Tensor:
    gathered = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(gathered, values.contiguous())
    return torch.cat(gathered, dim)
