"""The noise of a draw: the variates of each level of the tree.

Every variate is a function of the state's seed and step, the row (query and sample, or the one row of the batch), the
column and the level. Rows and columns are numbered over the whole batch and the whole cache, so the draws do not depend
on how the work is divided.
"""

from typing import NamedTuple, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.state import scalar
from negcache_fn._kernels import dispatch
from negcache_fn._operators import operator
from negcache_fn.random import gumbel

__all__ = ["AMONG_BLOCKS", "AMONG_GROUPS", "AMONG_SLOTS", "QUAD", "Noise"]

QUAD = 4  # variates that one Philox call gives
AMONG_GROUPS, AMONG_BLOCKS, AMONG_SLOTS = 0, 1, 2  # levels, which must not share noise


class Noise(NamedTuple):
    """The rows of noise by which documents are chosen."""

    seed: Tensor
    step: Tensor
    row: Tensor  # [B, k] row of the noise matrix: query x sample; [1, 1] of a draw for the batch

    @classmethod
    def of_queries(cls, state: TensorDictBase, first: int, queries: int, samples: int) -> "Noise":
        """Of the queries `first ...` of all ranks' queries."""
        seed, step = scalar(state, "seed"), scalar(state, "step")
        rows = torch.arange(first * samples, (first + queries) * samples, device=seed.device)
        return cls(seed, step, rows.view(queries, samples))

    @classmethod
    def of_batch(cls, state: TensorDictBase) -> "Noise":
        """One row for all."""
        return cls.of_queries(state, 0, 1, 1)

    def columns(self, quad: Tensor, level: int) -> Tensor:
        """[B, m, 4 n] variates of the columns in the quads [..., n] (broadcast against [B, k, n])."""
        row, quad = cast("tuple[Tensor, Tensor]", torch.broadcast_tensors(self.row[..., None], quad))
        return _gumbel_op(self.seed, self.step, row, quad, level).flatten(-2)

    def of_groups(self, first: int | Tensor, count: int) -> Tensor:
        """[B, k, count] variates of the groups `first ...`, which need not be the first of a quad."""
        if isinstance(first, int) and first % QUAD == 0:
            quads = torch.arange(-(-count // QUAD), device=self.row.device) + first // QUAD
            return self.columns(quads, AMONG_GROUPS)[..., :count]
        quads = torch.arange(-(-count // QUAD) + 1, device=self.row.device) + first // QUAD
        columns = torch.arange(count, device=self.row.device) + first % QUAD
        return self.columns(quads, AMONG_GROUPS).index_select(-1, columns)

    def of_slots(self, slots: Tensor) -> Tensor:
        """[B, k, n] variates of the slots [B, n] that are chosen among without a tree."""
        column = slots.clamp(min=0)[:, None, :]
        variates = self.columns(column // QUAD, AMONG_SLOTS)
        lane = torch.arange(slots.shape[1], device=slots.device) * QUAD + column % QUAD
        return variates.gather(-1, lane.expand(-1, variates.shape[1], -1))

    def of_children(self, parent: Tensor, children: int, level: int) -> Tensor:
        """[B, k, children] variates of the children of each chosen place [B, k]."""
        quads = children // QUAD
        return self.columns(parent[..., None] * quads + torch.arange(quads, device=parent.device), level)


def _fake_gumbel(seed: Tensor, step: Tensor, row: Tensor, quad: Tensor, level: int) -> Tensor:
    return torch.empty(*row.shape, 4, dtype=torch.float32, device=row.device)


@operator("gumbel", fake=_fake_gumbel)
def _gumbel_op(seed: Tensor, step: Tensor, row: Tensor, quad: Tensor, level: int) -> Tensor:
    """`gumbel`, by a kernel if there is one: inline it is 130 operations, most of the cost of a small step."""
    found = dispatch.gumbel(seed, step, row, quad, level)
    return gumbel(seed, step, row, quad, level=level) if found is None else found
