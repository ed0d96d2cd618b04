"""A step composed of the public functions, with naive metrics; and small towers to train with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

import negcache_fn
from tests.support import oracles
from tests.support.builders import is_close

METRICS = {
    "exact_loss",
    "positive_probability",
    "cache_share",
    "occupancy",
    "cache_age_steps",
    "draw_age_steps",
    "drift",
    "effective_sample_size",
    "masked_pairs",
    "non_finite",
}
OF_BATCH, OF_QUERIES = METRICS | {"draw_noise"}, METRICS | {"unique_draws"}


class Tower(nn.Module):
    """Embeds documents `{"words": [rows, 4] int64, "extra": {"price": [rows] float32}}` or plain `[rows, 4]` words."""

    def __init__(self, dim: int = 6, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(0.5 * torch.randn(50, dim, generator=generator))
        self.slope = nn.Parameter(torch.randn(dim, generator=generator))
        self.calls: list[tuple[type, int]] = []

    def forward(self, features: Any) -> Tensor:
        """`[rows, dim]` unit vectors."""
        words = features if isinstance(features, Tensor) else features["words"]
        vectors = self.table[words].mean(1)
        if not isinstance(features, Tensor):
            vectors = vectors + features["extra"]["price"][:, None] * self.slope
        return nn.functional.normalize(vectors, dim=-1)

    def counted(self, features: Any) -> Tensor:
        """The same, noting the container and the rows of each call."""
        words = features if isinstance(features, Tensor) else features["words"]
        self.calls.append((type(features), len(words)))
        return self(features)


def documents(rows: int, seed: int) -> dict[str, Any]:
    """A batch of documents as nested dict."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 50, (rows, 4), generator=generator)
    return {"words": words, "extra": {"price": torch.rand(rows, generator=generator)}}


SCORED = {"scale": 1.0, "score_transform": None, "hardness": 0.0}
"""The options that define a score, and their defaults."""


def warm(tower: Tower, capacity: int, *, batches: int = 3, rows: int = 4, ids: bool = False) -> TensorDictBase:
    """A state after a few updates, with embeddings of a slightly different tower: drifted."""
    state = negcache_fn.init_cache(capacity, 6, documents(1, 0), seed=3)
    older = Tower(seed=0)
    with torch.no_grad():
        older.table.add_(0.1 * torch.randn(50, 6, generator=torch.Generator().manual_seed(9)))
        for n in range(batches):
            batch = documents(rows, 50 + n)
            names = torch.arange(rows) + 4 * n if ids else None
            state = negcache_fn.update(state, batch, older(batch), ids=names)
    return state


def joined(*parts: Any) -> Any:
    """Nested dicts joined row by row."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return {key: joined(*(part[key] for part in parts)) for key in list(parts[0].keys())}


def composed(
    state: TensorDictBase, queries: Tensor, batch: Any, encode: Callable[[Any], Tensor], **options: Any
) -> tuple[Tensor, TensorDictBase, dict[str, float], negcache_fn.Draw]:
    """`step` as sample, take, encode, loss, update; metrics in float64 by their definitions. For valid draws only."""
    rows, ids, in_batch = len(queries), options.get("ids"), options.get("in_batch", True)
    shared = {name: options.get(name, value) for name, value in SCORED.items()}
    known = options.get("false_negatives", negcache_fn.FalseNegatives())
    targets = targets_of(rows, options)
    if "positive_rows" in options:
        queries = torch.where((targets >= 0).any(1)[:, None], queries, 0.0)
    limit = max_score_of(known, queries.detach(), encode(batch).detach(), shared, options)
    exclude = None if ids is None else (ids if in_batch else torch.where(targets >= 0, ids[targets], -1))
    picks = {key: options[key] for key in ("draws_per_query", "num_draws", "top_k") if key in options}
    stale_known = known._replace(max_score=limit)
    picks |= {"exclude_ids": exclude, "false_negatives": stale_known, **shared}
    if "draws_per_query" not in options:
        picks["importance"] = importance_of(state, queries, encode(batch).detach(), limit, picks, options)
    draw = negcache_fn.sample_gumbel(state, queries, **picks)
    assert bool((draw.slot >= 0).all())
    slots, count = draw.slot.flatten(), len(next(iter(batch.values())))
    stalest = options.get("refresh_stalest", 0)
    stalest = math.ceil(stalest * len(state["items"])) if isinstance(stalest, float) else stalest
    oldest = negcache_fn.stalest(state, stalest) if stalest else slots[:0]
    everything = encode(joined(batch, negcache_fn.take(state, slots), negcache_fn.take(state, oldest)))
    own, negatives, refreshed = everything.split([count, len(slots), len(oldest)])
    pass_on = ("ids", "log_weights", "in_batch", "share_draws", "staleness_correction", "reduction", "false_negatives")
    pass_on = (*pass_on, "positive_rows", "weigh_positives")
    chosen = {key: options[key] for key in pass_on if key in options}
    value = negcache_fn.loss(queries, own, negatives, draw, **chosen, **shared)
    after = negcache_fn.update(
        state,
        batch,
        own,
        refresh=(torch.cat([slots, oldest]), torch.cat([negatives, refreshed])),
        **{key: options[key] for key in ("ids", "log_weights", "cacheable", "evict", "priorities") if key in options},
    )
    return value, after, naive_metrics(state, queries, own, negatives, draw, **options), draw


def targets_of(rows: int, options: dict[str, Any]) -> Tensor:
    """`[B, P]` the rows of each query's positives, -1: none."""
    return options.get("positive_rows", torch.arange(rows)[:, None])


def each_positive(
    queries: Tensor, own: Tensor, cache_logit: Tensor, limit: Tensor | list[float] | None, options: dict[str, Any]
) -> list[list[tuple[float, float]]]:
    """Of each query, for each of its positives: the loss, and the share of the cache in its softmax; float64."""
    known = options.get("false_negatives", negcache_fn.FalseNegatives())
    rows, ids = len(queries), options["ids"].tolist() if options.get("ids") is not None else None
    weights = options["log_weights"].tolist() if options.get("log_weights") is not None else [0.0] * len(own)
    transform = options.get("score_transform") or oracles.identity
    products = queries.detach().double() @ own.detach().double().T
    bare = transform(float(options.get("scale", 1.0)) * products)
    of_positives, scores = bare.tolist(), (bare + options.get("hardness", 0.0) * products).tolist()
    limits = [math.inf] * rows if limit is None else torch.as_tensor(limit).expand(rows).tolist()
    out = []
    for i, row in enumerate(targets_of(rows, options).tolist()):
        wanted = [j for j in row if j >= 0]
        mine = oracles.negatives_beside(wanted, len(own), ids, in_batch=options.get("in_batch", True))
        if known.ids is not None and ids is not None:
            mine = [j for j in mine if ids[j] == -1 or ids[j] not in known.ids[i].tolist()]
        if known.labels is not None and known.labels.documents is not None:
            own_label, labels = int(known.labels.queries[i]), known.labels.documents.tolist()
            mine = [j for j in mine if own_label == -1 or labels[j] != own_label]
        negatives = [math.exp(scores[i][j] + weights[j]) for j in mine if scores[i][j] <= limits[i]]
        cached = math.exp(float(cache_logit[i]))
        found = []
        for j in wanted:
            positive = math.exp(of_positives[i][j] + (weights[j] if options.get("weigh_positives", True) else 0.0))
            everything = positive + sum(negatives) + cached
            found.append((math.log(everything / positive), cached / everything))
        out.append(found)
    return out


def mean(values: list[float]) -> float:
    """Of numbers, 0 of none."""
    return sum(values) / max(len(values), 1)


def importance_of(
    state: TensorDictBase,
    queries: Tensor,
    own: Tensor,
    limit: Tensor | None,
    picks: dict[str, Any],
    options: dict[str, Any],
) -> Tensor:
    """`[B]` the share of the cache in each query's softmax."""
    normalizer = negcache_fn.sample_gumbel(state, queries, **picks).log_normalizer.detach().double()
    each = each_positive(queries, own, normalizer, limit, options)
    return torch.tensor([mean([share for _, share in row]) for row in each], dtype=torch.float64)


def max_score_of(
    known: negcache_fn.FalseNegatives, queries: Tensor, own: Tensor, shared: dict[str, Any], options: dict[str, Any]
) -> Tensor | None:
    """The limit of each query, from the scores of the positives if it depends on them."""
    if known.max_score is None:
        return None
    products = (queries * own[targets_of(len(queries), options)[:, 0].clamp(min=0)]).sum(-1)
    positive = (shared["score_transform"] or oracles.identity)(shared["scale"] * products)
    positive = positive + options.get("hardness", 0.0) * products
    return (
        known.max_score(positive)
        if callable(known.max_score)
        else torch.as_tensor(known.max_score).expand(len(queries))
    )


def naive_metrics(
    state: TensorDictBase, queries: Tensor, own: Tensor, negatives: Tensor, draw: negcache_fn.Draw, **options: Any
) -> dict[str, float]:
    """Every metric by its definition, in loops."""
    items, now = state["items"], int(state["step"])
    at = items["embedded_at"].tolist()
    live = [j for j, when in enumerate(at) if when >= 0]
    slots = draw.slot.flatten().tolist()
    exist = [m for m, j in enumerate(slots) if j >= 0]
    queries, own, negatives = queries.detach().double(), own.detach().double(), negatives.detach().double()
    names = None if options.get("ids") is None else options["ids"].tolist()
    in_batch, samples = options.get("in_batch", True), draw.slot.shape[1]
    shared: dict[str, Any] = {
        "scale": float(options.get("scale", 1.0)),
        "transform": options.get("score_transform"),
        "hardness": options.get("hardness", 0.0),
    }
    limits = {
        "log_weight": items["log_weight"],
        "live": [when >= 0 for when in at],
        "ids": items["id"].tolist(),
        "exclude": oracles.excluded_ids(
            names, len(queries), in_batch=in_batch, targets=targets_of(len(queries), options).tolist()
        ),
        "top_k": options.get("top_k"),
    }
    known = options.get("false_negatives", negcache_fn.FalseNegatives())
    limit = max_score_of(
        known, queries, own, {"scale": shared["scale"], "score_transform": shared["transform"]}, options
    )
    positives = None if known.ids is None else known.ids.tolist()
    if positives is not None:
        limits["exclude"] = [[*(limits["exclude"][i] if names else []), *positives[i]] for i in range(len(queries))]
    limits["max_score"] = None if limit is None else limit.tolist()
    limits["labels"] = None if known.labels is None else (known.labels.queries.tolist(), known.labels.cached.tolist())
    stale = oracles.cache_scores(queries, items["embedding"], **limits, **shared)
    cache_logit = oracles.log_normalizer(stale)
    each = each_positive(queries, own, cache_logit, limits["max_score"], options)
    trained = [row for row in each if row]
    fresh = oracles.cache_scores(queries, negatives, log_weight=items["log_weight"][slots], **shared)
    probability = torch.from_numpy(oracles.probabilities(stale))[:, slots]
    can_draw = [i for i in range(len(queries)) if float(cache_logit[i]) > -math.inf and each[i]]
    sizes, inverse = [], [0.0] * len(slots)
    if draw.for_batch:
        for m in exist:
            above = float(draw.score[0, m].double() - draw.threshold[0, 0].double())
            inverse[m] = 1.0 if above == math.inf else -1 / math.expm1(-math.exp(above))
    for i in can_draw:
        weights = []
        for m in exist:
            if draw.for_batch:
                weight = inverse[m] * float(probability[i, m])
                if options.get("staleness_correction", "self_normalized") != "none" and weight > 0:
                    weight *= math.exp(float(fresh[i, m] - stale[i, slots[m]]))
                weights.append(weight)
                continue
            if options.get("share_draws", True):
                expected = float(samples * probability[:, m].sum())
                weight = float(probability[i, m]) / expected if expected > 0 else 0.0
            else:
                weight = 1 / samples if m // samples == i else 0.0
            if options.get("staleness_correction", "self_normalized") != "none" and weight > 0:
                weight *= math.exp(float(fresh[i, m] - stale[i, slots[m]]))
            weights.append(weight)
        sizes.append(sum(weights) ** 2 / sum(w * w for w in weights) if any(weights) else 0.0)
    held = items["embedding"].double()
    drifts = [float((negatives[m] - held[slots[m]]).square().sum() / negatives[m].square().sum()) for m in exist]
    own_metrics = {"unique_draws": len({slots[m] for m in exist}) / max(len(exist), 1)}
    if draw.for_batch:
        share = torch.tensor([mean([share for _, share in row]) for row in each], dtype=torch.float64)
        gradients = [(share[can_draw] * probability[can_draw, m]) @ queries[can_draw] for m in range(len(slots))]
        variance = sum((r - 1) * r * float(v @ v) for r, v in zip(inverse, gradients, strict=True))
        whole = sum(r * v for r, v in zip(inverse, gradients, strict=True))
        own_metrics = {"draw_noise": math.sqrt(variance) / max(float(torch.as_tensor(whole).norm()), 1e-300)}
    return own_metrics | {
        "exact_loss": mean([mean([loss for loss, _ in row]) for row in trained]),
        "positive_probability": mean([mean([math.exp(-loss) for loss, _ in row]) for row in trained]),
        "cache_share": mean([mean([share for _, share in row]) for row in trained]),
        "occupancy": len(live) / len(at),
        "cache_age_steps": sum(now - at[j] for j in live) / max(len(live), 1),
        "draw_age_steps": sum(now - at[slots[m]] for m in exist) / max(len(exist), 1),
        "drift": sum(drifts) / max(len(drifts), 1),
        "effective_sample_size": sum(sizes) / max(len(sizes), 1),
        "masked_pairs": masked_pairs(
            queries, items, draw, can_draw, positives, limits["max_score"], shared, options, limits["labels"]
        ),
        "non_finite": 0.0,
    }


def masked_pairs(
    queries: Tensor,
    items: TensorDictBase,
    draw: negcache_fn.Draw,
    can_draw: list[int],
    positives: list[list[int]] | None,
    limit: list[float] | None,
    shared: dict[str, Any],
    options: dict[str, Any],
    labels: tuple[list[int], list[int]] | None,
) -> float:
    """Share of the pairs of a query and a draw (of another query, or for the batch) that are false negatives.

    Of queries that have something to draw, and draws that are there.
    """
    if not options.get("share_draws", True):
        return 0.0
    count = 0
    draws = [(-1 if draw.for_batch else who, int(j)) for who, row in enumerate(draw.slot) for j in row if int(j) >= 0]
    bare = oracles.cache_scores(queries, items["embedding"], **shared)
    for i in can_draw:
        named = set(positives[i]) if positives is not None else set()
        if options.get("ids") is not None and not options.get("in_batch", True):
            named |= {int(options["ids"][j]) for j in targets_of(len(queries), options)[i].tolist() if j >= 0}
        for who, j in draws:
            if labels is not None and labels[0][i] == labels[1][j] != -1:
                count += who != i
                continue
            by_id = int(items["id"][j]) != -1 and int(items["id"][j]) in named
            count += who != i and (by_id or (limit is not None and float(bare[i, j]) > limit[i]))
    return count / max(len(can_draw) * len(draws), 1)


def same_metrics(given: dict[str, Tensor], expected: dict[str, float], tolerance: float = 1e-4) -> None:
    """Flat, detached, 0-d, and equal to the naive ones."""
    assert set(given) == set(expected) and set(given) in (OF_BATCH, OF_QUERIES)
    for key, value in given.items():
        assert isinstance(value, Tensor)
        assert value.shape == ()
        assert not value.requires_grad
        close = is_close(value, torch.tensor(expected[key], dtype=torch.float64), tolerance)
        assert close, f"{key}: {float(value)} against {expected[key]}"


def as_tensordict(batch: dict[str, Any]) -> TensorDict:
    """The same batch as a TensorDict."""
    return TensorDict(batch, batch_size=[len(batch["words"])])
