"""Small problems in float64: queries, documents, a tiny encoder, a cache, and the draw of any joint outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from negcache_fn import Draw, FalseNegatives, Labels
from tests.support import oracles
from tests.support.builders import make_state

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Scenario:
    """A small problem: B queries, N documents, C cached documents of a tiny encoder `tanh(X W)`, k draws a query."""

    rows: int = 2
    documents: int = 3
    capacity: int = 4
    samples: int = 1
    in_batch: bool = True
    ids: tuple[int, ...] | None = None
    cache_ids: tuple[int, ...] | None = None
    log_weights: tuple[float, ...] | None = None
    cache_log_weight: tuple[float, ...] | None = None
    live: tuple[bool, ...] | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    hardness: float = 0.0
    top_k: int | None = None
    positives: tuple[tuple[int, ...], ...] | None = None
    margin: float | None = None
    targets: tuple[tuple[int, ...], ...] | None = None
    weigh_positives: bool = True
    labels: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None  # of queries, documents, slots
    split: int | None = None
    scale: float = 3.0
    drift: float = 0.0
    seed: int = 0


@dataclass
class Problem:
    """A scenario's tensors in float64; the leaves are what gradients are compared for."""

    scenario: Scenario
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        it, generator = self.scenario, torch.Generator().manual_seed(100 + self.scenario.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.cached = normal(it.capacity, 3)
        self.leaves = {
            "queries": normal(it.rows, 2),
            "documents": normal(it.documents, 2),
            "encoder": normal(3, 2),
            "scale": torch.tensor(it.scale, dtype=torch.float64),
        }
        self.stale = torch.tanh(self.cached @ (self.leaves["encoder"] + it.drift * normal(3, 2)))
        self.row_weight = 0.5 + torch.rand(it.rows, generator=generator, dtype=torch.float64)
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self.ids = None if it.ids is None else torch.tensor(it.ids)
        self.weights = None if it.log_weights is None else torch.tensor(it.log_weights, dtype=torch.float32)
        cached = it.cache_log_weight or (0.0,) * it.capacity
        self.cache_weight = torch.tensor(cached, dtype=torch.float32)
        self.names = it.cache_ids or (-1,) * it.capacity
        self.exclude = oracles.excluded_ids(it.ids, it.rows, in_batch=it.in_batch, targets=it.targets)
        self.exclude_all = self.exclude
        if it.positives is not None:
            self.exclude_all = [[*(self.exclude[i] if self.exclude else []), *it.positives[i]] for i in range(it.rows)]
        self.max_score = None if it.margin is None else [float(score) + it.margin for score in self._positive_scores()]
        self.parts = [(0, it.capacity)] if it.split is None else [(0, it.split), (it.split, it.capacity)]
        self.stale_scores = self.scores(self.stale).detach()
        self.probability = oracles.probabilities(self.stale_scores)
        self.normalizer = oracles.log_normalizer(self.stale_scores)

    def _positive_scores(self) -> Tensor:
        queries, documents, scale = (self.leaves[name].detach() for name in ("queries", "documents", "scale"))
        first = (
            list(range(len(queries))) if self.scenario.targets is None else [row[0] for row in self.scenario.targets]
        )
        products = (queries * documents[first]).sum(-1)
        return (self.scenario.transform or oracles.identity)(scale * products) + self.scenario.hardness * products

    @property
    def false_negatives(self) -> FalseNegatives:
        """As a user gives them."""
        it = self.scenario
        ids = None if it.positives is None else torch.tensor(it.positives)
        labels = None if it.labels is None else Labels(*map(torch.tensor, it.labels))
        return FalseNegatives(ids, None if it.margin is None else lambda positive: positive + it.margin, labels)

    def encode(self) -> Tensor:
        """Fresh embeddings of all cached documents."""
        return torch.tanh(self.cached @ self.leaves["encoder"])

    def scores(self, embedding: Tensor) -> Tensor:
        """`[B, C]` scores of negatives; what is excluded, or under the stale `top_k` of its part, is -inf."""
        it, out = self.scenario, []
        for start, stop in self.parts:
            options: dict[str, Any] = {
                "log_weight": self.cache_weight[start:stop],
                "live": None if it.live is None else it.live[start:stop],
                "ids": self.names[start:stop],
                "exclude": self.exclude_all,
                "scale": self.leaves["scale"],
                "transform": it.transform,
                "hardness": it.hardness,
                "labels": None if it.labels is None else (it.labels[0], it.labels[2][start:stop]),
            }
            queries = self.leaves["queries"]
            scores = oracles.cache_scores(queries, embedding[start:stop], **options)
            if it.top_k is not None or it.margin is not None:
                options |= {"top_k": it.top_k, "max_score": self.max_score}
                held = oracles.cache_scores(queries, self.stale[start:stop], **options)
                scores = torch.where(held.detach() > -math.inf, scores, -math.inf)
            out.append(scores)
        return torch.cat(out, 1)

    def exact(self) -> Tensor:
        """`[B]` exact losses over batch and fresh cache, differentiable."""
        return self._cross_entropy(oracles.log_normalizer(self.scores(self.encode())))

    def _cross_entropy(self, logits: Tensor) -> Tensor:
        it = self.scenario
        return oracles.cross_entropy(
            self.leaves["queries"],
            self.leaves["documents"],
            logits,
            ids=it.ids,
            log_weights=self.weights,
            in_batch=it.in_batch,
            scale=self.leaves["scale"],
            transform=it.transform,
            hardness=it.hardness,
            positives=it.positives,
            max_score=self.max_score,
            targets=it.targets,
            weigh_positives=it.weigh_positives,
            labels=None if it.labels is None else it.labels[:2],
        )

    @property
    def of_positives(self) -> dict[str, Any]:
        """What is said of the positives, as a user says it."""
        it, said = self.scenario, {}
        if it.targets is not None:
            said["positive_rows"] = torch.tensor(it.targets)
        if not it.weigh_positives:
            said["weigh_positives"] = False
        return said

    @property
    def of_negatives(self) -> dict[str, Any]:
        """How they are weighted, as a user says it."""
        return {"hardness": self.scenario.hardness} if self.scenario.hardness else {}

    def by_formula(self, slots: Sequence[Sequence[int]], *, share_draws: bool, staleness_correction: str) -> Tensor:
        """`[B]` sampled losses of one joint draw, by the formulas of the design."""
        flat = [max(j, 0) for row in slots for j in row]
        valid = torch.tensor([j >= 0 for row in slots for j in row])
        logits = oracles.sampled_cache_logits(
            self.scores(self.encode())[:, flat],
            self.stale_scores[:, flat],
            torch.from_numpy(self.probability)[:, flat] * valid,
            self.normalizer,
            self.scenario.samples,
            share_draws=share_draws,
            staleness_correction=staleness_correction,
        )
        return self._cross_entropy(logits)

    def by_formula_of_batch(self, slots: Sequence[int], threshold: float, *, staleness_correction: str) -> Tensor:
        """`[B]` sampled losses of documents drawn for the batch, by the formulas of the design."""
        stale, drawn = self.scores(self.stale.detach()), list(slots)
        logits = oracles.logits_of_batch_draws(
            self.scores(self.encode())[:, drawn],
            stale[:, drawn],
            oracles.log_normalizer(stale),
            [math.log(self.mass[j]) for j in drawn],
            threshold,
            staleness_correction=staleness_correction,
        )
        return self._cross_entropy(logits)

    @property
    def importance(self) -> Tensor:
        """`[B]` of the queries: their row weights, as good as any."""
        return self.row_weight

    @property
    def mass(self) -> Any:
        """`[C]` of the documents."""
        return oracles.masses(self.stale_scores, self.importance)

    def draw_of_batch(self, slots: Sequence[int], threshold: float | Tensor) -> Draw:
        """The `Draw` that a sampler would have given for documents drawn for the batch, in that order."""
        of_query = self.draw([list(slots)] * self.scenario.rows)
        one = ("slot", "embedding", "id", "log_weight", "source", "label")
        mass = torch.tensor([[math.log(self.mass[j]) if j >= 0 else -math.inf for j in slots]], dtype=torch.float64)
        return of_query._replace(
            **{name: getattr(of_query, name)[:1] for name in one},
            score=mass,
            perturbed=mass,
            threshold=torch.as_tensor(threshold, dtype=torch.float64).view(1, 1),
            # A query without documents keeps its gradient, of 0.
            log_normalizer=oracles.log_normalizer(self.scores(self.stale.detach()))
            + 0.0 * self.leaves["queries"].sum(),
        )

    def sampled_for_batch(self, sample: Callable[..., Draw], draws: int, *, step: int = 1) -> Draw:
        """The draw that a sampler makes of the problem, for the batch."""
        it = self.scenario
        state = make_state(self.stale.detach(), live=it.live, ids=self.names, log_weight=self.cache_weight, step=step)
        exclude = None
        if self.ids is not None:
            exclude = self.ids if it.in_batch else torch.tensor(self.exclude)
        limit = None if self.max_score is None else torch.tensor(self.max_score, dtype=torch.float64)
        return sample(
            state,
            self.leaves["queries"],
            num_draws=draws,
            importance=self.importance,
            scale=self.leaves["scale"],
            score_transform=it.transform,
            **self.of_negatives,
            exclude_ids=exclude,
            top_k=it.top_k,
            false_negatives=self.false_negatives._replace(max_score=limit),
        )

    def draw(self, slots: Sequence[Sequence[int]]) -> Draw:
        """The `Draw` that a sampler would have given for these slots of each query."""
        it, slot = self.scenario, torch.tensor(slots)
        place = slot.clamp_min(0)
        start = torch.tensor([0 if it.split is None or int(j) < it.split else it.split for j in place.flatten()])
        score = self.stale_scores.gather(1, place)
        exclude = self.exclude_all if self.exclude_all is not None else [[]]
        if it.in_batch:  # what is excluded for all is not drawn
            exclude = it.positives or exclude[:1]
        return Draw(
            slot=torch.where(slot >= 0, slot - start.view_as(slot), -1),
            score=torch.where(slot >= 0, score, -math.inf),
            perturbed=score + 1.0,
            threshold=score[:, :0],
            log_normalizer=self.normalizer,
            embedding=self.stale[place],
            id=torch.where(slot >= 0, torch.tensor(self.names)[place], -1),
            log_weight=self.cache_weight[place],
            source=(start > 0).long().view_as(slot),
            cutoff=self._cutoff(),
            max_score=torch.tensor(self.max_score or [math.inf] * it.rows, dtype=torch.float64)[:, None].expand(
                -1, len(self.parts)
            ),
            exclude_ids=torch.tensor(exclude, dtype=torch.int64),
            label=torch.full_like(slot, -1) if it.labels is None else torch.tensor(it.labels[2])[place],
            exclude_labels=slot.new_empty(it.rows, 0) if it.labels is None else torch.tensor(it.labels[0])[:, None],
            noise=torch.zeros(len(self.parts), 2, dtype=torch.int64),
        )

    def _cutoff(self) -> Tensor:
        it = self.scenario
        cutoff = torch.full((it.rows, len(self.parts)), -math.inf, dtype=torch.float64)
        if it.top_k is not None:
            everything = Problem(replace(it, top_k=None)).stale_scores
            for n, (start, stop) in enumerate(self.parts):
                best = everything[:, start:stop].sort(dim=-1, descending=True).values
                if it.top_k < stop - start:
                    cutoff[:, n] = (best[:, it.top_k - 1] + best[:, it.top_k]) / 2
        return cutoff

    def outcomes(self) -> Iterator[tuple[list[list[int]], float]]:
        """Every joint draw of the scenario, and its probability."""
        return oracles.joint_outcomes(self.probability, self.scenario.samples)

    def call(self, loss: Loss, slots: Sequence[Sequence[int]], **options: Any) -> Tensor:
        """`loss` of one joint draw, the drawn documents encoded with gradient, `reduction="none"`."""
        flat = torch.tensor([max(j, 0) for row in slots for j in row])
        return self.call_on(loss, flat, self.draw(slots), **options)

    def call_on(self, loss: Loss, flat: Tensor, draw: Draw, **options: Any) -> Tensor:
        """`loss` of a `Draw` of the documents `flat` [R * m]."""
        it = self.scenario
        options = {"reduction": "none", **self.of_positives, **self.of_negatives, **options}
        if it.positives is not None or it.margin is not None or it.labels is not None:
            options["false_negatives"] = self.false_negatives
        return loss(
            self.leaves["queries"],
            self.leaves["documents"],
            self.encode()[flat],
            draw,
            scale=self.leaves["scale"],
            score_transform=it.transform,
            in_batch=it.in_batch,
            ids=self.ids,
            log_weights=self.weights,
            **options,
        )

    def gradients(self, losses: Tensor) -> dict[str, Tensor]:
        """Gradients of a weighted sum of the rows with respect to every leaf."""
        given = torch.autograd.grad((self.row_weight * losses).sum(), list(self.leaves.values()), allow_unused=True)
        zero = {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}
        return {name: g if g is not None else zero[name] for name, g in zip(self.leaves, given, strict=True)}


def scenarios() -> dict[str, Scenario]:
    """Small problems that together reach every argument of the loss."""
    squash = {"transform": _squash}
    ids = {"ids": (3, 5, 9), "cache_ids": (5, -1, 9, 3)}
    return {
        "plain": Scenario(),
        "one query": Scenario(rows=1, documents=1, samples=3),
        "two samples": Scenario(samples=2, capacity=3, documents=2),
        "three queries": Scenario(rows=3, documents=3, capacity=3),
        "extra documents": Scenario(documents=6),
        "no in-batch": Scenario(in_batch=False),
        "ids": Scenario(capacity=5, **{**ids, "cache_ids": (5, -1, 8, 3, 7)}),
        "ids, own positives only": Scenario(in_batch=False, **ids),
        "duplicate ids": Scenario(documents=5, ids=(3, 3, 8, 8, -1), cache_ids=(-1, 4, 8, -1)),
        "anonymous": Scenario(documents=4, ids=(-1, -1, -1, 2), cache_ids=(-1, -1, 2, -1)),
        "nothing left for one": Scenario(
            capacity=3, in_batch=False, ids=(3, 5, 9), cache_ids=(-1, 5, -1), live=(False, True, False)
        ),
        "nothing left for any": Scenario(capacity=3, ids=(3, 5, 9), cache_ids=(5, 3, 9)),
        "log-weights": Scenario(log_weights=(0.5, -1.0, 0.25), cache_log_weight=(1.5, 0.0, -0.75, 0.5)),
        "log-weights, no in-batch": Scenario(
            in_batch=False, log_weights=(0.5, -1.0, 0.25), cache_log_weight=(1.5, 0.0, -0.75, 0.5)
        ),
        "empty slots": Scenario(capacity=5, live=(False, True, True, False, True)),
        "transform": Scenario(**squash),
        "hardness": Scenario(documents=4, hardness=2.5),
        "hardness, own only": Scenario(in_batch=False, hardness=2.5),
        "hardness, all at once": Scenario(
            documents=5,
            capacity=6,
            ids=(3, 5, 9, 5, -1),
            cache_ids=(9, -1, -1, 2, 7, -1),
            log_weights=(0.5, -1.0, 0.25, 0.0, 1.0),
            cache_log_weight=(1.5, 0.0, -0.75, 0.5, 0.25, 0.0),
            live=(True, True, False, True, True, True),
            margin=0.9,
            top_k=3,
            hardness=2.5,
        ),
        "hardness, targets": Scenario(
            documents=5,
            capacity=5,
            targets=((0, 3), (4, -1)),
            log_weights=(0.5, -1.0, 0.25, 0.0, 1.0),
            weigh_positives=False,
            hardness=1.5,
        ),
        "hardness, targets, own only": Scenario(
            documents=5, capacity=4, in_batch=False, targets=((0, 3), (4, -1)), hardness=1.5
        ),
        "hardness, merged": Scenario(capacity=5, split=2, hardness=2.5),
        "top_k": Scenario(top_k=2),
        "top_k of one": Scenario(top_k=1, samples=2),
        "top_k beyond": Scenario(top_k=4, live=(True, False, True, True)),
        "merged": Scenario(capacity=5, split=2),
        "merged top_k": Scenario(capacity=6, split=3, top_k=2),
        "all at once": Scenario(
            documents=5,
            capacity=6,
            ids=(3, 5, 9, 5, -1),
            cache_ids=(9, -1, -1, 2, 7, -1),
            log_weights=(0.5, -1.0, 0.25, 0.0, 1.0),
            cache_log_weight=(1.5, 0.0, -0.75, 0.5, 0.25, 0.0),
            live=(True, True, False, True, True, True),
            top_k=3,
            **squash,
        ),
        "several positives": Scenario(
            capacity=5, ids=(3, 5, 9), cache_ids=(7, -1, 8, 2, 6), positives=((7, 9), (8, -1)), samples=1
        ),
        "several positives, anonymous": Scenario(
            capacity=3, ids=(-1, 5, -1), cache_ids=(7, -1, 8), positives=((7, -1), (-1, 8))
        ),
        "several positives, own only": Scenario(
            capacity=5, in_batch=False, ids=(3, 5, 9), cache_ids=(5, -1, 8, 3, 6), positives=((6,), (8,))
        ),
        "several positives, nothing else": Scenario(capacity=3, cache_ids=(7, -1, 8), positives=((7, 8), (8, -1))),
        "margin": Scenario(capacity=5, documents=4, margin=0.3),
        "margin, log-weights, transform": Scenario(
            capacity=5,
            documents=4,
            margin=-0.4,
            log_weights=(0.5, -1.0, 0.25, 2.0),
            cache_log_weight=(1.5, 0.0, -0.75, 0.5, 3.0),
            **squash,
        ),
        "margin, top_k, merged": Scenario(capacity=6, split=3, top_k=2, margin=0.6, in_batch=False),
        "margin that leaves nothing": Scenario(capacity=3, margin=-40.0),
        "sharp": Scenario(scale=25.0),
        "labels": Scenario(documents=4, capacity=5, labels=((4, -1), (4, -1, 4, 7), (4, -1, 7, 4, 9))),
        "labels, unnamed": Scenario(documents=4, capacity=5, labels=((-1, 4), (7, 4, -1, 4), (-1, 4, -1, 7, 4))),
        "labels, own only": Scenario(capacity=4, in_batch=False, labels=((2, 5), (0, 0, 0), (5, 2, 5, -1))),
        "labels that leave nothing": Scenario(capacity=3, labels=((2, 5), (2, 5, 5), (2, 2, 2))),
        "labels, merged": Scenario(capacity=5, split=2, labels=((-3, 5), (1, -3, -3), (5, -3, -3, 5, 1))),
        "labels, all at once": Scenario(
            documents=6,
            capacity=6,
            ids=(3, 5, 9, 5, -1, 3),
            cache_ids=(8, -1, -1, 2, 7, -1),
            cache_log_weight=(1.5, 0.0, -0.75, 0.5, 0.25, 0.0),
            positives=((7, 9), (8, -1)),
            targets=((0, 2), (4, 3)),
            labels=((4, 6), (4, 6, 4, 6, 6, 8), (4, 6, 8, 6, -1, 8)),
            live=(True, True, False, True, True, True),
            margin=None,
            top_k=2,
            **squash,
        ),
        "targets": Scenario(documents=5, capacity=5, targets=((0, 3), (4, -1))),
        "targets, own only": Scenario(
            documents=5,
            capacity=5,
            in_batch=False,
            ids=(3, 5, 9, 6, -1),
            cache_ids=(5, 6, 9, 3, -1),
            targets=((3, 0, -1), (-1, 4, 1)),
        ),
        "targets, a query without": Scenario(rows=3, documents=5, capacity=3, targets=((0, 4), (-1, -1), (2, -1))),
        "targets, nothing left": Scenario(
            capacity=2, in_batch=False, ids=(3, 5, 9), cache_ids=(3, 9), targets=((0, 2), (2, 0))
        ),
        "targets of nobody": Scenario(capacity=3, targets=((-1,), (-1,))),
        "targets, all at once": Scenario(
            documents=6,
            capacity=6,
            ids=(3, 5, 9, 5, -1, 3),
            cache_ids=(8, -1, -1, 2, 7, -1),
            log_weights=(0.5, -1.0, 0.25, 0.0, 1.0, -0.5),
            cache_log_weight=(1.5, 0.0, -0.75, 0.5, 0.25, 0.0),
            live=(True, True, False, True, True, True),
            positives=((7, 9), (8, -1)),
            targets=((0, 2), (4, 3)),
            weigh_positives=False,
            top_k=3,
            **squash,
        ),
        "targets, margin": Scenario(capacity=5, documents=4, margin=0.3, targets=((3,), (1,))),
        "positives without weights": Scenario(
            log_weights=(0.5, -1.0, 0.25), cache_log_weight=(1.5, 0.0, -0.75, 0.5), weigh_positives=False
        ),
        "positives without weights, no in-batch": Scenario(
            in_batch=False,
            log_weights=(0.5, -1.0, 0.25),
            cache_log_weight=(1.5, 0.0, -0.75, 0.5),
            weigh_positives=False,
        ),
    }


def _squash(scores: Tensor) -> Tensor:
    return 4 * torch.tanh(scores / 4)
