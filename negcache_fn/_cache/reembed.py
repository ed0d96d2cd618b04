"""Freshness: every cached document embedded again, by the current encoder.

A step refreshes its draws and, with `refresh_stalest`, the oldest documents. This refreshes all, between steps: after a
phase with a large learning rate, or after a change of encoder.

The state's `step` stays, and with it the noise of the next step. Ages stay right: an embedding of a step is one update
of the encoder old at the next step, and has age 1 there; one computed between the two, after the update, has age 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.state import check_state, check_writable, embedding_columns, live, scalar, stored
from negcache_fn._cache.take import take
from negcache_fn._cache.update import copy_state
from negcache_fn._checks import check_embeddings, check_encoder, check_size
from negcache_fn._codec import encode as encode_rows
from negcache_fn._codec import storable

__all__ = ["reembed", "reembed_"]


def reembed(state: TensorDictBase, encode: Callable[[Any], Tensor], *, batch_size: int = 1024) -> TensorDictBase:
    """The cache with all embeddings computed again, without gradient.

    Naive equivalent: `embedding[slot] = encode(take(state, slot))` and `embedded_at[slot] = step` for every live slot.
    A row that is not finite (as stored) stays as it was, with its age. Put the encoder into evaluation mode to keep
    dropout out of the cached embeddings. Do not compile it: its sizes depend on the occupancy.

    Args:
        state: the cache, C slots. Each rank re-embeds its part of a sharded one: nothing is sent, and parts may have
            different numbers of documents, so `encode` must not communicate either (the module inside
            DistributedDataParallel, not the wrapper). For a replicated one it must give the same on every rank.
        encode: the document encoder: features of R documents, as `take` gives them, to [R, D].
        batch_size: documents per call, in the order of slots; the last call has what remains. Empty slots have none.

    Returns:
        The new state, with the same `step`, features, ids, weights and `inserted_at`.

    Raises:
        ValueError, TypeError: an `encode` that cannot be called or gives another shape; a `batch_size` that is not a
            positive integer.

    Examples:
        >>> encoder = torch.nn.Linear(3, 4)
        >>> state = update(init_cache(8, 4, torch.zeros(1, 3)), torch.ones(2, 3), torch.zeros(2, 4))
        >>> state = reembed(state, encoder)
        >>> bool((state["items", "embedding"][:2] == encoder(torch.ones(2, 3))).all())
        True
    """
    return reembed_(copy_state(state), encode, batch_size=batch_size)


def reembed_(state: TensorDictBase, encode: Callable[[Any], Tensor], *, batch_size: int = 1024) -> TensorDictBase:
    """`reembed` in place: writes embeddings and their age into `state`, which it returns, and copies nothing.

    It has the same arguments and errors. If `encode` raises, the earlier batches have been written.

    Examples:
        >>> state = update(init_cache(8, 4, torch.zeros(1, 3)), torch.ones(2, 3), torch.zeros(2, 4))
        >>> reembed_(state, torch.nn.Linear(3, 4), batch_size=1) is state
        True
    """
    check_state(state)
    check_writable(state)
    check_encoder(encode)
    check_size("batch_size", batch_size)
    cached, embedded_at = stored(state, "embedding"), stored(state, "embedded_at")
    with torch.no_grad():  # cached embeddings are constants
        documents = live(state).nonzero().flatten()
        for start in range(0, documents.shape[0], batch_size):
            slots = documents[start : start + batch_size]
            embeddings = encode(take(state, slots))
            check_embeddings("the output of encode", embeddings, cached, of="the cache", rows=slots.shape[0])
            finite = storable(embeddings, cached.dtype)
            slots, embeddings = slots[finite], embeddings[finite]
            encoded = encode_rows(embeddings, cached.dtype)
            for name, column in embedding_columns(state).items():
                column.index_copy_(0, slots, encoded[name])
            embedded_at.index_copy_(0, slots, scalar(state, "step").expand_as(slots))
    return state
