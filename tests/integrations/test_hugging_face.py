"""Trainer and Accelerate train, resume to the same bits, and on two ranks are one process.

What the documentation page shows, with two BERT towers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra transformers is not installed")
pytest.importorskip("accelerate", reason="the extra transformers is not installed")

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import negcache_fn
from negcache_fn import distributed
from negcache_fn.nn import NegativeCacheLoss
from tests.support.options import step_keywords
from tests.support.processes import run_ranks

WORDS, DIM, BATCH, CAPACITY = 40, 32, 16, 2048
TRAINING, HELD_OUT = 640, 200
Tokens = dict[str, Tensor]


def pairs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Documents are the words of their query, each under another number and in another order."""
    queries = torch.rand(count, WORDS, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :4]
    return queries, torch.sort((queries * 7 + 3) % WORDS).values


QUERIES, DOCUMENTS = (torch.cat(both) for both in zip(pairs(TRAINING, 1), pairs(HELD_OUT, 2), strict=True))


def collate(rows: list[int]) -> dict[str, Any]:
    def tokens(ids: Tensor) -> Tokens:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return {"queries": tokens(QUERIES[rows]), "documents": tokens(DOCUMENTS[rows]), "ids": torch.tensor(rows)}


class Tower(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=DIM,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=DIM,
            max_position_embeddings=8,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.1,
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, tokens: Tokens) -> Tensor:
        return nn.functional.normalize(self.bert(**tokens).last_hidden_state.mean(1), dim=-1)


def criterion(group: dist.ProcessGroup | None) -> NegativeCacheLoss:
    slots = distributed.local_capacity(CAPACITY, group)
    state = negcache_fn.init_cache(slots, DIM, features=collate([0])["documents"])
    options: Any = {} if group is None else {"group": group, "in_batch": "global"}
    return NegativeCacheLoss(state, scale=10.0, learnable_scale=True, **step_keywords(draws_per_query=2, **options))


class DualEncoder(nn.Module):
    """All in one `forward`, for DistributedDataParallel."""

    def __init__(self, dropout: float = 0.1, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query_tower, self.document_tower = Tower(dropout), Tower(dropout)
        self.criterion = criterion(group)

    def forward(self, queries: Tokens, documents: Tokens, ids: Tensor) -> Tensor:
        return self.criterion(self.query_tower(queries), documents, self.document_tower, ids=ids)


class DualEncoderTrainer(Trainer):
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = model(**inputs)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        if "loss" in logs:
            logs |= {f"cache/{name}": value.item() for name, value in self.model.criterion.metrics.items()}
        super().log(logs, *rest)


class CachePerRank(TrainerCallback):
    """Trainer saves what rank 0 has."""

    def __init__(self, criterion: NegativeCacheLoss) -> None:
        self.criterion = criterion

    def file(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / f"cache-{args.process_index}.pt"

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.file(args, state).parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.criterion.state_dict(), self.file(args, state))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            self.criterion.load_state_dict(torch.load(self.file(args, state), weights_only=True))


def trained(folder: Path, model: DualEncoder, *, resume_at: int | None = None, **options: Any) -> DualEncoderTrainer:
    defaults = {"max_steps": 160, "save_steps": 80, "logging_steps": 20, "eval_steps": 20, "learning_rate": 5e-3}
    args = TrainingArguments(
        str(folder),
        eval_strategy="steps",
        label_names=["ids"],
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **{"per_device_train_batch_size": BATCH, **defaults, **options},
    )
    rows = list(range(TRAINING + HELD_OUT))
    trainer = DualEncoderTrainer(
        model, args, train_dataset=rows[:TRAINING], eval_dataset=rows[TRAINING:], data_collator=collate
    )
    if args.world_size > 1:
        trainer.add_callback(CachePerRank(model.criterion))
    trainer.train(resume_from_checkpoint=None if resume_at is None else str(folder / f"checkpoint-{resume_at}"))
    return trainer


def reciprocal_rank(query_tower: nn.Module, document_tower: nn.Module) -> float:
    """Mean over unseen queries, among all documents; equal scores count against."""
    both = collate(list(range(TRAINING + HELD_OUT)))
    with torch.no_grad():
        scores = query_tower.eval()(both["queries"])[TRAINING:] @ document_tower.eval()(both["documents"]).T
    own = scores[torch.arange(HELD_OUT), torch.arange(TRAINING, TRAINING + HELD_OUT)]
    return float((1 / (scores >= own[:, None]).sum(1)).mean())


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], *, atol: float = 0) -> None:
    assert one.keys() == other.keys()
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def test_trainer_learns_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """With dropout and a shuffled order, whose random numbers Trainer restores; and evaluation writes nothing."""
    untrained = DualEncoder()
    before = reciprocal_rank(untrained.query_tower, untrained.document_tower)
    trainer = trained(tmp_path, model := DualEncoder())
    assert before < 0.05
    assert reciprocal_rank(model.query_tower, model.document_tower) > 0.5
    assert int(model.criterion.state["step"]) == 160
    assert sum("eval_loss" in row for row in trainer.state.log_history) == 8
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert logged[-1]["cache/occupancy"] == TRAINING / CAPACITY
    assert logged[-1]["cache/exact_loss"] < logged[-3]["cache/exact_loss"]

    trained(tmp_path, resumed := DualEncoder(), resume_at=80)
    assert_equal(resumed.state_dict(), model.state_dict())
    saved = load_file(tmp_path / "checkpoint-160" / "model.safetensors")
    assert_equal(saved, dict(model.state_dict()))
    assert saved["criterion.cache.items/id"].dtype == torch.int64


def test_trainer_accumulates(tmp_path: Path) -> None:
    trained(tmp_path, model := DualEncoder(), max_steps=5, gradient_accumulation_steps=3, save_strategy="no")
    assert int(model.criterion.state["step"]) == 15
    assert float(negcache_fn.occupancy(model.criterion.state)) == 15 * BATCH / CAPACITY


def join(rank: int, world: int) -> dist.ProcessGroup:
    """As a launcher does it; both libraries take the group that is there."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    if world > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in here.items()})
        os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1"})
    group = dist.group.WORLD
    assert group is not None
    return group


def everything(group: dist.ProcessGroup, towers: list[nn.Module], criterion: NegativeCacheLoss) -> dict[str, Tensor]:
    """The cache whole."""
    whole: Any = distributed.unshard(criterion.state, group)
    found = {str(key): value for key, value in whole.items(include_nested=True, leaves_only=True)}
    for number, module in enumerate([*towers, criterion.scaling]):
        found |= {f"{number}.{name}": value.detach().clone() for name, value in module.state_dict().items()}
    return found


def on_ranks(rank: int, world: int, folder: Path, *, resume_at: int | None = None) -> dict[str, Tensor]:
    group = join(rank, world)
    model = DualEncoder(0.0, group).double()
    options = {"max_steps": 20, "save_steps": 10, "per_device_train_batch_size": BATCH // world}
    trained(folder, model, resume_at=resume_at, **options)
    return everything(group, [model.query_tower, model.document_tower], model.criterion)


class WholeCache:
    """A criterion as rank 0 saves it for all ranks, whose number may be another when it is loaded."""

    def __init__(self, criterion: NegativeCacheLoss, group: dist.ProcessGroup) -> None:
        self.criterion, self.group = criterion, group

    def state_dict(self) -> dict[str, Any]:
        whole = distributed.unshard(self.criterion.state, self.group)
        return {"cache": whole, "scaling": self.criterion.scaling.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.criterion.state = distributed.shard(saved["cache"], self.group).lock_()
        self.criterion.scaling.load_state_dict(saved["scaling"])


def accelerated(
    rank: int, world: int, folder: Path, *, resume: Path | None = None, steps: int = 40
) -> dict[str, Tensor]:
    """Trains with gradient accumulation, and saves in the middle; what there is in the end."""
    group = join(rank, world)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == world
    torch.manual_seed(0)
    towers: list[nn.Module] = [Tower(0.0), Tower(0.0)]
    assert reciprocal_rank(*towers) < 0.05
    for tower in towers:
        tower.double().train()
    loss_of = criterion(group).double()
    parameters = [parameter for module in (*towers, loss_of) for parameter in module.parameters()]
    loader = DataLoader(list(range(TRAINING)), BATCH // world, collate_fn=collate)
    query_tower, document_tower, optimizer, loader = accelerator.prepare(
        *towers, torch.optim.Adam(parameters, lr=5e-3), loader
    )
    accelerator.register_for_checkpointing(WholeCache(loss_of, group))
    first = 0
    if resume is not None:
        accelerator.load_state(str(resume))
        first = int(loss_of.state["step"])
    for step, batch in enumerate(accelerator.skip_first_batches(loader, first), start=first):
        if step == steps // 2 and resume is None:
            accelerator.save_state(str(folder))
        with accelerator.accumulate(query_tower, document_tower):
            loss = loss_of(query_tower(batch["queries"]), batch["documents"], document_tower, ids=batch["ids"])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert int(loss_of.state["step"]) == steps
    assert reciprocal_rank(*towers) > 0.5
    return everything(group, towers, loss_of)


def test_on_two_ranks(tmp_path: Path, group_of_one: dist.ProcessGroup) -> None:
    """One process and two have the same, and so has a run that goes on with another number of them."""
    alone = {"accelerate": accelerated(0, 1, tmp_path / "alone"), "trainer": on_ranks(0, 1, tmp_path / "trainer")}
    cases: dict[str, Any] = {
        "accelerate": (accelerated, {"folder": tmp_path / "two"}),
        "accelerate-resumed": (accelerated, {"folder": tmp_path / "two", "resume": tmp_path / "two"}),
        "accelerate-from-alone": (accelerated, {"folder": tmp_path / "two", "resume": tmp_path / "alone"}),
        "trainer": (on_ranks, {"folder": tmp_path / "trainer-two"}),
        "trainer-resumed": (on_ranks, {"folder": tmp_path / "trainer-two", "resume_at": 10}),
    }
    (tmp_path / "ranks").mkdir()
    ran: dict[str, list[dict[str, Tensor]]] = run_ranks(2, cases, tmp_path / "ranks", fresh=True)
    for name, of_ranks in ran.items():
        assert_equal(of_ranks[0], of_ranks[1])
        assert_equal(of_ranks[0], alone[name.split("-")[0]], atol=1e-9)
    for kind in ("accelerate", "trainer"):
        assert_equal(ran[f"{kind}-resumed"][0], ran[kind][0])
    assert_equal(accelerated(0, 1, tmp_path / "two", resume=tmp_path / "two"), alone["accelerate"], atol=1e-9)
