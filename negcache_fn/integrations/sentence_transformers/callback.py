"""What the trainer does not do for a loss with a state: save it, restore it, show its metrics."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast
from warnings import warn

import torch
from sentence_transformers import SentenceTransformerTrainer
from tensordict import TensorDictBase
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from negcache_fn._cache.state import lock
from negcache_fn._ranks.group import ranks_of
from negcache_fn.distributed import shard
from negcache_fn.integrations.sentence_transformers.loss import NegativeCacheLoss, all_ranks

__all__ = ["NegativeCacheCallback"]

_FILE = "negative_cache-{rank}-of-{size}.pt"


class NegativeCacheCallback(TrainerCallback):
    """Saves caches with the trainer's checkpoints, restores them, and logs their metrics.

    `NegativeCacheCallback.attach(trainer)` finds the losses. A resumed run equals the uninterrupted one. Each rank has
    a file in the checkpoint; on another number of ranks a shared cache is spread anew, and of separate ones each rank
    takes the one of its number, if there is one.

    Args:
        loss: of the trainer: a module, or modules by the names of their data sets.
        resume_from: the checkpoint that is resumed from, where the path was given to `train()` and is not in the
            trainer's output folder.

    Raises:
        ValueError: a `loss` without a `NegativeCacheLoss`.
    """

    def __init__(self, loss: nn.Module | Mapping[str, nn.Module], *, resume_from: str | Path | None = None) -> None:
        named = {"": loss} if isinstance(loss, nn.Module) else dict(loss)
        self.losses: dict[str, NegativeCacheLoss] = {}
        for name, module in named.items():
            children = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
            for path, child in children:
                if isinstance(child, NegativeCacheLoss) and child not in self.losses.values():
                    self.losses[".".join(part for part in (name, path) if part)] = child
        if not self.losses:
            raise ValueError("loss has no NegativeCacheLoss in it; expected the loss of the trainer, made already")
        self.resume_from = resume_from

    @classmethod
    def attach(
        cls, trainer: SentenceTransformerTrainer, *, resume_from: str | Path | None = None
    ) -> "NegativeCacheCallback":
        """Gives a trainer the callback, before those that report what is logged."""
        callback = cls(cast(Any, trainer.loss), resume_from=resume_from)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the metrics of the last step to what is logged of the training."""
        if logs is None or "loss" not in logs:
            return
        for name, loss in self.losses.items():
            prefix = f"cache/{name}/" if len(self.losses) > 1 else "cache/"
            metrics = {prefix + key: value.item() for key, value in loss.metrics.items()}
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts this rank's caches into the checkpoint."""
        folder = _checkpoint(args, state)
        folder.mkdir(parents=True, exist_ok=True)
        ranks = ranks_of(all_ranks())
        saved = {
            name: {"state": loss.state, "scaling": loss.scaling.state_dict()} for name, loss in self.losses.items()
        }
        partial = folder / (_FILE.format(rank=ranks.rank, size=ranks.size) + ".partial")
        torch.save(saved, partial)
        partial.replace(partial.with_suffix(""))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the caches from the checkpoint that is resumed from."""
        if state.global_step == 0:
            return
        given = self.resume_from or args.resume_from_checkpoint
        folder = _checkpoint(args, state) if given is None or given == "True" else Path(given)
        found = {
            int(match[1]): path
            for path in folder.glob(_FILE.format(rank="*", size="*"))
            if (match := re.search(r"-(\d+)-of-\d+\.pt$", path.name))
        }
        if not found:
            warn(
                f"the run goes on at step {state.global_step} with an empty cache: {folder} has none; expected a "
                f"checkpoint saved with this callback, or its folder as resume_from",
                stacklevel=2,
            )
            return
        self._restore(found, args.device)

    def _restore(self, found: dict[int, Path], device: torch.device) -> None:
        ranks = ranks_of(all_ranks())
        for name, loss in self.losses.items():
            group = loss.group
            if group is not None and len(found) != ranks.size:
                parts = [_load(found[rank])[name] for rank in sorted(found)]
                whole: TensorDictBase | None = _joined([part["state"] for part in parts])
                saved: dict[str, Any] = {
                    "state": None if whole is None else shard(whole, group),
                    "scaling": parts[0]["scaling"],
                }
            elif ranks.rank in found:
                saved = _load(found[ranks.rank])[name]
            else:
                continue
            if (part := saved["state"]) is not None:
                loss.state = lock(part.to(device))
            loss.scaling.load_state_dict(saved["scaling"])


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _joined(parts: list[TensorDictBase | None]) -> TensorDictBase | None:
    """A whole cache from its parts."""
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        return None
    whole = present[0].clone()
    whole["items"] = torch.cat([part["items"] for part in present])
    return lock(whole)
