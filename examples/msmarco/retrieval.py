"""Exact search: the passages encoded in chunks, scored block by block, and only each query's best kept.

No index and no matrix of all scores: memory is that of a block, and every passage is encoded once for all queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from examples.msmarco.model import DualEncoder, Tower
from examples.msmarco.texts import Texts

__all__ = ["autocast", "encode", "encoded_blocks", "search"]

_BLOCK = 16_384
_QUERIES_AT_ONCE = 1024
_LAST_ROW = 2**32 - 1


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Where the encoders run: in half precision if that is asked for."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@torch.no_grad()
def encode(tower: Tower, texts: Texts, rows: NDArray[np.int64], *, dtype: torch.dtype, batch_size: int = 256) -> Tensor:
    """[len(rows), D] float32 embeddings, on the tower's device. Texts of similar length are encoded together."""
    device = next(tower.parameters()).device
    order = np.argsort(-texts.lengths(rows), kind="stable")
    parts = np.split(order, range(batch_size, len(order), batch_size))
    with autocast(device, dtype):
        encoded = [tower({"input_ids": texts.padded(rows[part], tower.padding).to(device)}) for part in parts]
    return torch.cat(encoded)[torch.from_numpy(np.argsort(order)).to(device)]


def encoded_blocks(
    model: DualEncoder, passages: Texts, rows: NDArray[np.int64], *, dtype: torch.dtype, progress: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows [n] and embeddings [n, D] of all passages asked for, a block at a time."""
    with tqdm(total=len(rows), desc="encode", unit="passage", unit_scale=True, disable=not progress) as bar:
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            embeddings = encode(model.passage_tower, passages, block, dtype=dtype)
            yield torch.from_numpy(block).to(embeddings.device), embeddings
            bar.update(len(block))


@torch.no_grad()
def search(queries: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], depth: int) -> tuple[Tensor, Tensor]:
    """Scores and rows [Q, depth] of the best passages, the best first; of equal scores the lower row.

    Where there are fewer passages, scores are -inf and rows -1.

    Args:
        queries: [Q, D] float32 embeddings.
        blocks: rows [n] and embeddings [n, D] of the passages, each once, in any order.
        depth: how many to keep.
    """
    nothing = _packed(torch.full((1, 1), -torch.inf), torch.tensor([_LAST_ROW])).to(queries.device)
    best = nothing.expand(len(queries), depth).contiguous()
    for rows, embeddings in blocks:
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            some = slice(start, start + _QUERIES_AT_ONCE)
            found = _packed(queries[some] @ embeddings.T, rows)
            best[some] = torch.cat([best[some], found], 1).topk(depth).values
    scores, rows = _unpacked(best)
    return scores, torch.where(scores == -torch.inf, -1, rows)


def _packed(scores: Tensor, rows: Tensor) -> Tensor:
    """One int64 of a float32 score and a row, which orders by score and then by row, the lower the better."""
    bits = (scores + 0.0).view(torch.int32)  # the sum makes 0 of -0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers like the floats
    return (ordered.long() << 32) + (_LAST_ROW - rows)


def _unpacked(packed: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (packed >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _LAST_ROW - (packed & _LAST_ROW)
