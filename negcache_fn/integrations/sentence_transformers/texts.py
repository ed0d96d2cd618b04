"""Tokenised texts as rows that a cache can keep, and back as what a model of sentence-transformers takes.

A collator gives each column of a batch as a dictionary: tensors of one row per text, as wide as the longest of them,
and constants of the column (`prompt_length`, `modality`, `task`). A cache keeps the tensors as rows of one width, token
ids as int32 and the attention mask as bool; the constants must be the same in every batch.

Models with a `StaticEmbedding` take one long row of tokens and the offset of each text in it; those become rows too.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Rows", "Texts", "content_ids"]

Rows = dict[str, Tensor]

_MASK = "attention_mask"
_PROMPT = "prompt_length"  # one number for all rows, in whatever form
# Constants of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), as signed integers.
_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_GOLDEN = -0x61C8864680B583EB


class Texts(NamedTuple):
    """How the texts of some columns become rows, and rows a batch."""

    width: int  # of the rows, in tokens
    left: bool  # whether padding comes first
    padding: int  # token id
    dtypes: dict[str, torch.dtype]  # of the tensors that the model takes
    constants: dict[str, Any]
    flat: bool  # whether texts come as one row with offsets

    @classmethod
    def of(cls, column: Mapping[str, Any], *, width: int | None, left: bool, padding: int) -> "Texts":
        """As in this column, whose width is taken where none is given."""
        flat = "offsets" in column
        tensors = (
            _unflattened(column) if flat else {key: value for key, value in column.items() if _is_rows(key, value)}
        )
        if "cu_seq_lens_q" in column or "input_ids" not in tensors or _MASK not in tensors:
            raise ValueError(
                f"the features of a text are {sorted(column)}; expected input_ids and attention_mask with a row for "
                f"each text, or input_ids and offsets (not flattened for attention without padding)"
            )
        room = tensors[_MASK].shape[1] if width is None else width
        return cls(room, left, padding, {key: value.dtype for key, value in tensors.items()}, _constants(column), flat)

    def rows(self, columns: Sequence[Mapping[str, Any]]) -> Rows:
        """[N, width] each, column after column."""
        parts: list[Rows] = []
        for column in columns:
            tensors = _unflattened(column) if self.flat and "offsets" in column else column
            self._check(column, tensors)
            parts.append({key: self._row(key, tensors[key]) for key in self.dtypes})
        return {key: torch.cat([part[key] for part in parts]) for key in self.dtypes}

    def batch(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the model takes, without the padding that all rows share. The tensors are new: modules may edit them."""
        mask = rows[_MASK]
        if self.flat:
            lengths = mask.sum(1)
            return {"input_ids": rows["input_ids"][mask].long(), "offsets": lengths.cumsum(0) - lengths}
        used = mask.any(0).nonzero()
        first, last = (int(used[0]), int(used[-1])) if used.numel() else (0, 0)
        kept = slice(first, None) if self.left else slice(0, last + 1)
        trimmed = {key: value[:, kept].to(self.dtypes[key], copy=True) for key, value in rows.items()}
        return {**trimmed, **self.constants}

    def _row(self, key: str, values: Tensor) -> Tensor:
        if key == _MASK:
            values = values.bool()
        elif values.dtype == torch.int64:
            values = values.int()
        missing = self.width - values.shape[1]
        if missing < 0:
            if not self.flat:  # only a tokenizer can truncate to a text that ends as it should
                raise ValueError(
                    f"a text has {values.shape[1]} tokens; expected at most {self.width}: give the loss a larger "
                    f"max_length, or let the model truncate, by its max_seq_length"
                )
            return values[:, : self.width]
        return pad(values, (missing, 0) if self.left else (0, missing), value=self.padding if key == "input_ids" else 0)

    def _check(self, column: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        found = {key for key, value in tensors.items() if _is_rows(key, value)}
        if found != self.dtypes.keys():
            raise ValueError(f"a column has the features {sorted(found)}; expected {sorted(self.dtypes)}, as before")
        constants = _constants(column)
        for key in sorted(constants.keys() | self.constants.keys()):
            value, expected = constants.get(key), self.constants.get(key)
            if not _equal(value, expected):
                raise ValueError(
                    f"a column of documents has {key}={value!r}; expected {expected!r}, as in all that are cached: "
                    f"give each data set a loss of its own, and each column of documents the same prompt"
                )


def content_ids(rows: Mapping[str, Tensor]) -> Tensor:
    """[N] int64: an id of each text, a function of its tokens; different texts have different ones, but for 2^-63."""
    mask = rows[_MASK].long()
    places = mask.cumsum(1)
    mixed = _mixed(rows["input_ids"].long() * _GOLDEN + places * _FACTORS[0])
    return _mixed((mixed * mask).sum(1) + mask.sum(1)) & torch.iinfo(torch.int64).max


def _mixed(values: Tensor) -> Tensor:
    """The finaliser of splitmix64."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        values = (values ^ _shifted(values, shift)) * factor
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    return (values >> bits) & ((1 << (64 - bits)) - 1)  # zeros come in from the left


def _is_rows(key: str, value: Any) -> bool:
    """Whether it is of the texts' tokens: a model leaves its outputs among the features, too."""
    return isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point() and key != _PROMPT


def _constants(column: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in column.items() if key == _PROMPT or isinstance(value, (int, str))}


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.flatten()[0].item() == other.flatten()[0].item()  # one value for all rows, as the model reads it
    return bool(value == other)


def _unflattened(column: Mapping[str, Any]) -> Rows:
    """Tokens and offsets as rows."""
    tokens, offsets = column["input_ids"], column["offsets"]
    lengths = torch.diff(offsets, append=offsets.new_full((1,), tokens.shape[0]))
    width = max(int(lengths.max()), 1)
    mask = torch.arange(width, device=tokens.device) < lengths[:, None]
    rows = tokens.new_zeros(mask.shape)
    rows[mask] = tokens
    return {"input_ids": rows, _MASK: mask}
