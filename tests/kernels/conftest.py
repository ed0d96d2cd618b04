"""Kernels work with two threads here, and with one in all other tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.pretend import Machine, forget, pretend, real_build


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine whose compiler copies the kernels of this one. What it loads is forgotten afterwards."""
    built = real_build()
    forget()
    yield pretend(tmp_path, monkeypatch, built)
    monkeypatch.undo()
    forget()
