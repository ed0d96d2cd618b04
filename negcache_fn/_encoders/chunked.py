"""Encoding in chunks: the memory of one chunk's activations for the price of a second forward pass.

Each chunk is encoded under activation checkpointing: its backward pass computes the activations again, with the same
random numbers, so that dropout drops the same. All chunks are one graph: gradients are those of encoding in one piece,
up to rounding, and a wrapper for data-parallel training synchronises them once.

Source of the idea: Gao, Zhang, Han, Callan, *Scaling deep contrastive learning batch size under memory limited setup*,
RepL4NLP 2021 (GradCache).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType] - untyped in torch

from negcache_fn._checks import check_encoder, check_size
from negcache_fn._features import Features, copied, leaves, map_features

__all__ = ["Chunked", "chunked"]


def chunked(encode: Callable[[Any], Tensor], size: int) -> "Chunked":
    """An encoder that works on `size` documents at a time and keeps no activations of them.

    Equivalent to `encode(features)`, if rows do not depend on each other.

    Args:
        encode: the encoder, a module or a function of features [N, ...] to [N, D]. An encoder that depends on the other
            rows (BatchNorm in training) sees the rows of its chunk.
        size: rows of a chunk.

    Returns:
        A module whose parameters are those of `encode`, if it is one. Wrap *it* for data-parallel training:
        `DistributedDataParallel(chunked(encoder, 32))`.

    Raises:
        ValueError, TypeError: a `size` that is not a positive integer; an `encode` that cannot be called, or is itself
            wrapped by DistributedDataParallel.

    Examples:
        >>> encoder = torch.nn.Linear(3, 4)
        >>> features = torch.randn(10, 3)
        >>> bool((chunked(encoder, 4)(features) - encoder(features)).abs().max() < 1e-6)
        True

    Reference: Gao et al., RepL4NLP 2021, section 3.
    """
    check_size("size", size)
    check_encoder(encode)
    if isinstance(encode, DistributedDataParallel):
        raise TypeError(
            "encode is a DistributedDataParallel, which must not be called again in the backward pass; "
            "expected the encoder in it: DistributedDataParallel(chunked(encoder, size))"
        )
    return Chunked(encode, size)


class Chunked(nn.Module):
    """The module that `chunked` returns."""

    def __init__(self, encode: Callable[[Any], Tensor], size: int) -> None:
        super().__init__()
        self.encode = encode
        self.size = size

    def forward(self, features: Features) -> Tensor:
        """[N, ...] -> [N, D]."""
        _, leaf = next(leaves(features))
        rows = leaf.shape[0]
        if rows <= self.size or not torch.is_grad_enabled():
            parts = [self._encode_copy(part) for part in self._chunks(features, rows)]
        else:
            parts = [
                cast(Tensor, checkpoint(self._encode_copy, part, use_reentrant=False))
                for part in self._chunks(features, rows)
            ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _encode_copy(self, part: Features) -> Tensor:
        # An encoder may write into its features, and the backward pass needs them as they were.
        return self.encode(copied(part))

    def _chunks(self, features: Features, rows: int) -> list[Features]:
        def part(start: int) -> Features:
            def cut(leaf: Tensor) -> Tensor:
                return leaf[start : start + self.size]

            return map_features(cut, features)

        return [part(start) for start in range(0, max(rows, 1), self.size)]
