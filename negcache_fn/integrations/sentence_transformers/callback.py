"""A callback of the trainer for a loss with a state: saves it, restores it, and logs its metrics."""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from sentence_transformers import SentenceTransformerTrainer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint  # pyright: ignore[reportUnknownVariableType] - untyped there

from negcache_fn.integrations.sentence_transformers.checkpoints import restore_caches, save_caches
from negcache_fn.integrations.sentence_transformers.loss import NegativeCacheLoss

__all__ = ["NegativeCacheCallback"]

_FOLDER = "_negative_cache"  # the trainer uploads nothing that begins with an underscore


class NegativeCacheCallback(TrainerCallback):
    """Saves caches with the trainer's checkpoints, restores them, and logs their metrics.

    `NegativeCacheCallback.attach(trainer)` finds the losses. A resumed run equals the uninterrupted one. The cache of
    `<output_dir>/checkpoint-<step>` is in `<output_dir>/_negative_cache`: it holds training data, and `push_to_hub`
    uploads a checkpoint's own folder. It is deleted with the checkpoint, and is not written with `save_only_model`. On
    another number of ranks a shared cache is distributed again. Of separate caches, each rank takes the one with its
    number, if there is one.

    Args:
        trainer: with a `NegativeCacheLoss`, made already.

    Raises:
        ValueError: a trainer without one. In `train`: a checkpoint whose cache was made with other settings.
    """

    def __init__(self, trainer: SentenceTransformerTrainer) -> None:
        self.losses: dict[str, NegativeCacheLoss] = _losses(cast(Any, trainer.loss))
        if not self.losses:
            raise ValueError("loss has no NegativeCacheLoss in it; expected a trainer with the loss, made already")
        self._trainer = trainer
        self._resumed_from: str | None = None

    @classmethod
    def attach(cls, trainer: SentenceTransformerTrainer) -> "NegativeCacheCallback":
        """Gives a trainer the callback, in front of those that report the logs."""
        callback = cls(trainer)
        trainer.callback_handler.callbacks.insert(0, callback)
        trainer.train = functools.partial(callback._train, trainer.train)  # the only place that knows the checkpoint
        return callback

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the metrics of the last step to the training logs."""
        if logs is None or "loss" not in logs:
            return
        for name, loss in self.losses.items():
            prefix = f"cache/{name}/" if len(self.losses) > 1 else "cache/"
            metrics = {prefix + key: value.item() for key, value in loss.metrics.items()}
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves all caches beside the checkpoint."""
        if args.save_only_model:
            return
        output, run = Path(str(args.output_dir)), self._run_folder()
        folder = output / _FOLDER / run.relative_to(output)
        save_caches(folder, run, state.global_step, self.losses, self._model())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restores the caches of the resumed checkpoint."""
        if state.global_step == 0:
            return
        given = self._resumed_from or args.resume_from_checkpoint
        checkpoint = self._run_folder() / f"checkpoint-{state.global_step}" if given in (None, "True") else Path(given)
        checkpoint = checkpoint.absolute()
        folders = [
            above / _FOLDER / checkpoint.parent.relative_to(above)
            for above in (checkpoint.parent, checkpoint.parent.parent)
        ]
        restore_caches(folders, checkpoint, state.global_step, self.losses, self._model(), args.device)

    def _train(
        self, train: Callable[..., Any], resume_from_checkpoint: str | bool | None = None, *rest: Any, **options: Any
    ) -> Any:
        """The trainer's `train`, which does not pass the resumed checkpoint to its callbacks."""
        given: Any = resume_from_checkpoint
        if isinstance(given, bool):
            given = cast(Any, get_last_checkpoint)(str(self._trainer.args.output_dir)) if given else None
        self._resumed_from = given
        try:
            return train(resume_from_checkpoint, *rest, **options)
        finally:
            self._resumed_from = None

    def _run_folder(self) -> Path:
        """Where the checkpoints are: in a search for hyper-parameters, that of the trial."""
        trainer = cast(Any, self._trainer)  # transformers says it in private names alone
        return Path(trainer._get_output_dir(getattr(trainer, "_trial", None)))

    def _model(self) -> nn.Module | None:
        """What is trained, if its weights are all here."""
        trainer = cast(Any, self._trainer)
        return None if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else trainer.model


def _losses(loss: nn.Module | Mapping[str, nn.Module]) -> dict[str, NegativeCacheLoss]:
    """By the name of the data set, and by path where that has several."""
    found: dict[str, NegativeCacheLoss] = {}
    for name, module in ({"": loss} if isinstance(loss, nn.Module) else loss).items():
        children = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
        inside = {path: child for path, child in children if isinstance(child, NegativeCacheLoss)}
        for path, child in inside.items():
            if child not in found.values():
                parts = (name, path) if len(inside) > 1 else (name,)
                found[".".join(part for part in parts if part)] = child
    return found
