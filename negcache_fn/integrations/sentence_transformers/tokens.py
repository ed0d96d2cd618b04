"""Texts in rows of another width: padded on their own side, or cut as the tokenizer would have cut them."""

import torch
from torch import Tensor

from negcache_fn.integrations.sentence_transformers.model import Tokenizing

__all__ = ["placed", "used"]


def used(mask: Tensor) -> tuple[Tensor, Tensor]:
    """[rows] where each text starts and how many tokens it spans, from its attention mask [rows, width]."""
    there = mask != 0
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(there, places, -1).amax(1)
    first = torch.where(there, places, mask.shape[1]).amin(1)
    return torch.where(last < 0, 0, first), torch.where(last < 0, 0, last - first + 1)


def placed(values: Tensor, first: Tensor, length: Tensor, width: int, tokenizing: Tokenizing, padding: float) -> Tensor:
    """[rows, width, ...] from values [rows, any width, ...] along a text that starts at `first` and has a `length`.

    A text that is too long keeps its special tokens and loses others, on the side on which the tokenizer truncates.
    """
    kept = length.clamp(max=width)
    place = torch.arange(width, device=values.device)[None]
    if tokenizing.left:
        place = place - (width - kept)[:, None]
    exists = (place >= 0) & (place < kept[:, None])
    dropped = (length - kept)[:, None]
    behind = place >= (tokenizing.head if tokenizing.cuts_left else (kept - tokenizing.tail)[:, None])
    source = first[:, None] + place + torch.where(behind, dropped, 0)
    source = source.clamp(0, max(values.shape[1] - 1, 0))
    rows = torch.arange(values.shape[0], device=values.device)[:, None]
    exists = exists.view(*exists.shape, *[1] * (values.ndim - 2))
    return torch.where(exists, values[rows, source], torch.full_like(values[:1, :1], padding))
