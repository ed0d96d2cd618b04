"""What the trainer does beside training: stop when asked, and a progress bar that stays one line."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from examples.interruptions import InterruptFlag

__all__ = ["OneLineProgress", "StopWhenInterrupted"]


class StopWhenInterrupted(TrainerCallback):
    """Saves a checkpoint and stops after the step in which the signal came."""

    def __init__(self, interrupted: InterruptFlag) -> None:
        self.interrupted = interrupted

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks the trainer to save and to stop."""
        if self.interrupted.is_set:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control


class OneLineProgress(ProgressCallback):
    """Shows the loss behind the bar; the other metrics are in the trainer's log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Puts the loss or the MRR@10 beside the bar."""
        shown = {name: logs[key] for name, key in (("loss", "loss"), ("mrr", "eval_mrr@10")) if logs and key in logs}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix({name: f"{float(value):.3f}" for name, value in shown.items()})
