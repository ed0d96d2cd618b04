"""Features that hold a varying number of entries for each document, one document after the other.

The rules are those by which sentence-transformers cuts such batches into mini-batches (`base/losses/gradcache.py`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["NUMBERS", "counts_of_pieces", "is_flat", "joined", "row_count", "split"]

# Grids of patches, the feature with the patches, and the number of grids of each document.
_GRIDS = (
    ("image_grid_thw", "pixel_values", "num_images_per_sample"),
    ("video_grid_thw", "pixel_values_videos", "num_videos_per_sample"),
)
NUMBERS = tuple(number for _, _, number in _GRIDS)
_OF_IMAGES = ("pixel_values", "image_position_ids", "image_sizes")
_PADDED_BY_DOCUMENT = ("pixel_attention_mask", "aspect_ratio_ids")


def is_flat(column: Mapping[str, Any]) -> bool:
    """Whether all tokens are in one row, with the offset of each document."""
    return "offsets" in column and column["input_ids"].ndim == 1


def row_count(column: Mapping[str, Any]) -> int:
    """How many documents a column has."""
    if is_flat(column):
        return column["offsets"].shape[0]
    for key in ("input_ids", "attention_mask", "num_images_per_sample", "num_videos_per_sample"):
        if isinstance(column.get(key), Tensor) and column[key].ndim > 0:
            return column[key].shape[0]
    tensors = [value for key, value in column.items() if isinstance(value, Tensor) and key != "prompt_length"]
    counts = [value.shape[0] for value in tensors if value.ndim > 0]
    if not counts:
        raise ValueError(f"the features of a document are {sorted(column)}; expected a tensor at least")
    return counts[0]


def counts_of_pieces(column: Mapping[str, Any]) -> dict[str, Tensor]:
    """[rows] how many entries each document has, of every feature that is in pieces."""
    if is_flat(column):
        offsets, total = column["offsets"], column["input_ids"].shape[0]
        return {"input_ids": torch.diff(offsets, append=offsets.new_full((1,), total))}
    rows, counts = row_count(column), dict[str, Tensor]()
    for grid, values, number in _GRIDS:
        if grid not in column or values not in column:
            continue
        grids = column[grid]
        of_each = column[number] if number in column else grids.new_ones(rows)
        patches = grids.prod(1)
        if int(of_each.sum()) == grids.shape[0] and int(patches.sum()) == column[values].shape[0]:
            ends = torch.cat([patches.new_zeros(1), patches.cumsum(0)])[of_each.cumsum(0)]
            counts |= {grid: of_each, values: torch.diff(ends, prepend=ends.new_zeros(1))}
    images = column.get("num_images_per_sample")
    if images is not None and "pixel_values" not in counts and not any(key in column for key in _PADDED_BY_DOCUMENT):
        total = int(images.sum())
        for key in _OF_IMAGES:
            if key in column and column[key].shape[0] == total:
                counts[key] = images
    return counts


def split(values: Tensor, counts: Tensor, kept: Tensor) -> Tensor:
    """[total, ...] -> [rows, most, ...]: the first `kept` [rows] entries of each document, of `counts`, then zeros."""
    most = int(kept.max())
    start = counts.cumsum(0) - counts
    place = torch.arange(most, device=values.device)
    index = (start[:, None] + place).clamp(max=max(values.shape[0] - 1, 0))
    if values.shape[0] == 0:
        return values.new_zeros((counts.shape[0], most, *values.shape[1:]))
    exists = (place < kept[:, None]).view(*index.shape, *[1] * (values.ndim - 1))
    return torch.where(exists, values[index], torch.zeros_like(values[:1]))


def joined(rows: Tensor, counts: Tensor) -> Tensor:
    """[rows, most, ...] -> [total, ...]: the opposite."""
    return rows[torch.arange(rows.shape[1], device=rows.device) < counts[:, None]]
