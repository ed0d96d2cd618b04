"""Sums over the queries of a batch, as logarithms: of values, and of the scores in chosen blocks.

Draws for the batch need no more of the scores than these. Both are operators, opaque to the compiler.
"""

from typing import Any

import torch
from torch import Tensor

from negcache_fn._kernels import dispatch
from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.problem import SCHEMA
from negcache_fn._operators import operator
from negcache_fn._scores.definition import ScoreMatrix

__all__ = ["slot_masses", "sum_of_rows"]

_INFINITY = float("inf")


def slot_masses(matrix: ScoreMatrix, blocks: Tensor, log_weight: Tensor, log_scale: Tensor) -> Tensor:
    """[n * BLOCK]: `sum_of_rows` of the scores in the blocks [n], whose numbers ascend.

    `log_scale` [n] is about the log-sum-exp of each block's result. For a slot that is smaller by 60 or more, a kernel
    may count only the row of the largest score.
    """
    if matrix.transform is not None:
        return sum_of_rows(matrix.of_stretches(blocks, BLOCK).scores(), log_weight)
    return _slot_masses_op(*matrix.problem, blocks, log_weight, log_scale)


def sum_of_rows(values: Tensor, log_weight: Tensor) -> Tensor:
    """[B, n] -> [n]: `(values + log_weight[:, None]).logsumexp(0)`, over rows with a weight above -inf.

    Itself not differentiable.
    """
    return _sum_of_rows_op(values, log_weight)


def _sum_of_rows(values: Tensor, log_weight: Tensor) -> Tensor:
    counts = log_weight > -_INFINITY
    return torch.where(counts[:, None], values + log_weight[:, None], -_INFINITY).logsumexp(0)


def _fake_masses(*arguments: Any) -> Tensor:
    *problem, blocks, _, _ = arguments
    return problem[0].new_empty(blocks.shape[0] * BLOCK)


@operator(
    "slot_masses",
    fake=_fake_masses,
    schema=f"({SCHEMA}, Tensor blocks, Tensor log_weight, Tensor log_scale) -> Tensor",
)
def _slot_masses_op(*arguments: Any) -> Tensor:
    *problem, blocks, log_weight, log_scale = arguments
    problem = dispatch.Problem(*problem)
    in_place = dispatch.reads_in_place(problem)
    chosen = ScoreMatrix.of(problem).of_stretches(blocks, BLOCK, with_embeddings=not in_place)
    found = dispatch.slot_masses(chosen.problem, log_weight, log_scale, blocks if in_place else None)
    return _sum_of_rows(chosen.scores(), log_weight) if found is None else found


def _fake_sum(values: Tensor, log_weight: Tensor) -> Tensor:
    return values.new_empty(values.shape[1])


@operator("sum_of_rows", fake=_fake_sum)
def _sum_of_rows_op(values: Tensor, log_weight: Tensor) -> Tensor:
    found = dispatch.sum_of_rows(values, log_weight)
    return _sum_of_rows(values, log_weight) if found is None else found
