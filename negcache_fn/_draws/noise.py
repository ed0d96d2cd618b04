"""The noise of a draw: which variates each query uses at each level of the tree.

Every variate is a function of the state's seed and step, the row (query and sample), the column and the level. Rows and
columns have the numbers that they have in the whole batch and the whole cache, so the draws do not depend on how the
work is divided.
"""

from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.state import scalar
from negcache_fn._kernels import dispatch
from negcache_fn._options import StepOptions
from negcache_fn.random import gumbel

__all__ = ["AMONG_BLOCKS", "AMONG_GROUPS", "AMONG_SLOTS", "QUAD", "Noise"]

QUAD = 4  # variates that one Philox call gives
# Levels, which must not share noise.
AMONG_GROUPS, AMONG_BLOCKS, AMONG_SLOTS, _AMONG_QUERIES = 0, 1, 2, 3


class Noise(NamedTuple):
    """The rows of noise by which the queries choose, and how many places each row chooses."""

    seed: Tensor
    step: Tensor
    query: Tensor  # [B] the queries that choose, in ascending order: all, B of B, or one of each so many
    row: Tensor  # [B, k] row of the noise matrix, query x sample; [B, 1] if it chooses several places
    distinct: int  # the number of different places that a row chooses, those of its largest perturbed scores

    @classmethod
    def of(cls, state: TensorDictBase, first: int, queries: int, drawing: int, options: StepOptions) -> "Noise":
        """Of the queries `first ...` of all ranks' queries, of which `drawing` draw: one of each as many in a row.

        Without replacement one place more is chosen than drawn.
        """
        samples, replacement = options.samples, options.replacement
        seed, step = scalar(state, "seed"), scalar(state, "step")
        query = torch.arange(queries, device=seed.device)
        if drawing < queries:
            variates = gumbel(seed, step, query + first, torch.zeros_like(seed), level=_AMONG_QUERIES)[:, 0]
            place = variates.view(drawing, queries // drawing).argmax(1, keepdim=True)
            query = query.view(drawing, queries // drawing).gather(1, place)[:, 0]
        each = samples if replacement else 1
        row = (query + first)[:, None] * each + torch.arange(each, device=seed.device)
        return cls(seed, step, query, row, 1 if replacement else samples + 1)

    def columns(self, quad: Tensor, level: int) -> Tensor:
        """[B, m, 4 n] variates of the columns in the quads [..., n] (broadcast against [B, k, n])."""
        row = self.row[..., None]
        found = dispatch.gumbel(self.seed, self.step, row, quad, level)
        if found is None:
            found = gumbel(self.seed, self.step, row, quad, level=level)
        return found.flatten(-2)

    def of_groups(self, first: int | Tensor, count: int) -> Tensor:
        """[B, k, count] variates of the groups `first ...`, which need not be the first of a quad."""
        if isinstance(first, int) and first % QUAD == 0:
            quads = torch.arange(-(-count // QUAD), device=self.row.device) + first // QUAD
            return self.columns(quads, AMONG_GROUPS)[..., :count]
        quads = torch.arange(-(-count // QUAD) + 1, device=self.row.device) + first // QUAD
        columns = torch.arange(count, device=self.row.device) + first % QUAD
        return self.columns(quads, AMONG_GROUPS).index_select(-1, columns)
