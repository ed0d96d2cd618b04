"""A naive right implementation of the contract, and the same with one named fault.

The checks in `checks/` take an implementation. They must pass on the package and on `Reference()`, and fail on every
`Reference(fault)`: that is what `test_oracles_bite.py` shows. Materialised, slow, and nothing of the package but its
`Draw` type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from negcache_fn import Draw, FalseNegatives
from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES
from tests.support.model import ListCache

SAMPLING_FAULTS = (
    "no exclusion",
    "no limit",
    "no log-weight",
    "wrong scale",
    "one noise for all rows",
    "one noise for all samples",
    "one noise for two rows",
    "truncated tail",
    "draws empty slots",
    "top_k off by one",
    "biased to early slots",
    "noise ignores the step",
    "normalizer off",
)
BATCH_SAMPLING_FAULTS = (
    *("no exclusion", "no limit", "no log-weight", "draws empty slots", "top_k off by one", "truncated tail"),
    "draws with replacement",
    "not in order",
    "threshold of the last one drawn",
    "threshold too low",
    "one document is never drawn",
    "missing draws repeat the first",
    "mass ignores the importance",
    "mass of the most probable query",
    "mass off",
    "normalizer off",
)
BATCH_LOSS_FAULTS = (
    "weights forget the threshold",
    "inclusion without its inverse",
    "normalizer without gradient",
    "stale scores without gradient",
    "weights with gradient",
    "forgets exclusions",
    "forgets the cutoff",
    "forgets the limit",
    "limit on the score with its log-weight",
    "missing draws count",
    "without a usable draw the class is missing",
    "draw log-weights missing",
    "transform missing",
    "correction upside down",
)
LOSS_FAULTS = (
    "weights ignore the number of samples",
    "shared weights ignore the others",
    "shared weights forget exclusions",
    "shared weights forget the cutoff",
    "shared weights forget the limit",
    "limit on the score with its log-weight",
    "other positives are classes",
    "classes above the limit",
    "stale scores have gradient",
    "positive counted twice",
    "duplicates counted twice",
    "document log-weights missing",
    "draw log-weights missing",
    "transform missing",
    "correction upside down",
)
UPDATE_FAULTS = (
    "eviction off by one",
    "ties by the highest slot",
    "lru for fifo",
    "duplicate id takes a new slot",
    "first of repeated ids counts",
    "first of repeated split_refresh counts",
    "writes non-finite rows",
    "refresh counts as insertion",
    "split_refresh empty slots",
    "mask ignored",
    "log-weight not written",
    "step not counted",
    "writes to its argument",
)


@dataclass(frozen=True)
class Reference:
    """The contract done naively, with at most one fault."""

    fault: str = ""

    def _scores(self, state: TensorDictBase, queries: Tensor, scale: Any, transform: Any) -> Tensor:
        items = state["items"]
        if self.fault == "wrong scale":
            scale = 1.25 * scale
        scores = scale * queries.double() @ items["embedding"].double().T
        scores = transform(scores) if transform else scores
        if self.fault != "no log-weight":
            scores = scores + items["log_weight"].double()
        if self.fault == "draws empty slots":
            return scores
        return scores.masked_fill(items["embedded_at"] < 0, -math.inf)

    def sample_gumbel(
        self,
        state: TensorDictBase,
        queries: Tensor,
        *,
        draws_per_query: int | None = None,
        num_draws: int | None = None,
        importance: Tensor | None = None,
        scale: Any = 1.0,
        score_transform: Any = None,
        exclude_ids: Tensor | None = None,
        false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
        top_k: int | None = None,
    ) -> Draw:
        """Gumbel-Max over the materialised scores, or masses."""
        items = state["items"]
        rows, capacity = len(queries), len(items["id"])
        samples = draws_per_query or 1
        scores = self._scores(state, queries, scale, score_transform)
        banned = torch.empty(1, 0, dtype=torch.int64) if exclude_ids is None else exclude_ids
        banned = banned[None] if banned.ndim == 1 else banned
        if self.fault != "no exclusion":
            hit = (items["id"][None, :, None] == banned[:, None, :]) & (banned != -1)[:, None, :]
            scores = scores.masked_fill(hit.any(-1), -math.inf)
        limit = (
            torch.tensor(math.inf) if false_negatives.max_score is None else torch.as_tensor(false_negatives.max_score)
        )
        limit = limit.expand(rows).double()
        if self.fault != "no limit":
            bare = self._scores(state, queries, scale, score_transform).detach() - items["log_weight"].double()
            scores = scores.masked_fill(bare.nan_to_num(-math.inf) > limit[:, None], -math.inf)
        cutoff = torch.full((rows, 1), -math.inf, dtype=scores.dtype)
        if top_k is not None and top_k < capacity:
            kept = top_k + 1 if self.fault == "top_k off by one" and top_k + 1 < capacity else top_k
            best = scores.detach().sort(dim=-1, descending=True).values
            cutoff = ((best[:, kept - 1] + best[:, kept]) / 2)[:, None]
            scores = scores.masked_fill(scores < cutoff, -math.inf)
        count = 0 if self.fault == "noise ignores the step" else int(state["step"])
        generator = torch.Generator().manual_seed(1_000_003 * int(state["seed"]) + count)
        uniform = torch.rand(rows, samples, capacity, generator=generator, dtype=torch.float64)
        if self.fault == "one noise for all rows":
            uniform = uniform[:1].expand_as(uniform)
        if self.fault == "one noise for all samples":
            uniform = uniform[:, :1].expand_as(uniform)
        if self.fault == "one noise for two rows":  # the second and the third, and so on
            uniform = uniform[((torch.arange(rows) + 1) // 2 * 2 - 1).clamp(min=0)]
        noise = -torch.log(-torch.log1p(-uniform.clamp(1e-18, 1 - 1e-16)))
        if self.fault == "truncated tail":
            noise = noise.clamp(max=3.0) + 1e-9 * noise
        if self.fault == "biased to early slots":
            noise = noise - 0.2 * torch.arange(capacity) / capacity
        perturbed, slot = (scores.detach()[:, None, :] + noise).max(-1)
        threshold, score = perturbed[:, :0], scores.detach().gather(1, slot)
        if num_draws is not None:
            importance = torch.ones(rows) if importance is None else importance
            perturbed, slot, threshold, score = self._of_batch(scores.detach(), importance, noise[0, 0], num_draws)
        normalizer = torch.logsumexp(scores, -1)
        normalizer = normalizer.nan_to_num(nan=-math.inf)
        if self.fault == "normalizer off":
            normalizer = normalizer + 1e-2
        if num_draws is None:
            normalizer = normalizer.detach()
        drawn = perturbed > -math.inf
        score = torch.where(drawn, score, -math.inf)
        if self.fault == "missing draws repeat the first":
            drawn = drawn[:, :1].expand_as(drawn)
        dtype = torch.float32 if draws_per_query else queries.dtype
        return Draw(
            slot=torch.where(drawn, slot, -1),
            score=score.to(dtype),
            perturbed=perturbed.to(dtype),
            threshold=threshold.to(dtype),
            log_normalizer=normalizer.float() if queries.dtype != torch.float64 else normalizer,
            embedding=items["embedding"][slot],
            id=torch.where(drawn, items["id"][slot], -1),
            log_weight=items["log_weight"][slot],
            source=torch.zeros_like(slot),
            cutoff=cutoff.to(queries.dtype if queries.dtype == torch.float64 else torch.float32),
            max_score=limit[:, None].to(queries.dtype),
            exclude_ids=banned,
            label=torch.full_like(slot, -1),
            exclude_labels=slot.new_empty(rows, 0),
            noise=torch.stack([state["seed"], state["step"]])[None],
        )

    def _of_batch(
        self, scores: Tensor, importance: Tensor, noise: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The largest perturbed masses, their slots, the next one, and the masses."""
        if self.fault == "mass ignores the importance":
            importance = torch.ones_like(importance)
        shares = torch.softmax(scores, 1).nan_to_num(0.0) * importance[:, None]
        mass = shares.amax(0) if self.fault == "mass of the most probable query" else shares.sum(0)
        missing = max(count + 1 - len(mass), 0)
        if self.fault == "mass off":
            mass = mass + 0.02 * (mass > 0)
        log_mass = torch.nn.functional.pad(torch.log(mass), (0, missing), value=-math.inf)
        noisy = log_mass + torch.nn.functional.pad(noise, (0, missing))
        if self.fault == "one document is never drawn":
            noisy[4] = -math.inf
        ordered, slot = noisy.sort(descending=True, stable=True)
        if self.fault == "draws with replacement":
            slot[1:count] = slot[0]
        perturbed, slot, threshold = ordered[None, :count], slot[None, :count], ordered[None, count : count + 1]
        if self.fault == "not in order":
            perturbed, slot = perturbed.flip(1), slot.flip(1)
        if self.fault == "threshold of the last one drawn":
            threshold = perturbed[:, -1:]
        if self.fault == "threshold too low":
            threshold = threshold - 0.2
        slot = torch.where(slot < len(mass), slot, 0)
        if self.fault == "missing draws repeat the first":
            slot = torch.where(perturbed > -math.inf, slot, slot[:, :1])
        return perturbed, slot, threshold, log_mass[slot]

    def loss(
        self,
        queries: Tensor,
        documents: Tensor,
        negatives: Tensor,
        draw: Draw,
        *,
        scale: Any = 1.0,
        score_transform: Any = None,
        in_batch: bool = True,
        ids: Tensor | None = None,
        log_weights: Tensor | None = None,
        false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
        share_draws: bool = True,
        staleness_correction: str = "self_normalized",
        reduction: str = "mean",
    ) -> Tensor:
        """Section 2 of the design with materialised [B, B*k] weights."""
        rows, samples = len(draw.log_normalizer), draw.slot.shape[1]
        transform = score_transform if score_transform and self.fault != "transform missing" else lambda x: x
        slot, source = draw.slot.flatten(), draw.source.flatten()
        weight = draw.log_weight.flatten().to(queries.dtype)
        weight = weight * 0 if self.fault == "draw log-weights missing" else weight
        fresh = transform(scale * queries @ negatives.T) + weight
        stale = transform(scale * queries @ draw.embedding.flatten(0, 1).to(queries.dtype).T) + weight
        if draw.for_batch:
            stale = stale.detach() if self.fault == "stale scores without gradient" else stale
        elif self.fault != "stale scores have gradient":
            stale = stale.detach()
        allowed = (slot >= 0)[None].repeat(rows, 1)
        if self.fault == "missing draws count":
            allowed = torch.ones_like(allowed)
        if self.fault not in ("shared weights forget exclusions", "forgets exclusions"):
            banned = draw.exclude_ids[:, None, :]
            hit = (draw.id.flatten()[None, :, None] == banned) & (banned != -1)
            allowed = allowed & ~hit.any(-1)
        if self.fault not in ("shared weights forget the cutoff", "forgets the cutoff"):
            allowed = allowed & (stale >= draw.cutoff[:, source])
        if self.fault not in ("shared weights forget the limit", "forgets the limit"):
            bare = stale if self.fault == "limit on the score with its log-weight" else stale - weight
            allowed = allowed & (bare <= draw.max_score[:, source])
        change = fresh - stale if self.fault != "correction upside down" else 2 * stale - fresh - stale
        probability = torch.where(allowed, torch.exp(stale - draw.log_normalizer[:, None]), 0.0).detach()
        if draw.for_batch:
            cache, w = self._of_batch_logit(draw, fresh, stale, allowed, probability, staleness_correction)
        else:
            own = torch.arange(rows * samples) // samples == torch.arange(rows)[:, None]
            if not share_draws or self.fault == "shared weights ignore the others":
                w = (own & allowed).to(queries.dtype) / samples
            else:
                w = probability / (samples * probability.sum(0)).clamp_min(1e-300)
            if self.fault == "weights ignore the number of samples":
                w = w * samples
            if staleness_correction == "none":
                cache = draw.log_normalizer + (w * (fresh - fresh.detach())).sum(-1)
            else:
                ratio = (w * torch.exp(torch.where(w > 0, change, 0.0))).sum(-1)
                used = w.sum(-1) > 0
                ratio = ratio / torch.where(used, w.sum(-1), 1.0)
                cache = draw.log_normalizer + torch.log(torch.where(used, ratio, 1.0))
        if self.fault == "without a usable draw the class is missing":
            cache = torch.where(w.sum(-1) > 0, cache, -math.inf)
        scores = transform(scale * queries @ documents.T)
        bare_scores = scores.detach()
        if log_weights is not None and self.fault != "document log-weights missing":
            scores = scores + log_weights.to(scores.dtype)
        positive = scores[:, : len(queries)].diagonal()
        keep = torch.full(scores.shape, in_batch)
        if self.fault != "positive counted twice":
            keep &= torch.arange(scores.shape[1]) != torch.arange(rows)[:, None]
        if ids is not None:
            keep &= ~((ids[None] == ids[:rows, None]) & (ids[None] != -1))
            if self.fault != "duplicates counted twice":
                first = [not any(int(e) == int(x) != -1 for e in ids[:j]) for j, x in enumerate(ids)]
                keep &= torch.tensor(first)
            if false_negatives.ids is not None and self.fault != "other positives are classes":
                named = (ids[None, :, None] == false_negatives.ids[:, None, :]).any(-1)
                keep &= ~(named & (ids[None] != -1))
        if false_negatives.max_score is not None and self.fault != "classes above the limit":
            limit = false_negatives.max_score(bare_scores[:, :rows].diagonal())
            keep &= bare_scores <= limit[:, None]
        logits = torch.cat([positive[:, None], scores.masked_fill(~keep, -math.inf), cache[:, None]], 1)
        losses = torch.logsumexp(logits, 1) - positive
        return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]

    def _of_batch_logit(
        self, draw: Draw, fresh: Tensor, stale: Tensor, allowed: Tensor, probability: Tensor, correction: str
    ) -> tuple[Tensor, Tensor]:
        """Logits and weights of documents drawn for the batch."""
        threshold = draw.threshold - (1.0 if self.fault == "weights forget the threshold" else 0.0)
        chance = -torch.expm1(-torch.exp(draw.score - threshold)).nan_to_num(1.0)
        inverse = torch.where(chance > 0, chance if self.fault == "inclusion without its inverse" else 1 / chance, 1.0)
        normalizer = draw.log_normalizer
        if self.fault == "normalizer without gradient":
            normalizer = normalizer.detach()
        if correction == "none":
            w = torch.where(allowed, probability * inverse, 0.0)
            if self.fault == "weights with gradient":
                w = torch.where(allowed, torch.exp(stale - draw.log_normalizer[:, None]) * inverse, 0.0)
            change = fresh - stale if self.fault != "correction upside down" else stale - fresh
            return normalizer + (w * torch.where(allowed, change, 0.0)).sum(-1), w.detach()
        above, below = (stale, fresh) if self.fault == "correction upside down" else (fresh, stale)
        w = torch.where(allowed, inverse.expand_as(fresh), 0.0)
        used = w.sum(-1) > 0
        sums = [torch.where(used, (w * torch.where(allowed, one, 0.0).exp()).sum(-1), 1.0) for one in (above, below)]
        return normalizer + sums[0].log() - sums[1].log(), w

    def update(self, state: TensorDictBase, features: Any, embeddings: Tensor, **options: Any) -> TensorDict:
        """Through the list of dicts."""
        items = state["items"]
        flat = dict(items["features"].items(True, True))
        given = TensorDict(features, batch_size=[len(embeddings)]).items(True, True)
        cache = _Faulty(len(items["id"]), items["embedding"].dtype, {k: v[0] for k, v in flat.items()})
        cache.fault, cache.step = self.fault, int(state["step"])
        for j in range(len(items["id"])):
            if int(items["embedded_at"][j]) >= 0:
                scalars = {k: items[k][j].item() for k in ("id", "embedded_at", "inserted_at", "log_weight")}
                cache.slots[j] = {"embedding": items["embedding"][j], **scalars, **{k: v[j] for k, v in flat.items()}}
        if self.fault == "lru for fifo":
            options["evict"] = "lru"
        if self.fault == "mask ignored":
            options["cacheable"] = None
        if options.get("refresh") is not None:
            options["refresh"] = (options["refresh"][0].tolist(), options["refresh"][1])
        cache.update(dict(given), embeddings, **options)
        out = state.clone()
        for j, held in enumerate(cache.slots):
            if held is not None:
                for key in ("embedding", "id", "embedded_at", "inserted_at", "log_weight"):
                    if key != "log_weight" or self.fault != "log-weight not written":
                        out["items"][key][j] = held[key]
                for key in flat:
                    out["items"]["features"].get(key)[j] = held[key]
        out["step"] = torch.tensor(cache.step - (self.fault == "step not counted"))
        if self.fault == "writes to its argument":
            items["embedding"].copy_(out["items"]["embedding"])
        return out.lock_() if state.is_locked else out


class _Faulty(ListCache):
    fault: str = ""

    def keeps(self, embedding: Tensor, log_weight: float, mask: bool) -> bool:
        return mask if self.fault == "writes non-finite rows" else super().keeps(embedding, log_weight, mask)

    def age_key(self, slot: int, evict: str) -> Any:
        key = super().age_key(slot, evict)
        if self.fault == "eviction off by one":
            return (key + 1) % (self.step + 1)
        return (key, -slot) if self.fault == "ties by the highest slot" else key

    def refresh(self, slots: Any, embeddings: Tensor) -> None:
        pairs = list(zip(slots, embeddings, strict=True))
        if self.fault == "first of repeated split_refresh counts":
            pairs = pairs[::-1]
        for slot, embedding in pairs:
            if self.fault == "split_refresh empty slots" and self.slots[slot] is None:
                blank = {k: torch.zeros_like(v) for k, v in self.feature_slots.items()}
                self.slots[slot] = {"id": -1, "log_weight": 0.0, "inserted_at": self.step, **blank}
                self.slots[slot]["embedding"] = torch.zeros_like(embedding)  # type: ignore[index]
            super().refresh([slot], embedding[None])
            if self.fault == "refresh counts as insertion" and slot >= 0 and self.slots[slot] is not None:
                self.slots[slot]["inserted_at"] = self.step  # type: ignore[index]

    def update(self, features: Any, embeddings: Tensor, **options: Any) -> None:
        if self.fault == "duplicate id takes a new slot":
            names = [] if options.get("ids") is None else [int(x) for x in options["ids"]]
            for j, held in enumerate(self.slots):
                if held is not None and held["id"] in names:
                    self.slots[j] = {**held, "id": -1}
        if self.fault == "first of repeated ids counts" and options.get("ids") is not None:
            names = [int(x) for x in options["ids"]]
            mask = options.get("cacheable")
            seen = [n not in names[:i] or n == -1 for i, n in enumerate(names)]
            options["cacheable"] = [s and (mask is None or bool(mask[i])) for i, s in enumerate(seen)]
        super().update(features, embeddings, **options)
