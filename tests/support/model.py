"""The cache as a plain list of dicts: what `update` means, row by row, in Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Slot = dict[str, Any]


def pad_to(row: Tensor, like: Tensor) -> Tensor:
    """`row` in the top left corner of zeros shaped as `like`."""
    out = torch.zeros_like(like)
    out[tuple(slice(0, n) for n in row.shape)] = row
    return out


class ListCache:
    """`slots[j]` is None (empty) or a dict with the fields of the state's schema, features by flat key."""

    def __init__(self, capacity: int, storage: torch.dtype, feature_slots: dict[str, Tensor]) -> None:
        self.slots: list[Slot | None] = [None] * capacity
        self.storage = storage
        self.feature_slots = feature_slots
        self.step = 0

    def keeps(self, embedding: Tensor, log_weight: float, mask: bool) -> bool:
        """Whether a document comes in: unmasked, finite once in storage, with a log-weight that is a weight."""
        finite = bool(torch.isfinite(embedding.to(self.storage)).all())
        return mask and finite and not math.isnan(log_weight) and log_weight != math.inf

    def refresh(self, slots: Sequence[int], embeddings: Tensor) -> None:
        """Re-embed live slots; -1, empty slots and non-finite rows are left out, of repeated slots the last counts."""
        for slot, embedding in zip(slots, embeddings, strict=True):
            if slot < 0:
                continue
            held = self.slots[slot]
            stored = embedding.to(self.storage)
            if held is None or not bool(torch.isfinite(stored).all()):
                continue
            held["embedding"] = stored
            held["embedded_at"] = self.step

    def update(
        self,
        features: dict[str, Tensor],
        embeddings: Tensor,
        *,
        ids: Sequence[int] | None = None,
        log_weights: Sequence[float] | None = None,
        cacheable: Sequence[bool] | None = None,
        refresh: tuple[Sequence[int], Tensor] | None = None,
        evict: str = "lru",
    ) -> None:
        """Refresh, then put the batch's documents over the slots that `evict` names, then count the step."""
        if refresh is not None:
            self.refresh(*refresh)
        rows: list[Slot] = []
        for n in range(len(embeddings)):
            identity = int(ids[n]) if ids is not None else -1
            weight = float(log_weights[n]) if log_weights is not None else 0.0
            if not self.keeps(embeddings[n], weight, True if cacheable is None else bool(cacheable[n])):
                continue
            if identity != -1:
                rows = [row for row in rows if row["id"] != identity]
            row: Slot = {k: pad_to(v[n], self.feature_slots[k]) for k, v in features.items()}
            row |= {"embedding": embeddings[n].to(self.storage), "id": identity, "log_weight": weight}
            rows.append(row | {"embedded_at": self.step, "inserted_at": self.step})
        cached = {held["id"]: j for j, held in enumerate(self.slots) if held is not None and held["id"] != -1}
        taken = {cached[row["id"]] for row in rows if row["id"] in cached}
        order = sorted((j for j in range(len(self.slots)) if j not in taken), key=lambda j: (self.age_key(j, evict), j))
        for row in rows:
            self.slots[cached[row["id"]] if row["id"] in cached else order.pop(0)] = row
        self.step += 1

    def age_key(self, slot: int, evict: str) -> int:
        """What eviction sorts by: the oldest embedding or the oldest insertion; empty slots first."""
        held = self.slots[slot]
        if held is None:
            return -1
        return int(held["embedded_at" if evict == "lru" else "inserted_at"])

    def live(self) -> list[int]:
        """Slots that hold a document."""
        return [j for j, held in enumerate(self.slots) if held is not None]

    def stalest(self, n: int) -> list[int]:
        """Live slots by oldest embedding, ties by slot, padded with -1."""
        order = sorted(self.live(), key=lambda j: (self.age_key(j, "lru"), j))
        return (order + [-1] * n)[:n]
