"""What is right, written naively: float64, materialised, loops, and nothing of the package.

Formulas are those of the design: `s_ij = t(scale * q_i . e_j) + log_weight_j`, the cache one class with logit `c_i`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

Transform = Callable[[Tensor], Tensor]


def identity(scores: Tensor) -> Tensor:
    """No transform."""
    return scores


def cache_scores(
    queries: Tensor,
    embedding: Tensor,
    *,
    live: Sequence[bool] | None = None,
    log_weight: Tensor | None = None,
    ids: Sequence[int] | None = None,
    exclude: Sequence[Sequence[int]] | None = None,
    scale: float | Tensor = 1.0,
    transform: Transform | None = None,
    hardness: float = 0.0,
    top_k: int | None = None,
    max_score: Sequence[float] | None = None,
    labels: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Tensor:
    """`[B, C]` float64 scores, -inf where a slot is empty, excluded for that query, or below its `top_k` best.

    `exclude[i]` lists the ids that are no negatives of query i; -1 is anonymous and matches nothing. A document whose
    score, without its log-weight, is above `max_score[i]` is none either, nor is one of the query's label, unless that
    is -1; the labels are those of the queries and of the slots.
    """
    queries, embedding = queries.double(), embedding.double()
    rows, capacity = queries.shape[0], embedding.shape[0]
    scores = (transform or identity)(scale * (queries @ embedding.T))
    if hardness:
        scores = scores + hardness * (queries @ embedding.T).detach()
    bare = scores.detach().tolist()
    if log_weight is not None:
        scores = scores + log_weight.double()
    keep = np.ones((rows, capacity), dtype=bool)
    for i in range(rows):
        banned = {int(x) for x in exclude[i] if int(x) != -1} if exclude is not None else set()
        for j in range(capacity):
            if live is not None and not bool(live[j]):
                keep[i, j] = False
            if banned and ids is not None and int(ids[j]) in banned:
                keep[i, j] = False
            if max_score is not None and bare[i][j] > max_score[i]:
                keep[i, j] = False
            if labels is not None and int(labels[0][i]) == int(labels[1][j]) != -1:
                keep[i, j] = False
    if top_k is not None:
        values = scores.detach().numpy()
        for i in range(rows):
            candidates = sorted((j for j in range(capacity) if keep[i, j]), key=lambda j: (-values[i, j], j))
            for j in candidates[top_k:]:
                keep[i, j] = False
    return torch.where(torch.from_numpy(keep), scores, torch.full_like(scores, -math.inf))


def log_normalizer(scores: Tensor) -> Tensor:
    """`[B]` logsumexp over a row, -inf where nothing is live, and a zero (not NaN) gradient there."""
    out = []
    for row in scores:
        finite = row[torch.isfinite(row.detach())]
        out.append(torch.logsumexp(finite, 0) if len(finite) else torch.tensor(-math.inf, dtype=torch.float64))
    return torch.stack(out)


def probabilities(scores: Tensor) -> np.ndarray:
    """`[B, C]` softmax as numpy; a row with nothing live is all zero."""
    values = scores.detach().numpy()
    out = np.zeros_like(values)
    for i, row in enumerate(values):
        if np.isfinite(row).any():
            weights = np.exp(row - row.max())
            out[i] = weights / weights.sum()
    return out


def excluded_ids(
    ids: Sequence[int] | None, rows: int, *, in_batch: bool, targets: Sequence[Sequence[int]] | None = None
) -> list[list[int]] | None:
    """Ids that are no negatives: every document's with `in_batch`, else each query's own positive's."""
    if ids is None:
        return None
    own = [[i] for i in range(rows)] if targets is None else targets
    return [[int(x) for x in ids] if in_batch else [int(ids[j]) if j >= 0 else -1 for j in own[i]] for i in range(rows)]


def batch_classes(rows: int, documents: int, ids: Sequence[int] | None, *, in_batch: bool) -> list[list[int]]:
    """For each query the documents that are classes beside its positive.

    None without `in_batch`; not those with the id of its positive; of several with one id only the first.
    """
    classes: list[list[int]] = []
    for i in range(rows):
        mine = []
        for j in range(documents if in_batch else 0):
            if j == i:
                continue
            if ids is not None and int(ids[j]) != -1:
                if int(ids[j]) == int(ids[i]):
                    continue
                if any(int(ids[e]) == int(ids[j]) for e in range(j)):
                    continue
            mine.append(j)
        classes.append(mine)
    return classes


def cross_entropy(
    queries: Tensor,
    documents: Tensor,
    cache_logit: Tensor,
    *,
    ids: Sequence[int] | None = None,
    log_weights: Tensor | None = None,
    in_batch: bool = True,
    scale: float | Tensor = 1.0,
    transform: Transform | None = None,
    hardness: float = 0.0,
    positives: Sequence[Sequence[int]] | None = None,
    max_score: Sequence[float] | None = None,
    targets: Sequence[Sequence[int]] | None = None,
    weigh_positives: bool = True,
    labels: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Tensor:
    """`[B]` losses `logsumexp(s_pos, in-batch scores, c_i) - s_pos` with the cache as one class of logit `c_i`.

    Other documents of the batch whose id is in `positives[i]`, or whose score without log-weight is above
    `max_score[i]`, are no classes of query i. Negatives weigh more by `hardness` times their inner product, a constant.

    `targets[i]` are the rows of its positives, -1 for none, instead of row i: the loss is the mean over them, each
    without the others among its classes, and 0 if there are none. Without `weigh_positives` their scores have no
    log-weight. With labels, of the queries and of the documents, other documents of the query's label are no classes.
    """
    queries, documents = queries.double(), documents.double()
    scores = (transform or identity)(scale * (queries @ documents.T))
    penalties = hardness * (queries @ documents.T).detach()
    bare = (scores + penalties).detach().tolist()
    if log_weights is not None:
        scores = scores + log_weights.double()
    classes = batch_classes(len(queries), len(documents), ids, in_batch=in_batch)
    losses = []
    for i in range(len(queries)):
        wanted = [i] if targets is None else [int(j) for j in targets[i] if int(j) >= 0]
        mine = classes[i]
        if targets is not None:
            mine = negatives_beside(wanted, len(documents), ids, in_batch=in_batch)
        if positives is not None and ids is not None:
            mine = [j for j in mine if int(ids[j]) == -1 or int(ids[j]) not in positives[i]]
        if max_score is not None:
            mine = [j for j in mine if bare[i][j] <= max_score[i]]
        if labels is not None:
            mine = [j for j in mine if int(labels[0][i]) == -1 or int(labels[1][j]) != int(labels[0][i])]
        logits = [scores[i, j] + penalties[i, j] for j in mine]
        if math.isfinite(float(cache_logit[i].detach())):
            logits.append(cache_logit[i])
        each = [0.0 * queries[i].sum()]
        for j in wanted:
            weighed = log_weights is None or weigh_positives
            positive = scores[i, j] if weighed else scores[i, j] - torch.as_tensor(log_weights)[j].double()
            each.append(torch.logsumexp(torch.stack([positive, *logits]), 0) - positive)
        losses.append(torch.stack(each).sum() / max(len(wanted), 1))
    return torch.stack(losses)


def negatives_beside(wanted: Sequence[int], documents: int, ids: Sequence[int] | None, *, in_batch: bool) -> list[int]:
    """The documents that are negatives of a query whose positives are the rows `wanted`.

    None without `in_batch`; not those with the id of one of its positives; of several with one id only the first.
    """
    names = [-1] * documents if ids is None else [int(name) for name in ids]
    known = {names[j] for j in wanted} - {-1}
    return [
        j
        for j in range(documents if in_batch else 0)
        if j not in wanted and names[j] not in known and (names[j] == -1 or names[j] not in names[:j])
    ]


def sampled_cache_logits(
    fresh: Tensor,
    stale: Tensor,
    probability: Tensor,
    normalizer: Tensor,
    draws_per_query: int,
    *,
    share_draws: bool,
    staleness_correction: str,
) -> Tensor:
    """`[B]` logits `c_i` of the cache class from `B*k` draws, by the formulas, one weight at a time.

    `fresh`, `stale` and `probability` are `[B, B*k]`: every query's score, and probability, of every draw.
    """
    stale = stale.detach()
    logits = []
    for i in range(len(fresh)):
        first, weight_sum, ratio_sum, linear = i * draws_per_query, 0.0, 0.0, 0.0
        for m in range(fresh.shape[1]):
            if float(probability[i, m]) == 0.0:
                continue
            if share_draws:
                weight = float(probability[i, m]) / sum(draws_per_query * float(p) for p in probability[:, m])
            else:
                weight = 1 / draws_per_query if first <= m < first + draws_per_query else 0.0
            if weight > 0.0:
                weight_sum = weight_sum + weight
                ratio_sum = ratio_sum + weight * torch.exp(fresh[i, m] - stale[i, m])
                linear = linear + weight * (fresh[i, m] - fresh[i, m].detach())
        if weight_sum == 0.0:
            logits.append(normalizer[i])
        elif staleness_correction == "none":
            logits.append(normalizer[i] + linear)
        else:
            logits.append(normalizer[i] + torch.log(ratio_sum / weight_sum))
    return torch.stack(logits)


def logits_of_batch_draws(
    fresh: Tensor,
    stale: Tensor,
    normalizer: Tensor,
    log_mass: Sequence[float],
    threshold: float,
    *,
    staleness_correction: str,
) -> Tensor:
    """`[B]` logits `c_i` of the cache class from M documents drawn for the batch, one weight at a time.

    `fresh` and `stale` are `[B, M]`, differentiable, -inf where the query cannot use the draw.
    """
    inverse = [1.0 if threshold == -math.inf else -1 / math.expm1(-math.exp(mass - threshold)) for mass in log_mass]
    logits = []
    for i in range(len(fresh)):
        usable = [m for m in range(fresh.shape[1]) if float(stale[i, m].detach()) > -math.inf]
        if not usable:
            logits.append(normalizer[i])
        elif staleness_correction == "none":
            change = torch.zeros((), dtype=torch.float64)
            for m in usable:
                weight = math.exp(float((stale[i, m] - normalizer[i]).detach())) * inverse[m]
                change = change + weight * (fresh[i, m] - stale[i, m])
            logits.append(normalizer[i] + change)
        else:
            above, below = (sum(inverse[m] * torch.exp(scores[i, m]) for m in usable) for scores in (fresh, stale))
            logits.append(normalizer[i] + torch.log(torch.as_tensor(above)) - torch.log(torch.as_tensor(below)))
    return torch.stack(logits)


def masses(scores: Tensor, importance: Tensor) -> np.ndarray:
    """`[C]` masses `a_j`: the sum over queries of importance times probability."""
    return (importance.double().numpy()[:, None] * probabilities(scores)).sum(0)


def joint_outcomes(probability: np.ndarray, draws_per_query: int) -> Iterator[tuple[list[list[int]], float]]:
    """Every joint draw of `draws_per_query` slots by each query, with its probability: `C^(B*k)` outcomes.

    A query that can draw nothing draws -1.
    """
    choices = [[j for j in range(probability.shape[1]) if row[j] > 0] or [-1] for row in probability]
    for flat in itertools.product(*(choices[i] for i in range(len(choices)) for _ in range(draws_per_query))):
        slots = [list(flat[n : n + draws_per_query]) for n in range(0, len(flat), draws_per_query)]
        weight = math.prod(float(probability[i, j]) for i, row in enumerate(slots) for j in row if j >= 0)
        yield slots, weight


def ordered_draws(mass: np.ndarray, draws: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every ordered draw of different slots, each from the masses of what is left (Plackett-Luce), and its chance.

    So many of them, or all if there are fewer.
    """
    support = [j for j in range(len(mass)) if mass[j] > 0]
    for slots in itertools.permutations(support, min(draws, len(support))):
        chance = 1.0
        for n, j in enumerate(slots):
            chance *= float(mass[j]) / sum(float(mass[left]) for left in support if left not in slots[:n])
        yield slots, chance


def sets_of_draws(
    mass: np.ndarray, draws: int, width: float = 0.05
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Every set of so many slots, with nodes of a quadrature over the largest perturbed mass outside it, and weights.

    Document j arrives at an exponential time of rate `a_j`; those that come first are drawn, and minus the logarithm of
    an arrival is its perturbed mass. With `R` the rate of the others, the first of them comes at a time of density
    `R exp(-R t)`, and by then those of the set have come with probability `prod_j (1 - exp(-a_j t))`. The integral over
    t is double exponential, with nodes `width` apart. The weights of everything sum to 1.
    """
    support = [j for j in range(len(mass)) if mass[j] > 0]
    if len(support) <= draws:
        yield support, np.full(1, -math.inf), np.ones(1)
        return
    place = np.arange(-4.5, 5.0, width)
    node = np.exp(place - np.exp(-place))
    weight = width * node * (1 + np.exp(-place))
    for slots in itertools.combinations(support, draws):
        rest = sum(float(mass[j]) for j in support if j not in slots)
        chance = np.prod([-np.expm1(-float(mass[j]) * node / rest) for j in slots], axis=0) * np.exp(-node) * weight
        yield list(slots), -np.log(node / rest), chance


def race_along_tree(
    mass: np.ndarray, noise: Callable[[int, np.ndarray], np.ndarray], lengths: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Slots in the order in which they arrive, and their times, when every level of a tree has Gumbel noise of its own.

    `lengths` are the slots of a node of each level, longest first, and `noise(level, columns)` its variates. A node of
    mass `a` arrives at an exponential time of rate `a`, that is `exp(-noise) / a`. Exponential times have no memory:
    so the children of a node that arrives at a given time are those of a race of their own that begins so late that
    its first arrival is at that time. Slots without mass never arrive.
    """
    mass = np.pad(mass, (0, -len(mass) % lengths[0]))
    parents = np.zeros(1)
    for level, length in enumerate(lengths):
        of_node = mass.reshape(-1, length).sum(1)
        with np.errstate(divide="ignore"):
            own = np.exp(-noise(level, np.arange(len(of_node)))) / of_node
        if level > 0:
            own = own.reshape(len(parents), -1)
            with np.errstate(invalid="ignore"):
                own = own + (parents - own.min(1))[:, None]
            own = np.where(of_node.reshape(own.shape) > 0, own, math.inf).ravel()
        parents = own
    order = np.argsort(parents, kind="stable")
    order = order[np.isfinite(parents[order])]
    return order, parents[order]


def philox4x32(counter: Sequence[int], key: Sequence[int], rounds: int = 10) -> list[int]:
    """Philox-4x32 in Python integers (Salmon, Moraes, Dror, Shaw, SC 2011)."""
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & word, (first >> 32) ^ c3 ^ k1, first & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return [c0, c1, c2, c3]


def chi_square_pvalue(counts: np.ndarray, probability: np.ndarray, min_expected: float = 8.0) -> float:
    """p-value of `counts` under `probability`, 0.0 if anything impossible was counted.

    Rare categories are pooled, in order, until each bin expects `min_expected`. A test that fails below p raises a
    false alarm with probability p: callers use `FALSE_ALARM`.
    """
    if counts[probability == 0].sum() > 0:
        return 0.0
    total = counts.sum()
    observed, expected = [], []
    pooled_count = pooled_expectation = 0.0
    for j in np.argsort(-probability, kind="stable"):
        pooled_count += counts[j]
        pooled_expectation += probability[j] * total
        if pooled_expectation >= min_expected:
            observed.append(pooled_count)
            expected.append(pooled_expectation)
            pooled_count = pooled_expectation = 0.0
    if pooled_expectation > 0:
        if not expected:
            return 1.0
        observed[-1] += pooled_count
        expected[-1] += pooled_expectation
    if len(expected) == 1:
        return 1.0
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return float(stats.chi2.sf(statistic, len(expected) - 1))


FALSE_ALARM = 1e-6
"""A statistical check fails where a right implementation would do so with this probability (seeds are fixed)."""
