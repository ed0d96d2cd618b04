"""Sums over the queries of a batch, as logarithms: of values, and of the scores in chosen blocks and groups.

Draws for the batch need no more of the scores than these. All are operators, opaque to the compiler; what is scored
again is so part by part, in one operator too, because a compiler would make a graph of every part.
"""

from typing import Any

import torch
from torch import Tensor

from negcache_fn._kernels import dispatch
from negcache_fn._kernels.blocks import BLOCK, GROUP
from negcache_fn._kernels.problem import SCHEMA
from negcache_fn._operators import operator
from negcache_fn._ranks.order import sequenced_after
from negcache_fn._scores.definition import ScoreMatrix
from negcache_fn._scores.stream import reduce_blocks

__all__ = ["block_masses", "slot_masses", "sum_of_rows"]

_INFINITY = float("inf")
_SLAB = 2**22  # scores, or numbers of embeddings, of the slots scored again at a time


def block_masses(matrix: ScoreMatrix, groups: Tensor, log_weight: Tensor) -> Tensor:
    """[n * GROUP / BLOCK]: `sum_of_rows` of the log-sum-exp of the blocks in the groups [n], whose numbers ascend."""
    if matrix.transform is not None:
        return _block_masses(matrix, groups, log_weight)
    return _block_masses_op(*matrix.problem, groups, log_weight)


def slot_masses(matrix: ScoreMatrix, blocks: Tensor, log_weight: Tensor, log_scale: Tensor) -> Tensor:
    """[n * BLOCK]: `sum_of_rows` of the scores in the blocks [n], whose numbers ascend.

    `log_scale` [n] is about the log-sum-exp of each block's result. For a slot that is smaller by 60 or more, a kernel
    may count only the row of the largest score.
    """
    if matrix.transform is None:
        return _slot_masses_op(*matrix.problem, blocks, log_weight, log_scale)
    parts = torch.split(blocks, _at_a_time(matrix, BLOCK))
    return torch.cat([sum_of_rows(matrix.of_stretches(some, BLOCK).scores(), log_weight) for some in parts])


def sum_of_rows(values: Tensor, log_weight: Tensor) -> Tensor:
    """[B, n] -> [n]: `(values + log_weight[:, None]).logsumexp(0)`, over rows with a weight above -inf.

    Itself not differentiable.
    """
    return _sum_of_rows_op(values, log_weight)


def _sum_of_rows(values: Tensor, log_weight: Tensor) -> Tensor:
    counts = log_weight > -_INFINITY
    return torch.where(counts[:, None], values + log_weight[:, None], -_INFINITY).logsumexp(0)


def _at_a_time(matrix: ScoreMatrix, length: int) -> int:
    """How many stretches to score again at once."""
    return _SLAB // max(matrix.queries.shape) // length + 1  # not one stretch less than M + 1 of a round M


def _block_masses(matrix: ScoreMatrix, groups: Tensor, log_weight: Tensor) -> Tensor:
    parts: list[Tensor] = []
    for some in torch.split(groups, _at_a_time(matrix, GROUP)):
        # Otherwise the compiler may copy the embeddings of all parts at once.
        some = sequenced_after(some, parts[-1]) if parts else some
        parts.append(sum_of_rows(reduce_blocks(matrix.of_stretches(some, GROUP), "logsumexp"), log_weight))
    return torch.cat(parts)


def _fake_of_blocks(*arguments: Any) -> Tensor:
    *problem, groups, _ = arguments
    return problem[0].new_empty(groups.shape[0] * (GROUP // BLOCK))


@operator("block_masses", fake=_fake_of_blocks, schema=f"({SCHEMA}, Tensor groups, Tensor log_weight) -> Tensor")
def _block_masses_op(*arguments: Any) -> Tensor:
    *problem, groups, log_weight = arguments
    return _block_masses(ScoreMatrix.of(dispatch.Problem(*problem)), groups, log_weight)


def _fake_of_slots(*arguments: Any) -> Tensor:
    *problem, blocks, _, _ = arguments
    return problem[0].new_empty(blocks.shape[0] * BLOCK)


@operator(
    "slot_masses",
    fake=_fake_of_slots,
    schema=f"({SCHEMA}, Tensor blocks, Tensor log_weight, Tensor log_scale) -> Tensor",
)
def _slot_masses_op(*arguments: Any) -> Tensor:
    *problem, blocks, log_weight, log_scale = arguments
    problem = dispatch.Problem(*problem)
    in_place, matrix = dispatch.reads_in_place(problem), ScoreMatrix.of(problem)
    parts: list[Tensor] = []
    most = _at_a_time(matrix, BLOCK)
    for some, scale in zip(torch.split(blocks, most), torch.split(log_scale, most), strict=True):
        chosen = matrix.of_stretches(some, BLOCK, with_embeddings=not in_place)
        found = dispatch.slot_masses(chosen.problem, log_weight, scale, some if in_place else None)
        parts.append(_sum_of_rows(chosen.scores(), log_weight) if found is None else found)
    return torch.cat(parts)


def _fake_sum(values: Tensor, log_weight: Tensor) -> Tensor:
    return values.new_empty(values.shape[1])


@operator("sum_of_rows", fake=_fake_sum)
def _sum_of_rows_op(values: Tensor, log_weight: Tensor) -> Tensor:
    found = dispatch.sum_of_rows(values, log_weight)
    return _sum_of_rows(values, log_weight) if found is None else found
