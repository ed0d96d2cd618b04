"""Checkpoints: files that are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from examples.whole_files import written_whole

__all__ = ["load", "save"]


def save(value: object, file: Path) -> None:
    """``torch.save`` in one move: a program stopped on the way leaves the old file."""
    with written_whole(file) as unfinished:
        torch.save(value, unfinished)


def load(file: Path) -> Any:
    """What was saved, tensors and plain values only; None where there is no such file."""
    return torch.load(file, weights_only=True) if file.exists() else None
