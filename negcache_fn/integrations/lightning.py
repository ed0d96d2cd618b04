"""A Lightning callback for losses with a cache: it logs their metrics, and saves the caches of all ranks.

For `lightning.pytorch`, which nothing else in this package imports. With one process a checkpoint has the cache
already, in the module's `state_dict`. With several, Lightning writes rank 0's, so the others send their caches there:

| cache                       | in the checkpoint                    | on another number of ranks         |
| --------------------------- | ------------------------------------ | ---------------------------------- |
| of a `group`, sharded       | `state_dict` has the whole one       | it is distributed again            |
| of a `group`, replicated    | `state_dict` has it                  | every rank has it                  |
| each rank's own, no `group` | rank 0's there, the others beside it | each rank has that of its number;  |
|                             |                                      | more ranks start from rank 0's     |
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from negcache_fn._cache.state import stored
from negcache_fn.distributed import local_capacity
from negcache_fn.nn import NegativeCacheLoss
from negcache_fn.nn.cache import FINGERPRINT, fingerprint_of, is_one_cache

__all__ = ["NegativeCacheCallback"]

_OTHERS = "negative_caches"  # in a checkpoint: by path of the loss, the caches of ranks 1, 2, ...
_PIECE_BYTES = 2**26  # of a message


class NegativeCacheCallback(Callback):
    """Logs the metrics of every `negcache_fn.nn.NegativeCacheLoss` in the module, and saves and restores all caches.

    Metrics go through `log_dict` after each training batch that used the loss, so Lightning writes them every
    `log_every_n_steps`: as `cache/drift`, or `cache/<path of the loss>/drift` if there are several losses. With a group
    they cover all ranks; without one, rank 0 only.

    A resumed run equals the uninterrupted one, bit for bit on the same number of ranks. Rank 0 holds all caches in CPU
    memory while it saves, and every rank reads the whole file. With a `WeightAveraging`, such as `EMAWeightAveraging`,
    the weights are averaged and the cache is not.

    Args:
        prefix: prefix of the names of logged metrics.
        save: whether checkpoints get the caches of all ranks. With False they have only rank 0's: for caches too large
            for one rank, which `negcache_fn.distributed.save_checkpoint` saves by parts.

    Raises:
        ValueError: at the start of `fit`, with `save` and several ranks: a strategy whose checkpoints are not rank 0's
            (FSDP, DeepSpeed), a group of some ranks only, caches of each rank that differ in capacity, or a
            `WeightAveraging` beside caches that are not replicated.

    Examples:
        >>> trainer = Trainer(accelerator="cpu", callbacks=[NegativeCacheCallback()], logger=False)
        >>> any(isinstance(callback, NegativeCacheCallback) for callback in trainer.callbacks)
        True
    """

    def __init__(self, *, prefix: str = "cache/", save: bool = True) -> None:
        self.prefix = prefix
        self.save = save
        self._losses: dict[str, NegativeCacheLoss] = {}
        self._seen: dict[str, dict[str, Tensor]] = {}  # metrics before the batch
        self._hook: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes `load_state_dict` take this rank's part of whole caches.

        A callback's own hooks for loading come after it. The losses may not exist yet.
        """
        self._unhook()
        self._check_averages(trainer, _losses(pl_module))
        if self.save:
            self._hook = pl_module.register_load_state_dict_pre_hook(_take_parts)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        self._unhook()
        self._losses, self._seen = {}, {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the losses, and checks that their caches can be saved."""
        self._losses = _losses(pl_module)
        if not self.save or trainer.world_size == 1:
            return
        self._check_averages(trainer, self._losses)
        for path, loss in self._losses.items():
            group = loss.group
            if group is None and len(set(capacities := _capacities(stored(loss.state, "embedding"), _all_ranks()))) > 1:
                raise ValueError(
                    f"the caches of {path} have {capacities} slots on the ranks; expected the same on every rank, or "
                    f"save=False"
                )
            if group is not None and group.size() != trainer.world_size:
                raise ValueError(
                    f"group of {path} has {group.size()} of {trainer.world_size} ranks; expected all, or none and a "
                    f"cache for each rank, or save=False"
                )
            if type(trainer.strategy).save_checkpoint is not Strategy.save_checkpoint and not loss.options.replicated:
                raise ValueError(
                    f"strategy is {type(trainer.strategy).__name__}, and the cache of {path} is not the same on all "
                    f"ranks; expected a strategy whose checkpoints rank 0 writes, such as 'ddp', or save=False"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers which metrics are not of this batch: of one before, or of a validation."""
        for average in _averages(trainer):
            _share_caches(average, self._losses)
        self._seen = {path: loss.metrics for path, loss in self._losses.items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the metrics."""
        for path, loss in self._losses.items():
            if loss.metrics is not self._seen.get(path):
                prefix = f"{self.prefix}{path}/" if len(self._losses) > 1 else self.prefix
                metrics = {prefix + name: value.float() for name, value in loss.metrics.items()}
                pl_module.log_dict(metrics, on_step=True, on_epoch=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the caches of the other ranks into rank 0's checkpoint; runs on all ranks."""
        if not self.save or trainer.world_size == 1:
            return
        losses = {path: loss for path, loss in _losses(pl_module).items() if not loss.options.replicated}
        device = trainer.strategy.root_device
        checkpoint[_OTHERS] = {}
        for path, loss in losses.items():
            group = loss.group
            parts = _on_rank_0(loss.cache.state_dict(), group, device)
            if group is None:
                checkpoint[_OTHERS][path] = parts[1:]
            elif trainer.is_global_zero:
                start = f"{path}.cache."
                for name, leaf in parts[0].items():
                    whole = torch.cat([part[name].cpu() for part in parts]) if _has_slots(name) else leaf
                    checkpoint["state_dict"][start + name] = whole
                _put_fingerprint(checkpoint["state_dict"], start)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores each rank's own cache, if each has one; `state_dict` restored rank 0's on all of them."""
        for path, loss in _losses(pl_module).items():
            others = checkpoint.get(_OTHERS, {}).get(path, [])
            if self.save and 0 < trainer.global_rank <= len(others):
                loss.cache.load_state_dict(others[trainer.global_rank - 1])

    def _check_averages(self, trainer: Trainer, losses: dict[str, NegativeCacheLoss]) -> None:
        parts = [path for path, loss in losses.items() if not loss.options.replicated]
        if self.save and trainer.world_size > 1 and parts and _averages(trainer):
            raise ValueError(
                f"callbacks have a {type(_averages(trainer)[0]).__name__}, whose checkpoints have the model twice, and "
                f"the cache of {parts[0]} is not the same on all ranks; expected no average on several ranks, a "
                f"replicated cache, or save=False"
            )

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None


def _losses(module: nn.Module) -> dict[str, NegativeCacheLoss]:
    """By path."""
    named = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
    return {path: child for path, child in named if isinstance(child, NegativeCacheLoss)}


def _averages(trainer: Trainer) -> list[WeightAveraging]:
    found = cast("list[Callback]", trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue] - made by a connector
    return [callback for callback in found if isinstance(callback, WeightAveraging)]


def _share_caches(average: WeightAveraging, losses: dict[str, NegativeCacheLoss]) -> None:
    """Gives the averaged copy of the model, which checkpoints save as `state_dict`, the cache of the training.

    Its own cache is empty and never filled.
    """
    model = average._average_model  # pyright: ignore[reportPrivateUsage] - it is nowhere else
    if model is not None:
        for path, copied in _losses(model.module).items():
            if path in losses and copied.state is not losses[path].state:
                copied.state = losses[path].state


def _take_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of `load_state_dict`: whole caches that are sharded here become this rank's parts."""
    for path, loss in _losses(module).items():
        group, start = loss.group, f"{prefix}{path}.cache."
        embedding: Tensor | None = state_dict.get(f"{start}items/embedding")
        if group is None or group.size() == 1 or loss.options.replicated or embedding is None:
            continue
        capacity = embedding.shape[0]
        rows = local_capacity(capacity, group)
        first = capacity - rows if group.rank() == group.size() - 1 else group.rank() * rows
        names = [start + name for name in loss.cache.state_dict()]
        if not all(name in state_dict for name in names):
            continue
        is_whole = is_one_cache(state_dict, start)
        for name in names:
            if _has_slots(name.removeprefix(start)):
                state_dict[name] = state_dict[name][first : first + rows]
        if is_whole:
            _put_fingerprint(state_dict, start)


def _on_rank_0(
    leaves: dict[str, Tensor], group: dist.ProcessGroup | None, device: torch.device
) -> list[dict[str, Tensor]]:
    """The leaves of every rank's cache, those of the others in CPU memory; on the other ranks, nothing."""
    group = _all_ranks() if group is None else group
    rows = _capacities(leaves["items/embedding"], group)
    on = device if dist.get_backend(group) == "nccl" else torch.device("cpu")
    if group.rank() > 0:
        for leaf in leaves.values():
            for piece in _pieces(leaf):
                dist.send(_bytes(piece.to(on)), group_dst=0, group=group)
        return []
    parts = [leaves]
    for source in range(1, group.size()):
        part = {name: _empty_like(leaf, rows[source] if _has_slots(name) else None) for name, leaf in leaves.items()}
        for leaf in part.values():
            for piece in _pieces(leaf):
                received = torch.empty_like(piece, device=on)
                dist.recv(_bytes(received), group_src=source, group=group)
                piece.copy_(received)
        parts.append(part)
    return parts


def _all_ranks() -> dist.ProcessGroup:
    return cast("dist.ProcessGroup", dist.group.WORLD)


def _capacities(embedding: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Slots of each rank's cache."""
    rows: list[Any] = [None] * group.size()
    dist.all_gather_object(rows, embedding.shape[0], group=group)
    return rows


def _has_slots(name: str) -> bool:
    """Whether a leaf has a row for each slot."""
    return name.startswith("items/")


def _put_fingerprint(state_dict: dict[str, Any], start: str) -> None:
    """That of the slots which are there."""
    found = fingerprint_of(state_dict[f"{start}items/id"], state_dict[f"{start}items/embedded_at"])
    state_dict[start + FINGERPRINT] = found


def _empty_like(leaf: Tensor, rows: int | None) -> Tensor:
    return torch.empty(leaf.shape if rows is None else (rows, *leaf.shape[1:]), dtype=leaf.dtype)


def _pieces(leaf: Tensor) -> Iterator[Tensor]:
    """Views that are small enough for a buffer on the accelerator."""
    if leaf.ndim == 0:
        yield leaf
    else:
        row_bytes = max(leaf[:1].numel() * leaf.element_size(), 1)
        yield from leaf.split(max(_PIECE_BYTES // row_bytes, 1))


def _bytes(values: Tensor) -> Tensor:
    """Gloo does not send every type, and they are only moved."""
    return values.contiguous().view(-1).view(torch.uint8)
