"""Guard rails that read values, so that they cost a look at them: put them where data comes in.

Everything else in this package checks metadata only. Rows that are not finite never enter a cache without these either:
they are left out, and counted in `metrics["non_finite"]`.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from negcache_fn.checks import check_encoder, check_state
from negcache_fn.collectives import distribute
from negcache_fn.ids import first_of_each
from negcache_fn.state import live, scalar, stored

__all__ = ["RequireFinite", "require_finite", "validate"]


def require_finite(
    encode: Callable[[Any], Tensor], *, group: torch.distributed.ProcessGroup | None = None
) -> "RequireFinite":
    """An encoder whose embeddings are finite, or an error.

    Equivalent to `encode(features)`, if all of it is finite. In `step_` the error comes before anything is written. On
    CUDA it waits for the device at every call.

    Args:
        encode: the encoder, a module or a function of features [N, ...] to [N, D].
        group: of ranks that should all raise when one has to; else the others wait for it.

    Returns:
        A module whose parameters are those of `encode`, if it is one. It raises ValueError with the rows.

    Raises:
        TypeError: an `encode` that cannot be called.

    Examples:
        >>> encoder = require_finite(torch.nn.Linear(3, 4))
        >>> encoder(torch.full((2, 3), float("inf")))
        Traceback (most recent call last):
        ...
        ValueError: encode gave 2 of 2 rows that are not finite, the first of them row 0; expected numbers
    """
    check_encoder(encode)
    return RequireFinite(encode, group)


class RequireFinite(nn.Module):
    """What `require_finite` makes."""

    def __init__(self, encode: Callable[[Any], Tensor], group: torch.distributed.ProcessGroup | None) -> None:
        super().__init__()
        self.encode = encode
        distribute(group)  # says what is wrong with it
        self.group = group

    def forward(self, features: Any) -> Tensor:
        """[N, ...] -> [N, D]."""
        embeddings = self.encode(features)
        bad = ~embeddings.detach().isfinite().all(-1)
        return cast(Tensor, _require_none_op(embeddings, bad, distribute(self.group).total(bad.sum())))


def validate(state: TensorDictBase) -> None:
    """Raises unless the values of a state keep the invariants of its schema (see `negcache_fn.state`).

    For states that come from elsewhere: a checkpoint, a converter, your own hands. Of a sharded cache it looks at the
    part that is here.

    Args:
        state: the cache.

    Raises:
        ValueError: naming the tensor and the first slot that is wrong, or a structure that is not that of a state.

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
    _require("inserted_at", inserted_at, alive | (inserted_at == -1), "-1, as embedded_at there is -1")
    _require("inserted_at", inserted_at, ~alive | (inserted_at >= 0), "a step, as the slot is live")
    _require("inserted_at", inserted_at, inserted_at <= embedded_at, "at most embedded_at")
    _require("id", ids, ids >= -1, "an id, or -1")
    _require("id", ids, first_of_each(torch.where(alive, ids, -1)), "an id that no other live slot has")
    _require("log_weight", log_weight, log_weight < float("inf"), "a number below +inf")
    finite = stored(state, "embedding").isfinite().all(-1)
    _require("embedding", stored(state, "embedding"), finite | ~alive, "finite numbers, as the slot is live")


def _require(name: str, values: Tensor, right: Tensor, expected: str) -> None:
    if not bool(right.all()):
        slot = int((~right).nonzero()[0])
        given = f"is {values[slot].item()}" if values.ndim == 1 else "is not finite"
        raise ValueError(f"state['items', {name!r}] {given} at slot {slot}; expected {expected}")


@torch.library.custom_op("negcache_fn::require_none", mutates_args=())
def _require_none_op(embeddings: Tensor, bad: Tensor, bad_of_all: Tensor) -> Tensor:
    if int(bad_of_all) > 0:
        rows = cast("list[int]", bad.nonzero().flatten().tolist())
        if not rows:
            raise ValueError("encode gave rows that are not finite on another rank of the group; expected numbers")
        raise ValueError(
            f"encode gave {len(rows)} of {bad.shape[0]} rows that are not finite, the first of them row {rows[0]}; "
            f"expected numbers"
        )
    return embeddings.clone()


@_require_none_op.register_fake
def _(embeddings: Tensor, bad: Tensor, bad_of_all: Tensor) -> Tensor:
    return torch.empty_like(embeddings)


def _same_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None, None


_require_none_op.register_autograd(_same_gradient)
