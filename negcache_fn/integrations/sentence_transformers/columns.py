"""The features of a column as a collator returns them, each a tensor of some kind or a constant.

- *tokens*: tensors [rows, width, ...] along a text, as wide as the longest of them: `input_ids`, `attention_mask`;
- *pieces*: tensors [total, ...] that hold so many entries for each document, one document after the other: the tokens
  of a `StaticEmbedding` with their `offsets`, the patches or images of a vision-language model;
- *rows*: all other tensors, [rows, ...], of one shape in all batches: `pixel_values`, `sentence_lengths`;
- constants of the column: `task`, `modality`, `prompt_length`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from negcache_fn.integrations.sentence_transformers.pieces import counts_of_pieces, is_flat, row_count

__all__ = ["ALONG_A_TEXT", "IDS", "MASK", "PROMPT", "Leaf", "constants_of", "leaves_of", "own_features"]

MASK = "attention_mask"
IDS = "input_ids"
PROMPT = "prompt_length"  # one number for all rows, in whatever form
ALONG_A_TEXT = (IDS, MASK, "token_type_ids", "mm_token_type_ids", "position_ids", "special_tokens_mask")
_CONSTANTS = (bool, int, float, str, type(None))
_FLATTENED = "cu_seq_lens_q"


class Leaf(NamedTuple):
    """A tensor that the model takes."""

    kind: Literal["tokens", "pieces", "rows"]
    dtype: torch.dtype
    shape: tuple[int, ...]  # of a token, a piece or a row


def own_features(columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The columns, each without the features of another one.

    The trainer assigns all names that begin with "negative_" to "negative", even those of "negative_1".
    """
    cleaned: list[dict[str, Any]] = []
    for column in columns:
        foreign = {
            key[: -len(name)]
            for other in columns
            if other is not column
            for name, value in other.items()
            if isinstance(value, Tensor)
            for key, mine in column.items()
            if mine is value and key != name and key.endswith(f"_{name}")
        }
        cleaned.append({key: value for key, value in column.items() if not key.startswith(tuple(foreign))})
    return cleaned


def leaves_of(column: Mapping[str, Any]) -> dict[str, Leaf]:
    """The tensors of the documents; ValueError for one without an entry for each of them."""
    if _FLATTENED in column:
        raise ValueError(
            f"the features have {_FLATTENED}: the texts are flattened into one row; expected a row for each, from a "
            f"model with model[0].unpad_inputs = False"
        )
    rows, pieces = row_count(column), counts_of_pieces(column)
    mask = column.get(MASK)
    width = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else None
    leaves: dict[str, Leaf] = {}
    for key, value in column.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or key == PROMPT:
            continue
        if key == "offsets" and is_flat(column):
            continue
        if value.layout != torch.strided or value.requires_grad:
            kind = "sparse" if value.layout != torch.strided else "an output of the model"
            raise ValueError(f"{key} is {kind}; expected a dense tensor, as the model's preprocess gives it")
        if key in pieces:
            leaves[key] = Leaf("pieces", value.dtype, tuple(value.shape[1:]))
        elif value.shape[0] != rows:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)} in a column of {rows} documents; expected {rows} rows, one for "
                f"each document: a cache only keeps tensors with an entry for each document"
            )
        elif width is not None and value.ndim >= 2 and value.shape[1] == width and _is_along_a_text(key, value, column):
            leaves[key] = Leaf("tokens", value.dtype, tuple(value.shape[2:]))
        else:
            leaves[key] = Leaf("rows", value.dtype, tuple(value.shape[1:]))
    if not leaves:
        raise ValueError(f"the features of a document are {sorted(column)}; expected a tensor at least")
    return leaves


def _is_along_a_text(key: str, value: Tensor, column: Mapping[str, Any]) -> bool:
    if key in ALONG_A_TEXT:
        return True
    if key.startswith(("image", "video", "pixel", "aspect_ratio")):
        return False
    return value.ndim == 2 and not value.is_floating_point() if IDS in column else value.is_floating_point()


def constants_of(column: Mapping[str, Any]) -> dict[str, Any]:
    """The values shared by all of its documents."""
    constants: dict[str, Any] = {}
    for key, value in column.items():
        if isinstance(value, Tensor):
            if value.ndim == 0 or key == PROMPT:
                constants[key] = value.flatten()[0].item()  # one value for all rows, as the model reads it
        elif all(isinstance(part, _CONSTANTS) for part in _parts(value)):
            constants[key] = value
        else:
            raise ValueError(
                f"{key} is a {type(value).__name__}; expected a tensor with a row for each document, or one number or "
                f"text for all of them"
            )
    return constants


def _parts(value: Any) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)
