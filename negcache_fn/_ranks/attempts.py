"""Errors of the user's functions between two messages of a step, reported to every rank with the next message.

A rank that raised at once would leave the others waiting. So it continues with a stand-in of the right shape, the next
regular messages carry the outcome of its attempts, and then every rank raises. Nothing has been written by then.

While a step is being compiled nothing is caught: errors then stay on their rank.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from negcache_fn._ranks.agree import raise_for_others
from negcache_fn._ranks.group import Ranks
from negcache_fn._ranks.operators import group_named

__all__ = ["Attempts"]

_FAILED = -1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # and any other


class Attempts:
    """A step's calls of the user's functions."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.error: Exception | None = None  # the first one here
        self.dtype: torch.dtype | None = None  # of the last embeddings
        self.has_gradient: bool = False

    @property
    def watched(self) -> bool:
        """Whether an error waits until all ranks can raise: there are others, and nothing is being compiled."""
        return self.ranks.name is not None and not torch.compiler.is_compiling()

    def result(self, function: Callable[[], Tensor], stand_in: Callable[[], Tensor]) -> Tensor:
        """The result of the function or, if it raises, the stand-in."""
        if not self.watched:
            return function()
        try:
            return function()
        except Exception as error:
            self.error = self.error or error
            return stand_in()

    def embeddings(self, function: Callable[[], Tensor], stand_in: Callable[[], Tensor]) -> Tensor:
        """`result`, of an encoder; the stand-in gets the dtype of embeddings made before."""
        before = self.dtype
        made = self.result(function, lambda: stand_in() if before is None else stand_in().to(before))
        self.dtype, self.has_gradient = made.dtype, made.requires_grad
        return made

    def outcome(self, device: torch.device) -> Tensor:
        """[1] int64, to be sent: the kind of the last embeddings, or that an attempt failed."""
        number = _DTYPES.index(self.dtype) if self.dtype in _DTYPES else len(_DTYPES)
        return torch.full((1,), _FAILED if self.error is not None else 2 * number + self.has_gradient, device=device)

    def compare(self, outcomes: Tensor) -> None:
        """Raises on every rank, if an attempt failed or embeddings differ in kind, by the outcomes [ranks].

        On an accelerator this does not wait for the outcomes: `raise_if_any` raises later.
        """
        if not self.watched or outcomes.device.type != "cpu":
            return
        kinds = cast("list[int]", outcomes.tolist())
        self._raise_if(_FAILED in kinds)
        if len(set(kinds)) > 1:
            names = [*map(str, _DTYPES), "another dtype"]
            told = ", ".join(f"{names[kind // 2]} with{'' if kind % 2 else 'out'} a gradient" for kind in kinds)
            raise ValueError(
                f"the output of encode differs between the ranks of the group: [{told}]; expected the same on every "
                f"rank"
            )

    def failures(self, device: torch.device) -> Tensor:
        """[] int64, to be summed over the ranks."""
        return torch.full((), int(self.error is not None), device=device)

    def raise_if_any(self, failures: Tensor) -> None:
        """Raises on every rank, if an attempt failed on any."""
        if self.watched:
            self._raise_if(bool(failures > 0))

    def _raise_if(self, failed: bool) -> None:
        if failed:
            group = group_named(cast(str, self.ranks.name))
            raise_for_others(group, self.error, "the step failed on another rank of the group, where it called back")
            raise cast(Exception, self.error)
