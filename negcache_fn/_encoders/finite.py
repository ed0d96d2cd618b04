"""A guard around an encoder: embeddings that are not finite raise an error.

It reads values, which takes a pass over them. Everything else in this package checks metadata only. Rows that are not
finite never enter a cache without this guard either: they are left out, and counted in `metrics["non_finite"]`.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from negcache_fn._checks import check_encoder
from negcache_fn._features import leaves
from negcache_fn._operators import operator
from negcache_fn._ranks.attempts import Attempts
from negcache_fn._ranks.group import ranks_of

__all__ = ["RequireFinite", "require_finite"]


def require_finite(
    encode: Callable[[Any], Tensor], *, group: torch.distributed.ProcessGroup | None = None
) -> "RequireFinite":
    """An encoder whose embeddings are finite, or an error.

    Equivalent to `encode(features)`, if all rows are finite. In `step_` the error comes before anything is written. On
    CUDA it waits for the device at every call.

    Args:
        encode: the encoder, a module or a function of features [N, ...] to [N, D].
        group: ranks that all raise if one does; without it, the other ranks would wait for that one.

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
    """The module that `require_finite` returns."""

    def __init__(self, encode: Callable[[Any], Tensor], group: torch.distributed.ProcessGroup | None) -> None:
        super().__init__()
        self.encode = encode
        ranks_of(group)  # raises if it is not a group
        self.group = group

    def forward(self, features: Any) -> Tensor:
        """[N, ...] -> [N, D]."""
        ranks = ranks_of(self.group)
        attempts = Attempts(ranks)
        _, leaf = next(leaves(features))
        embeddings = attempts.result(lambda: self.encode(features), lambda: torch.zeros(1, 1, device=leaf.device))
        bad = ~embeddings.detach().isfinite().all(-1)
        bad_of_all, failures = ranks.all_sum(torch.stack([bad.sum(), attempts.failures(bad.device)])).unbind()
        attempts.raise_if_any(failures)
        return _require_none_op(embeddings, bad, bad_of_all)


def _fake_embeddings(embeddings: Tensor, bad: Tensor, bad_of_all: Tensor) -> Tensor:
    return torch.empty_like(embeddings)


def _same_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None, None


@operator("require_none", fake=_fake_embeddings, gradient=_same_gradient)
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
