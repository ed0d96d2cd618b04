"""The inputs that all methods share: unit vectors, and a cache that is full."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import normalize

import negcache_fn
from examples.benchmarks.shapes import Shape
from negcache_fn._codec import columns_of, encode

__all__ = ["SCALE", "TOKENS", "Problem", "fill_"]

SCALE = 20.0
TOKENS = 8
"""Width of the documents' features."""
_SLAB_BYTES = 2**20


class Problem:
    """One batch and, made on demand and then kept, caches of the same documents.

    Nothing larger than a slab is made besides, so that the peak memory of a process is not that of making its inputs.
    """

    def __init__(self, shape: Shape, device: str = "cpu") -> None:
        self.shape = shape
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(0)
        self._states: dict[torch.dtype, TensorDictBase] = {}
        self.queries = self._unit_rows(shape.batch).requires_grad_()
        self.encoded = self._unit_rows(shape.batch * (1 + shape.samples)).requires_grad_()
        """What the encoder gives: the batch's documents, then the drawn ones."""
        self.features = {"tokens": torch.ones(shape.batch, TOKENS, dtype=torch.int64, device=self.device)}
        self.ids = torch.arange(shape.batch, device=self.device)

    def state(self, dtype: torch.dtype = torch.float32) -> TensorDictBase:
        """A full cache: every slot live, of another age than most, with an id."""
        if dtype not in self._states:
            self._states[dtype] = self._full_cache(dtype)
        return self._states[dtype]

    def embeddings(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[C, D]: those of the cache."""
        return self.state(dtype)["items", "embedding"]

    def next_batch(self) -> None:
        """Clears the gradients and gives the batch ids that are not in the cache yet."""
        self.queries.grad = self.encoded.grad = None
        self.ids += self.shape.batch

    def _full_cache(self, dtype: torch.dtype) -> TensorDictBase:
        state = negcache_fn.init_cache(
            self.shape.capacity, self.shape.dim, self.features, embedding_dtype=dtype, device=self.device
        )
        fill_(state, self.shape.batch, self._generator)
        return state

    def _unit_rows(self, rows: int) -> Tensor:
        return _unit_rows(rows, self.shape.dim, self._generator)


def fill_(state: TensorDictBase, batch: int, generator: torch.Generator) -> None:
    """Puts a document of random direction into every slot, as batches of this size would have done."""
    items = state["items"]
    capacity, dim = items["embedding"].shape
    dtype = items["embedding"].dtype
    columns = {name: items[name] for name in columns_of(dtype)}
    for rows in torch.arange(capacity).split(max(1, _SLAB_BYTES // (4 * dim))):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        for name, values in encode(_unit_rows(stop - start, dim, generator), dtype).items():
            columns[name][start:stop] = values
    items["features", "tokens"].fill_(1)
    torch.arange(-capacity, 0, out=items["id"]).add_(2**40)
    torch.arange(capacity, out=items["embedded_at"]).div_(batch, rounding_mode="floor")
    items["inserted_at"].copy_(items["embedded_at"])
    items["log_weight"].fill_(0.0)
    state["step"].fill_(capacity // batch + 1)


def _unit_rows(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    return normalize(torch.randn(rows, dim, generator=generator, device=generator.device))
