"""Lightning trains, resumes to the same bits, and keeps every rank's cache."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="the extra lightning is not installed")

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

import negcache_fn
from negcache_fn import distributed
from negcache_fn.integrations import lightning as integration
from negcache_fn.integrations.lightning import NegativeCacheCallback
from negcache_fn.nn import NegativeCacheLoss
from negcache_fn.nn.cache import fingerprint_of
from tests.support.options import step_keywords
from tests.support.processes import run_ranks

pytestmark = [
    # The loaders are as small as the data: no worker processes.
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers:UserWarning"),
    # Lightning 2.6 asks it of the trees of torch 2.13.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    # A resumed run saves where the first one did.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]

WORDS, WIDTH, DIM, BATCH = 60, 5, 16, 16
TRAINING, HELD_OUT = 320, 200
CAPACITY = 3072  # on two ranks parts of 2048 and 1024
Batch = dict[str, Tensor]


class Pairs(Dataset[Batch]):
    """Documents are the words of their query, each under another number and in another order."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.queries = torch.rand(count, WORDS, generator=generator).argsort(1)[:, :WIDTH]
        self.documents = torch.sort((self.queries * 7 + 3) % WORDS).values

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, rows: Any) -> Batch:
        return {"queries": self.queries[rows], "documents": self.documents[rows], "ids": torch.as_tensor(rows)}


class Order(Sampler[list[int]]):
    """This rank's rows of each batch, in an order of each epoch's own."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.epoch = rank, world, 0

    def set_epoch(self, epoch: int) -> None:  # which Lightning calls
        self.epoch = epoch

    def __len__(self) -> int:
        return TRAINING // BATCH

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.of_epoch(self.epoch).tolist()  # of the epoch at the first one, not before

    def of_epoch(self, epoch: int) -> Tensor:
        rows = torch.randperm(TRAINING, generator=torch.Generator().manual_seed(epoch))
        return rows.view(-1, self.world, BATCH // self.world)[:, self.rank]


class Tower(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.EmbeddingBag(WORDS, DIM), nn.Linear(DIM, DIM))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(tokens), dim=-1)


class DualEncoder(LightningModule):
    def __init__(self, *, capacity: int = CAPACITY, seed: int = 0, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query_encoder, self.document_encoder = Tower(), Tower()
        self.capacity, self.seed, self.loss_options = capacity, seed, options

    def configure_model(self) -> None:
        if not hasattr(self, "criterion"):
            example = torch.zeros(1, WIDTH, dtype=torch.int64)
            dtype = self.query_encoder[1].weight.dtype
            state = negcache_fn.init_cache(self.capacity, DIM, example, seed=self.seed, embedding_dtype=dtype)
            options = {"scale": 10.0, "learnable_scale": True, "draws_per_query": 2} | self.loss_options
            self.criterion = NegativeCacheLoss(state, **step_keywords(**options))
            self.loss_options = {}  # a copy of the model cannot have a group

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        queries = self.query_encoder(batch["queries"])
        return self.criterion(queries, batch["documents"], self.document_encoder, ids=batch["ids"])

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(
    model: DualEncoder,
    folder: Path | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    start: Path | None = None,
    **options: Any,
) -> DualEncoder:
    """Trains, with a checkpoint after each epoch where there is a folder for it."""
    callbacks: list[Callback] = options.pop("callbacks", None) or [NegativeCacheCallback()]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
    defaults = {"max_epochs": 2, "log_every_n_steps": 5, "logger": False}
    trainer = Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        devices=world,
        use_distributed_sampler=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        **defaults | options,
    )
    batches = DataLoader(Pairs(TRAINING, 1), batch_size=None, sampler=Order(rank, world))
    held_out = DataLoader(Pairs(HELD_OUT, 2), batch_size=None, sampler=torch.arange(HELD_OUT).split(BATCH))
    trainer.fit(model, batches, held_out, ckpt_path=start, weights_only=None if start is None else True)
    return model


def reciprocal_rank(model: DualEncoder) -> float:
    """Mean over unseen queries, among unseen documents and those of the training."""
    held_out, seen = Pairs(HELD_OUT, 2), Pairs(TRAINING, 1)
    with torch.no_grad():
        documents = model.document_encoder(torch.cat([held_out.documents, seen.documents]))
        scores = model.query_encoder(held_out.queries) @ documents.T
    ranks = (scores >= scores.diagonal()[:, None]).sum(1)
    return float((1 / ranks).mean())


def everything(model: DualEncoder) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], *, atol: float = 0) -> None:
    assert one.keys() == other.keys()
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def test_learns_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Validation, the one before the training as well, leaves the cache alone."""
    model = DualEncoder()
    untrained = reciprocal_rank(model)
    fit(model, tmp_path, max_epochs=6)
    assert untrained < 0.05
    assert reciprocal_rank(model) > 0.3
    assert int(model.criterion.state["step"]) == 6 * TRAINING // BATCH
    assert float(negcache_fn.occupancy(model.criterion.state)) == pytest.approx(TRAINING / CAPACITY)
    resumed = fit(DualEncoder(seed=5), tmp_path, max_epochs=6, start=tmp_path / "epoch=3.ckpt")
    assert_equal(everything(resumed), everything(model))
    assert not resumed._load_state_dict_pre_hooks


def test_metrics_are_logged_every_n_steps(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    model = fit(DualEncoder(capacity=64), logger=logger, max_steps=12, max_epochs=-1)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    assert {f"cache/{name}" for name in model.criterion.metrics} == {name for name in columns if "cache/" in name}
    assert [(int(row["step"]), float(row["cache/occupancy"])) for row in rows] == [(4, 1.0), (9, 1.0)]
    assert all(0 < float(row["cache/drift"]) < 1 for row in rows)


class TwoLosses(DualEncoder):
    """The second is used by every other batch, and by validation."""

    def __init__(self) -> None:
        super().__init__(capacity=64)
        self.logged: list[set[str]] = []

    def configure_model(self) -> None:
        super().configure_model()
        self.other = copy.deepcopy(self.criterion)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if batch_idx % 2 else loss + self.validation_step(batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.other(self.query_encoder(batch["queries"]), batch["documents"], self.document_encoder)

    def log_dict(self, dictionary: Any, *rest: Any, **options: Any) -> None:
        super().log_dict(dictionary, *rest, **options)
        self.logged.append({name for name in dictionary if name.endswith("/drift")})


def test_only_metrics_of_the_batch_are_logged() -> None:
    model = fit(TwoLosses(), max_steps=3, max_epochs=-1, val_check_interval=1, limit_val_batches=1)
    first, second = {"cache/criterion/drift"}, {"cache/other/drift"}
    assert model.logged == [first, second, first, first, second]


def test_gradient_accumulation_writes_every_batch() -> None:
    model = fit(DualEncoder(), max_epochs=1, accumulate_grad_batches=4)
    assert int(model.criterion.state["step"]) == TRAINING // BATCH
    assert float(negcache_fn.occupancy(model.criterion.state)) == pytest.approx(TRAINING / CAPACITY)


@pytest.mark.parametrize(("precision", "cached"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_half_precision(precision: str, cached: torch.dtype) -> None:
    model = fit(DualEncoder(), precision=precision)
    state = model.criterion.state
    assert state["items", "embedding"].dtype == cached
    assert state["items", "log_weight"].dtype == torch.float32
    assert state["items", "features"].dtype == torch.int64
    assert int(state["step"]) == 2 * TRAINING // BATCH
    assert bool(state["items", "embedding"].isfinite().all())
    assert reciprocal_rank(model.float()) > 0.1


def train(rank: int, world: int, folder: Path, *, resume: bool = False, **options: Any) -> dict[str, Tensor]:
    """Two epochs, or the second alone from the checkpoint of the first; what this rank has in the end."""
    strategy: Any = "auto"
    if world > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
        os.environ.update({name: str(value) for name, value in here.items()})
        # Lightning wants an address, and takes the group that is there.
        os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "test"})
        integration._PIECE_BYTES = 10_000  # so that a tensor takes several messages
        strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment())
    callbacks = options.pop("callbacks", None)
    if options.pop("own", False):
        options["seed"] = rank
    elif world > 1:
        options |= {"group": dist.group.WORLD, "in_batch": "global"}
        if options.get("placement") != "replicated":
            options["capacity"] = distributed.local_capacity(CAPACITY, dist.group.WORLD)
    model = DualEncoder(**options).double()  # Lightning loads before it converts
    start = folder / "epoch=0.ckpt" if resume else None
    fit(model, folder, rank=rank, world=world, start=start, strategy=strategy, precision="64-true", callbacks=callbacks)
    return everything(model)


def whole(of_ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of the parts of a cache, and what must be equal on all ranks."""
    joined: dict[str, Tensor] = {}
    for name, value in of_ranks[0].items():
        if "cache.items" in name:
            joined[name] = torch.cat([part[name] for part in of_ranks])
        elif name.endswith("fingerprint"):  # of the slots of a rank
            items = name.removesuffix("fingerprint") + "items/"
            joined[name] = fingerprint_of(joined[f"{items}id"], joined[f"{items}embedded_at"])
        else:
            assert all(torch.equal(part[name], value) for part in of_ranks), name
            joined[name] = value
    return joined


def test_on_two_ranks(tmp_path: Path) -> None:
    """A sharded or replicated cache is that of one process; without a group each rank has its own."""
    alone = train(0, 1, tmp_path / "alone")
    kinds: dict[str, dict[str, Any]] = {"sharded": {}, "replicated": {"placement": "replicated"}, "own": {"own": True}}
    cases: dict[str, Any] = {"from-alone": (train, {"folder": tmp_path / "alone", "resume": True})}
    for kind, options in kinds.items():
        for suffix, resume in (("", False), ("-resumed", True)):
            cases[kind + suffix] = (train, {"folder": tmp_path / kind, "resume": resume, **options})
    cases["uneven"] = (uneven, {"folder": tmp_path / "uneven"})
    (tmp_path / "ranks").mkdir()
    ran: dict[str, list[dict[str, Tensor]]] = run_ranks(2, cases, tmp_path / "ranks", fresh=True)

    assert_equal(whole(ran["sharded"]), alone, atol=1e-9)
    assert_equal(whole(ran["from-alone"]), alone, atol=1e-9)
    for of_rank in ran["replicated"]:
        assert_equal(of_rank, alone, atol=1e-9)
    assert_equal(train(0, 1, tmp_path / "sharded", resume=True), alone, atol=1e-9)
    loaded = DualEncoder.load_from_checkpoint(tmp_path / "sharded" / "epoch=1.ckpt", weights_only=True)
    assert torch.equal(loaded.criterion.state["items", "id"], alone["criterion.cache.items/id"])
    for kind in kinds:
        for uninterrupted, resumed in zip(ran[kind], ran[f"{kind}-resumed"], strict=True):
            assert_equal(resumed, uninterrupted)

    first, second = ran["own"]
    for name, value in first.items():
        if "cache" not in name or name.endswith(("embedding", "features", "id")):
            assert torch.equal(second[name], value) == ("cache" not in name), name
    for rank, of_rank in enumerate(ran["own"]):
        shown = {row for epoch in (0, 1) for row in Order(rank, 2).of_epoch(epoch).flatten().tolist()}
        assert set(of_rank["criterion.cache.items/id"].tolist()) == shown | {-1}
    for told in ran["uneven"]:
        assert "have [32, 64] slots on the ranks; expected the same on every rank" in str(told)


def uneven(rank: int, world: int, folder: Path) -> str:
    with pytest.raises(ValueError, match="slots") as told:
        train(rank, world, folder, own=True, capacity=32 * (rank + 1))
    return str(told.value)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning")
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_averaged_weights(tmp_path: Path, ours_first: bool, use_buffers: bool) -> None:
    """Weights are averaged, the cache is not; a resumed run is the uninterrupted one, whatever comes first."""

    def beside() -> list[Callback]:
        both: list[Callback] = [NegativeCacheCallback(), EMAWeightAveraging(decay=0.9, use_buffers=use_buffers)]
        return both if ours_first else both[::-1]

    plain = fit(DualEncoder(capacity=64))
    averaged = fit(DualEncoder(capacity=64), tmp_path, callbacks=beside())
    resumed = fit(DualEncoder(capacity=64, seed=5), tmp_path, start=tmp_path / "epoch=0.ckpt", callbacks=beside())
    assert_equal(everything(resumed), everything(averaged))
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    for name, value in everything(plain).items():
        assert torch.equal(saved["current_model_state"][name], value), name
        assert torch.equal(saved["state_dict"][name], value) == (".cache." in name), name
        assert torch.equal(averaged.state_dict()[name], saved["state_dict"][name]), name
    loaded = DualEncoder.load_from_checkpoint(tmp_path / "epoch=1.ckpt", weights_only=True, capacity=64)
    assert_equal(everything(loaded), everything(averaged))


def averaging(rank: int, world: int, folder: Path, *, resume: bool = False, kind: str = "replicated") -> Any:
    """A run beside averaged weights: what this rank has in the end, or why there is none."""
    warnings.simplefilter("ignore")
    callbacks = [NegativeCacheCallback(), EMAWeightAveraging(decay=0.9)]
    options: dict[str, Any] = {"own": True} if kind == "own" else {"placement": kind} if kind == "replicated" else {}
    try:
        return train(rank, world, folder, resume=resume, callbacks=callbacks, **options)
    except ValueError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning")
def test_averaged_weights_on_two_ranks(tmp_path: Path) -> None:
    """A replicated cache is that of one process, weights are averaged; any other cache is refused on every rank."""
    alone = averaging(0, 1, tmp_path / "alone", kind="sharded")
    cases: dict[str, Any] = {
        "replicated": (averaging, {"folder": tmp_path / "replicated"}),
        "resumed": (averaging, {"folder": tmp_path / "replicated", "resume": True}),
        "sharded": (averaging, {"folder": tmp_path / "sharded", "kind": "sharded"}),
        "own": (averaging, {"folder": tmp_path / "own", "kind": "own"}),
    }
    (tmp_path / "ranks").mkdir()
    ran = run_ranks(2, cases, tmp_path / "ranks", fresh=True)
    for name in ("replicated", "resumed"):
        for of_rank in ran[name]:
            assert_equal(of_rank, alone, atol=1e-9)
    for name in ("sharded", "own"):
        for told in ran[name]:
            assert "have a EMAWeightAveraging" in told, told
            assert "cache of criterion is not the same on all" in told, told


def test_averages_of_parts_are_refused(group_of_one: dist.ProcessGroup) -> None:
    model = DualEncoder(capacity=64)
    trainer: Any = SimpleNamespace(world_size=2, strategy=None, callbacks=[EMAWeightAveraging()])
    callback = NegativeCacheCallback()
    callback.setup(trainer, model, "fit")  # the loss is made later
    model.configure_model()
    for check in (lambda: callback.setup(trainer, model, "fit"), lambda: callback.on_fit_start(trainer, model)):
        with pytest.raises(
            ValueError, match=r"have a EMAWeightAveraging, .* cache of criterion is not the same on all"
        ):
            check()
    NegativeCacheCallback(save=False).setup(trainer, model, "fit")
    replicated = DualEncoder(capacity=64, placement="replicated", group=group_of_one)
    replicated.configure_model()
    callback.setup(trainer, replicated, "fit")


class Writing:
    """A strategy that writes checkpoints by itself."""

    def save_checkpoint(self) -> None: ...


def test_what_cannot_be_saved_is_said(group_of_one: dist.ProcessGroup) -> None:
    model = DualEncoder(capacity=64)
    model.configure_model()
    trainer: Any = SimpleNamespace(world_size=2, strategy=Writing(), callbacks=[])
    with pytest.raises(
        ValueError, match="strategy is Writing, and the cache of criterion is not the same on all ranks"
    ):
        NegativeCacheCallback().on_fit_start(trainer, model)
    NegativeCacheCallback(save=False).on_fit_start(trainer, model)
    checkpoint: dict[str, Any] = {}
    NegativeCacheCallback(save=False).on_save_checkpoint(trainer, model, checkpoint)
    assert checkpoint == {}
    model.criterion = NegativeCacheLoss(negcache_fn.reset(model.criterion.state), group=group_of_one)
    with pytest.raises(ValueError, match="group of criterion has 1 of 2 ranks; expected all, or none"):
        NegativeCacheCallback().on_fit_start(trainer, model)
