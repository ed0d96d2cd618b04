"""The summary of transformed scores, with the queries' gradient computed in the pass itself.

The embeddings may be overwritten before the backward pass (`step_`), which therefore must not need them: what it takes
is the gradient `sum_j p_ij t'(x_ij) e_j` [B, D] of the log-sum-exp in each query, accumulated relative to the largest
score so far.
"""

import torch
from torch import Tensor

from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._scores.definition import ScoreMatrix
from negcache_fn._scores.stream import Summary

__all__ = ["summarize_transformed"]

_CHUNK = 2048  # slots scored at a time; a multiple of BLOCK
_INFINITY = float("inf")


def summarize_transformed(matrix: ScoreMatrix) -> Summary:
    """`summarize` of a matrix with a transform; its parameters, if it has any, are constants here."""
    with torch.no_grad():  # the gradient is put in below
        blocks, mean = _blocks_and_mean(matrix)
        log_normalizer = blocks.logsumexp(1)
    if torch.is_grad_enabled() and matrix.queries.requires_grad:
        # The value of the sum is 0, its gradient in the queries their mean.
        log_normalizer = log_normalizer + ((matrix.queries - matrix.queries.detach()) * mean).sum(-1)
    return Summary(blocks, log_normalizer)


def _blocks_and_mean(matrix: ScoreMatrix) -> tuple[Tensor, Tensor]:
    """[B, ceil(C / BLOCK)] log-sum-exp of the blocks, [B, D] gradients of the rows' log-sum-exp."""
    parts: list[Tensor] = []
    total = torch.zeros_like(matrix.queries)
    log_scale = torch.full_like(total[:, 0], -_INFINITY)  # `total` is in units of exp(log_scale)
    for start in range(0, matrix.embeddings.shape[0], _CHUNK):
        chunk = matrix.of_slots(start, start + _CHUNK)
        scores = chunk.scores()
        parts.append(scores.view(scores.shape[0], -1, BLOCK).logsumexp(-1))
        larger = torch.maximum(log_scale, parts[-1].amax(-1))
        # While a row is empty, any finite stand-in gives its slots the weight 0.
        shift = larger.masked_fill(larger == -_INFINITY, 0.0)
        weights = (scores[:, : chunk.bias.shape[0]] - shift[:, None]).exp() * chunk.slopes()
        total = total * (log_scale - shift).exp()[:, None] + chunk.pull_back(weights)
        log_scale = larger
    blocks = torch.cat(parts, dim=1)
    log_normalizer = blocks.logsumexp(-1)
    left = torch.where(log_normalizer > -_INFINITY, log_scale - log_normalizer, 0.0)
    return blocks, total * left.exp()[:, None]
