"""The summary of transformed scores, with the queries' gradient computed in the pass itself.

The embeddings may be overwritten before the backward pass (`step_`), which therefore must not need them. It uses the
gradient `sum_j p_ij t'(x_ij) e_j` [B, D] of the log-sum-exp in each query, accumulated relative to the largest score so
far.
"""

import torch

from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._scores.definition import ScoreMatrix
from negcache_fn._scores.stream import Summary, blocks_and_mean, in_stretches

__all__ = ["summarize_transformed"]


def summarize_transformed(matrix: ScoreMatrix, length: int = BLOCK) -> Summary:
    """`summarize` of a matrix with a transform; its parameters, if it has any, are constants here."""
    with torch.no_grad():  # the gradient is added below
        blocks, log_normalizer, mean = blocks_and_mean(matrix)
    if torch.is_grad_enabled() and matrix.queries.requires_grad:
        # The value of the sum is 0, its gradient in the queries their mean.
        log_normalizer = log_normalizer + ((matrix.queries - matrix.queries.detach()) * mean).sum(-1)
    return Summary(in_stretches(blocks, length), log_normalizer)
