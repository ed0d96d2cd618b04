"""The invariants of a state's values, for states that come from elsewhere.

Everything else in this package checks metadata only, which costs nothing and compiles away.
"""

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.ids import first_of_each
from negcache_fn._cache.state import COLUMNS, check_state, embedding_columns, live, scalar, stored

__all__ = ["validate"]


def validate(state: TensorDictBase) -> None:
    """Raises unless the values of a state keep the invariants of its schema.

    For states that come from elsewhere: a checkpoint, a converter, an edit by hand. Of a sharded cache it checks this
    rank's part.

    Args:
        state: the cache.

    Raises:
        ValueError: the tensor and the first wrong slot, or a structure that is not that of a state.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> validate(state)
        >>> state["items", "inserted_at"][2] = 0
        >>> validate(state)
        Traceback (most recent call last):
        ...
        ValueError: state['items', 'inserted_at'] is 0 at slot 2; expected -1, as embedded_at there is -1
    """
    check_state(state)
    ids, embedded_at, inserted_at = (stored(state, name) for name in ("id", "embedded_at", "inserted_at"))
    log_weight, step, alive = stored(state, "log_weight"), scalar(state, "step"), live(state)
    _require("embedded_at", embedded_at, (embedded_at >= -1) & (embedded_at <= step), f"-1 ... {int(step)}, the step")
    for name, column in COLUMNS.items():
        if column.arriving == "now":
            values, empty = stored(state, name), int(column.empty)
            _require(name, values, alive | (values == empty), f"{empty}, as embedded_at there is -1")
            _require(name, values, ~alive | (values >= 0), "a step, as the slot is live")
    _require("inserted_at", inserted_at, inserted_at <= embedded_at, "at most embedded_at")
    _require("id", ids, first_of_each(torch.where(alive, ids, -1)), "an id that no other live slot has")
    _require("log_weight", log_weight, log_weight < float("inf"), "a number below +inf")
    rows, scale = (embedding_columns(state).get(name) for name in ("embedding", "embedding_scale"))
    assert rows is not None
    _require("embedding", rows, rows.isfinite().all(-1) | ~alive, "finite numbers, as the slot is live")
    if scale is not None:
        right = (scale >= 0) & (scale < float("inf"))
        _require("embedding_scale", scale, right | ~alive, "a finite number of 0 or more, as the slot is live")


def _require(name: str, values: Tensor, right: Tensor, expected: str) -> None:
    if not bool(right.all()):
        slot = int((~right).nonzero()[0])
        given = f"is {values[slot].item()}" if values.ndim == 1 else "is not finite"
        raise ValueError(f"state['items', {name!r}] {given} at slot {slot}; expected {expected}")
