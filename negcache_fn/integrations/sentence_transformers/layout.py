"""Documents as rows: the features of a column as rows that a cache can keep, and back as inputs of the model.

Tokens and pieces (see `columns`) become rows of one width. Token ids are kept as int32 and the attention mask as bool.
The constants of a column must be the same for all documents of a cache.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from warnings import warn

import torch
from torch import Tensor

from negcache_fn.integrations.sentence_transformers.columns import (
    ALONG_A_TEXT,
    IDS,
    MASK,
    PROMPT,
    Leaf,
    constants_of,
    leaves_of,
)
from negcache_fn.integrations.sentence_transformers.model import Tokenizing
from negcache_fn.integrations.sentence_transformers.pieces import (
    NUMBERS,
    counts_of_pieces,
    joined,
    row_count,
    split,
)
from negcache_fn.integrations.sentence_transformers.tokens import placed, used

__all__ = ["Layout", "Rows", "count_name"]

Rows = dict[str, Tensor]

_LENGTHS = "sentence_lengths"


class Layout(NamedTuple):
    """How the columns of documents become rows, and rows a batch."""

    leaves: dict[str, Leaf]
    constants: dict[str, Any]
    tokenizing: Tokenizing
    room: int | None  # tokens to which texts are cut and padded; None: as many as the longest has
    cuts: bool  # whether a longer text can be cut: not one that has images
    asked: bool  # whether the user set the room

    @classmethod
    def of(cls, column: Mapping[str, Any], tokenizing: Tokenizing) -> "Layout":
        """As in this column, with texts of any length; ValueError for a feature that a cache cannot keep."""
        leaves, constants = leaves_of(column), constants_of(column)
        if MASK in leaves and leaves[MASK].kind == "tokens" and bool((used(column[MASK])[0] > 0).any()):
            tokenizing = tokenizing._replace(left=True)
        cuts = constants.get("modality") in (None, "text") and all(
            leaf.kind == "tokens" or key in (IDS, _LENGTHS) for key, leaf in leaves.items()
        )
        return cls(leaves, constants, tokenizing, None, cuts, False)

    def with_room(self, max_length: int | None, most: int) -> "Layout":
        """With the given room for a text, or with the tokenizer's limit, up to `most` tokens.

        A text that cannot be cut gets the room that it needs.
        """
        if max_length is not None or not self.cuts:
            return self._replace(room=max_length, asked=max_length is not None)
        return self._replace(room=int(min(self.tokenizing.longest, most)))

    def rows(self, columns: Sequence[Mapping[str, Any]], least: Mapping[str, int] | None = None) -> Rows:
        """[N, ...] each, column after column.

        Args:
            columns: columns of documents, with the same features.
            least: the smallest allowed widths of tokens and pieces, by key.

        Raises:
            ValueError: a feature or a constant that the others do not have, or in another shape.
        """
        parts = [self._rows(column) for column in columns]
        joint: Rows = {}
        for key, leaf in self.leaves.items():
            values = [part[key] for part in parts]
            if leaf.kind != "rows":
                room = self.room if leaf.kind == "tokens" or key == IDS else None
                width = room or max((least or {}).get(key, 0), *(value.shape[1] for value in values))
                values = [self.widened(key, value, width) for value in values]
            joint[key] = torch.cat(values)
            if leaf.kind == "pieces":
                joint[count_name(key)] = torch.cat([part[count_name(key)] for part in parts])
        return joint

    def batch(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        """The inputs of the model, without the padding that all rows share, in new tensors that modules may edit."""
        kept = self._kept(rows[MASK]) if MASK in self.leaves and self.leaves[MASK].kind == "tokens" else slice(None)
        batch: dict[str, Any] = {}
        for key, leaf in self.leaves.items():
            if leaf.kind == "pieces":
                counts = rows[count_name(key)].long()
                values = joined(rows[key], counts)
                if key == IDS:
                    batch["offsets"] = counts.cumsum(0) - counts
                elif values.shape[0] == 0:
                    continue  # as in a batch without images
            else:
                values = rows[key][:, kept] if leaf.kind == "tokens" else rows[key]
            batch[key] = values.to(leaf.dtype, copy=True)
        return {**batch, **self.constants}

    def lengths(self, rows: Mapping[str, Tensor]) -> Tensor | None:
        """[N]: how long each document is to the encoder, if that differs."""
        if MASK in self.leaves:
            return rows[MASK].flatten(1).sum(1)
        counts = [rows[count_name(key)] for key, leaf in self.leaves.items() if leaf.kind == "pieces"]
        return counts[0] if counts else None

    def widened(self, key: str, values: Tensor, width: int) -> Tensor:
        """Tokens or pieces [N, any width, ...] in rows of at least that width, padded on the side of padding."""
        missing = width - values.shape[1]
        if missing <= 0:
            return values
        padding = self.tokenizing.padding if key == IDS and self.leaves[key].kind == "tokens" else 0
        more = values.new_full((values.shape[0], missing, *values.shape[2:]), padding)
        left = self.tokenizing.left and self.leaves[key].kind == "tokens"
        return torch.cat([more, values] if left else [values, more], 1)

    def check_constants(self, column: Mapping[str, Any], *, prompts: bool) -> None:
        """Raises if a constant differs from that of the documents before; `prompts`: whether their length matters."""
        constants = constants_of(column)
        for key in sorted(constants.keys() | self.constants.keys()):
            value, expected = constants.get(key), self.constants.get(key)
            if value != expected and (prompts or key != PROMPT):
                raise ValueError(
                    f"a column of documents has {key}={value!r}; expected {expected!r}, as in all that are cached: "
                    f"give each data set a loss of its own, and each column of documents the same prompt"
                )

    def _rows(self, column: Mapping[str, Any]) -> Rows:
        """The documents of one column, with widths of their own."""
        found = leaves_of(column)
        optional = {key for key, leaf in self.leaves.items() if leaf.kind == "pieces" and key != IDS}
        if found.keys() - self.leaves.keys() or self.leaves.keys() - found.keys() - optional - set(NUMBERS):
            raise ValueError(f"a column has the features {sorted(found)}; expected {sorted(self.leaves)}, as before")
        rows, counts = row_count(column), counts_of_pieces(column)
        result: Rows = {}
        for key, leaf in self.leaves.items():
            if key not in found:  # no document of the column has any
                some = next(iter(found))
                shape = (rows, 0, *leaf.shape) if leaf.kind == "pieces" else (rows,)
                result[key] = column[some].new_zeros(shape, dtype=leaf.dtype)
                result[count_name(key)] = column[some].new_zeros(rows, dtype=torch.int32)
                continue
            values = column[key]
            as_rows = leaf.kind == "rows" and (leaf.dtype, leaf.shape) == (values.dtype, tuple(values.shape[1:]))
            if found[key] != leaf and not as_rows:  # it may be as wide as the texts by chance
                raise ValueError(
                    f"{key} is {_described(found[key])} in a column of documents; expected {_described(leaf)}, as in "
                    f"all that are cached: bring them to one shape before they are batched"
                )
            if leaf.kind == "pieces":
                many = counts[key].clamp(max=self._limit(key, int(counts[key].max())))
                result[key], result[count_name(key)] = split(values, counts[key], many), many.int()
            else:
                result[key] = values
        return self._narrowed(result)

    def _narrowed(self, rows: Rows) -> Rows:
        """Cut to the room for a text, in the dtypes of the cache."""
        if MASK in self.leaves and self.leaves[MASK].kind == "tokens":
            first, length = used(rows[MASK])
            if self.room is not None and rows[MASK].shape[1] > self.room:
                self._limit(MASK, int(length.max()))
            if _LENGTHS in rows and self.room is not None:
                rows[_LENGTHS] = rows[_LENGTHS].clamp(max=self.room)
            width = self.room or rows[MASK].shape[1]
            for key in [key for key, leaf in self.leaves.items() if leaf.kind == "tokens"]:
                padding = self.tokenizing.padding if key == IDS else 0
                rows[key] = placed(rows[key], first, length, width, self.tokenizing, padding)
            rows[MASK] = rows[MASK].bool()
        for key in ALONG_A_TEXT:
            if key in rows and rows[key].dtype == torch.int64:
                rows[key] = rows[key].int()
        return rows

    def _limit(self, key: str, longest: int) -> int:
        """The most tokens that a text may have, or pieces that a document may have."""
        if self.room is None or key not in (MASK, IDS) or longest <= self.room:
            return longest
        if not self.cuts:
            raise ValueError(
                f"a text has {longest} tokens; expected at most {self.room}, the max_length of the loss, as a text "
                f"that comes with images, or from a chat template, cannot be cut"
            )
        if not self.asked:
            warn(
                f"documents are cut to {self.room} tokens, the room that a slot of the cache has by default: give the "
                f"loss a max_length, or shorten the texts by the model's max_seq_length",
                stacklevel=2,
            )
        return self.room

    def _kept(self, mask: Tensor) -> slice:
        some = mask.any(0).nonzero()
        first, last = (int(some[0]), int(some[-1])) if some.numel() else (0, 0)
        return slice(first, None) if self.tokenizing.left else slice(0, last + 1)


def count_name(key: str) -> str:
    """The name under which the number of pieces is kept."""
    return f"{key}_count"


def _described(leaf: Leaf) -> str:
    dimensions = {"tokens": "rows, tokens", "pieces": "pieces", "rows": "rows"}[leaf.kind]
    return f"[{', '.join([dimensions, *map(str, leaf.shape)])}] {leaf.dtype}"
