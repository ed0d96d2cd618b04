"""The numbers behind the pictures, each from a training that stands still."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn import functional as F

import negcache_fn
from examples.pictures.training import BATCH, SCALE, Run, Tower, train
from negcache_fn import StepOptions

__all__ = [
    "Correction",
    "Drift",
    "Gradients",
    "Life",
    "Mass",
    "correction_by_age",
    "drift_by_age",
    "gradients_by_draws",
    "lives",
    "softmax_mass",
]


class Mass(NamedTuple):
    """How much of a query's softmax over all documents but its own lies on some of them, mean over queries."""

    batch: float  # on the other documents of a batch
    cache: float  # on those that are cached
    hardest: float  # on as many as a batch has queries, the hardest of all
    capacity: int
    documents: int


class Gradients(NamedTuple):
    """Cosine of the gradient in both towers with that of the exact loss over batch and cache, mean over batches."""

    draws: list[int]
    own: list[float]
    shared: list[float]
    in_batch: float  # of the loss over the batch alone


class Correction(NamedTuple):
    """The same cosine, of the mean gradient of several draws, where every embedding is equally old."""

    ages: list[int]
    drift: list[float]
    cosine: dict[str, list[float]]  # by `staleness_correction`


class Drift(NamedTuple):
    """Quartiles of |fresh - stale|² of the cached documents, by the age of their embeddings in steps."""

    ages: list[float]
    quartiles: list[tuple[float, float, float]]


class Life(NamedTuple):
    """One document in the cache, in steps since it came."""

    left: int | None  # None: it was there at the end
    drawn: list[int]


@torch.no_grad()
def softmax_mass(run: Run, *, queries: int = 512) -> Mass:
    generator = torch.Generator().manual_seed(3)
    size = len(run.corpus.documents)
    rows = torch.randperm(size, generator=generator)[:queries]
    probability = _softmax_over_corpus(run, rows)
    others = torch.randint(size, (queries, BATCH - 1), generator=generator)
    cached = run.state["items", "id"]
    return Mass(
        batch=float(probability.gather(1, others).sum(1).mean()),
        cache=float(probability[:, cached[cached >= 0]].sum(1).mean()),
        hardest=float(probability.topk(BATCH, dim=1).values.sum(1).mean()),
        capacity=cached.shape[0],
        documents=size,
    )


def gradients_by_draws(run: Run, draws: Sequence[int], *, batches: int = 16) -> Gradients:
    fresh = negcache_fn.reembed(run.state, run.documents, batch_size=1024)
    rows = _batches_of_rows(run, batches)
    exact = [_exact_gradient(run, fresh, of_batch) for of_batch in rows]
    alone = [_gradient(run, _loss_of_batch(run, of_batch)) for of_batch in rows]

    def cosine(options: StepOptions) -> float:
        estimates = [
            _gradient(run, _sampled_loss(run, fresh, of_batch, options, seed=seed))
            for seed, of_batch in enumerate(rows)
        ]
        return _mean_cosine(estimates, exact)

    return Gradients(
        list(draws),
        [cosine(StepOptions(draws_per_query=number, share_draws=False)) for number in draws],
        [cosine(StepOptions(draws_per_query=number)) for number in draws],
        _mean_cosine(alone, exact),
    )


def correction_by_age(
    steps: int, ages: Sequence[int], *, capacity: int = 512, batches: int = 16, repeats: int = 8
) -> Correction:
    """The last encoder, with a cache of what the encoders of `ages` steps before made of the same documents."""
    earlier: dict[int, Tower] = {}

    def look(step: int, run: Run, _: negcache_fn.StepOutput) -> None:
        if steps - 1 - step in ages:
            earlier[steps - 1 - step] = copy.deepcopy(run.documents)

    run = train(steps, capacity=capacity, look=look)
    rows = _batches_of_rows(run, batches)
    fresh = negcache_fn.reembed(run.state, run.documents, batch_size=1024)
    exact = [_exact_gradient(run, fresh, of_batch) for of_batch in rows]
    found = Correction(list(ages), [], {"none": [], "self_normalized": []})
    for age in ages:
        stale = negcache_fn.reembed(run.state, earlier[age], batch_size=1024)
        found.drift.append(float(_squared_distance(fresh, stale).mean()))
        for kind, cosines in found.cosine.items():
            options = StepOptions(staleness_correction=kind)
            means = [
                torch.stack(
                    [_gradient(run, _sampled_loss(run, stale, of_batch, options, seed=seed)) for seed in range(repeats)]
                ).mean(0)
                for of_batch in rows
            ]
            cosines.append(_mean_cosine(means, exact))
    return found


def drift_by_age(steps: Sequence[int], *, capacity: int = 1024, width: int = 4, least: int = 12) -> dict[int, Drift]:
    """After each of `steps`; ages in bins of `width` steps, those with fewer than `least` documents left out.

    With "fifo" and one draw a query most documents stay as they were embedded, so that there are all ages to see.
    """
    found: dict[int, Drift] = {}

    def look(step: int, run: Run, _: negcache_fn.StepOutput) -> None:
        if step + 1 not in steps:
            return
        fresh = negcache_fn.reembed(run.state, run.documents, batch_size=1024)
        distance, age = _squared_distance(fresh, run.state), run.state["step"] - run.state["items", "embedded_at"]
        drift = Drift([], [])
        for first in range(1, int(age.max()) + 1, width):
            of_age = distance[(age >= first) & (age < first + width)]
            if len(of_age) >= least:
                low, middle, high = of_age.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
                drift.ages.append(first + (width - 1) / 2)
                drift.quartiles.append((low, middle, high))
        found[step + 1] = drift

    train(max(steps), capacity=capacity, options=StepOptions(draws_per_query=1, evict="fifo"), look=look)
    return found


def lives(evict: str, *, steps: int = 260, first_step: int = 100, documents: int = 12) -> list[Life]:
    """Of so many documents that came at `first_step` and just after: when each was drawn, and when it left."""
    came: dict[int, int] = {}
    found: dict[int, Life] = {}

    def look(step: int, run: Run, out: negcache_fn.StepOutput) -> None:
        ids, drawn = set(run.state["items", "id"].tolist()), set(out.draw.id.flatten().tolist())
        for document in [document for document, life in found.items() if life.left is None]:
            if document in drawn:
                found[document].drawn.append(step - came[document])
            if document not in ids:
                found[document] = found[document]._replace(left=step - came[document])
        arrived = run.state["items", "id"][run.state["items", "inserted_at"] == step].tolist()
        for document in arrived if step >= first_step else ():
            if len(found) < documents and document not in found:
                came[document], found[document] = step, Life(None, [])

    train(steps, capacity=128, batch=4, options=StepOptions(draws_per_query=1, evict=evict), look=look)
    return list(found.values())


def _softmax_over_corpus(run: Run, rows: Tensor) -> Tensor:
    """[len(rows), N]: of each query, over all documents but its own."""
    scores = SCALE * run.queries(run.corpus.questions[rows]) @ run.documents(run.corpus.documents).T
    return scores.scatter(1, rows[:, None], -torch.inf).softmax(1)


def _batches_of_rows(run: Run, batches: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return list(torch.randperm(len(run.corpus.documents), generator=generator)[: batches * BATCH].split(BATCH))


def _loss_of_batch(run: Run, rows: Tensor) -> Tensor:
    queries, documents = run.queries(run.corpus.questions[rows]), run.documents(run.corpus.documents[rows])
    return F.cross_entropy(SCALE * queries @ documents.T, torch.arange(len(rows)))


def _exact_gradient(run: Run, state: TensorDictBase, rows: Tensor) -> Tensor:
    """Of the cross entropy over batch and cache in plain torch, every cached document encoded with gradient."""
    ids = state["items", "id"]
    cached = run.documents(state["items", "features"])
    documents = torch.cat([run.documents(run.corpus.documents[rows]), cached])
    scores = SCALE * run.queries(run.corpus.questions[rows]) @ documents.T
    absent = torch.cat([torch.zeros(len(rows), dtype=torch.bool), (ids < 0) | torch.isin(ids, rows)])
    return _gradient(run, F.cross_entropy(scores.masked_fill(absent, -torch.inf), torch.arange(len(rows))))


def _sampled_loss(
    run: Run,
    state: TensorDictBase,
    rows: Tensor,
    options: StepOptions,
    *,
    seed: int,
) -> Tensor:
    state = state.clone()
    state["seed"].fill_(seed)
    queries, documents = run.queries(run.corpus.questions[rows]), run.documents(run.corpus.documents[rows])
    draw = negcache_fn.sample_gumbel(
        state, queries, draws_per_query=options.draws_per_query, scale=SCALE, exclude_ids=rows
    )
    negatives = run.documents(negcache_fn.take(state, draw.slot.flatten()))
    return negcache_fn.loss(
        queries,
        documents,
        negatives,
        draw,
        scale=SCALE,
        ids=rows,
        share_draws=options.share_draws,
        staleness_correction=options.staleness_correction,
    )


def _gradient(run: Run, loss: Tensor) -> Tensor:
    parameters = [*run.queries.parameters(), *run.documents.parameters()]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def _mean_cosine(estimates: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return float(F.cosine_similarity(torch.stack(list(estimates)), torch.stack(list(exact)), dim=1).mean())


def _squared_distance(fresh: TensorDictBase, stale: TensorDictBase) -> Tensor:
    return (fresh["items", "embedding"] - stale["items", "embedding"]).square().sum(1)
