"""States made under `torch.inference_mode()`, the usual way to embed a corpus, are written later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import negcache_fn
from negcache_fn.nn import NegativeCacheLoss
from tests.support.builders import assert_same_state, same_snapshot, snapshot, unit

ENCODER = nn.Linear(3, 4)


def made() -> Any:
    state = negcache_fn.init_cache(8, 4, torch.zeros(1, 3))
    return negcache_fn.update(state, unit(5, 3, 0), unit(5, 4, 1), ids=torch.arange(5))


MAKERS: dict[str, Callable[[Path], Any]] = {
    "init_cache": lambda _: negcache_fn.init_cache(8, 4, torch.zeros(1, 3)),
    "update": lambda _: made(),
    "prefill": lambda _: negcache_fn.prefill(made(), [unit(2, 3, 2)], ENCODER),
    "reembed": lambda _: negcache_fn.reembed(made(), ENCODER),
    "reset": lambda _: negcache_fn.reset(made()),
    "resize": lambda _: negcache_fn.resize(made(), 6),
    "offload_features": lambda _: negcache_fn.offload_features(made()),
    "memory_mapped": lambda folder: negcache_fn.memory_mapped(made(), folder),
}


def written(state: Any) -> Any:
    criterion = NegativeCacheLoss(state)
    criterion(unit(2, 4, 3), unit(2, 3, 4), ENCODER).backward()
    state = negcache_fn.update_(criterion.state, unit(2, 3, 5), unit(2, 4, 5))
    negcache_fn.exact_loss(state, unit(2, 4, 3).requires_grad_(), unit(2, 4, 4), top_k=2).backward()
    return negcache_fn.reembed_(state, ENCODER)


@pytest.mark.parametrize("maker", MAKERS)
def test_is_written_like_any_other(maker: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        state = MAKERS[maker](tmp_path / "inference")
        negcache_fn.update_(state, unit(1, 3, 6), unit(1, 4, 6))  # inside too
    expected = negcache_fn.update_(MAKERS[maker](tmp_path / "plain"), unit(1, 3, 6), unit(1, 4, 6))
    assert_same_state(written(state), written(expected))


@pytest.mark.parametrize("write", ["step_", "update_", "reembed_"])
def test_one_that_cannot_be_written_is_refused_by_name(write: str) -> None:
    with torch.inference_mode():
        state = made().clone().lock_()  # as torch.load makes one there
    before = snapshot(state)
    calls: dict[str, Callable[[Any], Any]] = {
        "step_": lambda state: negcache_fn.step_(state, unit(2, 4, 3), unit(2, 3, 4), ENCODER),
        "update_": lambda state: negcache_fn.update_(state, unit(2, 3, 5), unit(2, 4, 5)),
        "reembed_": lambda state: negcache_fn.reembed_(state, ENCODER),
    }
    with pytest.raises(ValueError, match=r"state has inference tensors, .*; expected normal ones, as in state.clone"):
        calls[write](state)
    assert same_snapshot(before, snapshot(state))
    calls[write](state.clone())
    with torch.no_grad():  # an evaluation writes nothing
        negcache_fn.step_(state, unit(2, 4, 3), unit(2, 3, 4), ENCODER)
