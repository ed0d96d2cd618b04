"""Encoding in a step, in one call: the documents of the batch, the draws, and the stalest documents."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.select import lowest_slots
from negcache_fn._cache.state import as_features, feature_leaves, live, stored
from negcache_fn._checks import check_embeddings
from negcache_fn._features import Features, leaves, map_features, rows_where
from negcache_fn._ranks.attempts import Attempts
from negcache_fn._ranks.group import Ranks, Shards, fetch_rows

__all__ = ["EncodedAgain", "Encoder", "Fresh", "encode_checked", "encode_in_one_pass", "told_to_all", "with_stalest"]

Encoder = Callable[[Any], Tensor]
"""A document encoder: from the features of R documents to embeddings [R, D]. A `torch.nn.Module` is one."""


class EncodedAgain(NamedTuple):
    """The cached documents that a step encodes again: the draws, then the stalest."""

    slots: Tensor  # [M + R]
    drawn: int  # M
    features: list[Tensor]  # their rows of each of `feature_leaves`
    stalest: Tensor  # [ranks * R] slots of the stalest, for all ranks


class Fresh(NamedTuple):
    """The embeddings of a step."""

    all: Tensor  # [N + M + R, D]
    documents: Tensor  # [N, D]
    draws: Tensor  # [M, D]
    stalest: Tensor  # [R, D]


def with_stalest(
    state: TensorDictBase, slots: Tensor, drawn: list[Tensor], to_refresh: int, ranks: Ranks, shards: Shards
) -> EncodedAgain:
    """The drawn slots [M] with their features, and this rank's part of the stalest."""
    if not to_refresh:
        return EncodedAgain(slots, slots.shape[0], drawn, slots[:0])
    stalest = lowest_slots(stored(state, "embedded_at"), to_refresh * ranks.size, skip=~live(state), shards=shards)
    own = ranks.own(stalest)
    fetched = fetch_rows(feature_leaves(state), own, shards)
    features = [torch.cat(rows) for rows in zip(drawn, fetched, strict=True)]
    return EncodedAgain(torch.cat([slots, own]), slots.shape[0], features, stalest)


def encode_in_one_pass(
    encode: Encoder, features: Features, encoded_first: Tensor | None, state: TensorDictBase, again: EncodedAgain
) -> Fresh:
    """Encodes the documents of the batch, unless they are encoded already, and those of the cache, in one call."""
    cached, count = stored(state, "embedding"), again.slots.shape[0]
    _, leaf = next(leaves(features))
    rows = leaf.shape[0]
    from_cache = _with_stand_ins(features, cast(Features, as_features(state, again.features)), again.slots)
    if encoded_first is not None:
        embeddings = torch.cat([encoded_first, encode_checked(encode, from_cache, count, cached)])
    else:
        embeddings = encode_checked(encode, map_features(_joined, features, from_cache), rows + count, cached)
    documents, draws, stalest = torch.split(embeddings, [rows, again.drawn, count - again.drawn])
    return Fresh(embeddings, documents, draws, stalest)


def told_to_all(encode: Encoder, attempts: Attempts, like: Tensor) -> Encoder:
    """`encode`; if it raises, or does not return [rows, D], every rank raises, see `Attempts`.

    `like` [B, D] has the dtype and device of the embeddings that stand in then.
    """
    if attempts.ranks.name is None:
        return encode

    def attempt(features: Features) -> Tensor:
        _, leaf = next(leaves(features))
        rows = leaf.shape[0]
        return attempts.embeddings(
            lambda: encode_checked(encode, features, rows, like), lambda: like.new_zeros(rows, like.shape[1])
        )

    return attempt


def encode_checked(encode: Encoder, features: Features, rows: int, like: Tensor) -> Tensor:
    """[rows, D], checked."""
    embeddings = encode(features)
    check_embeddings("the output of encode", embeddings, like, of="the cache", rows=rows)
    return embeddings


def _joined(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second])


def _with_stand_ins(batch: Features, cached: Features, slots: Tensor) -> Features:
    """Features of cached documents; for a missing slot, those of a document of the batch.

    The stand-in keeps shapes fixed, and the zeros of an empty slot away from the encoder; the loss ignores it.
    """

    def stand_in(of_batch: Tensor, of_cache: Tensor) -> Tensor:
        rows = of_batch[torch.arange(slots.shape[0], device=slots.device) % of_batch.shape[0]]
        return rows_where(slots >= 0, of_cache.to(rows.dtype), rows)

    return map_features(stand_in, batch, cached)
