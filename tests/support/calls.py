"""Valid arguments of every public function, and what can be wrong with each kind of argument."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

import negcache_fn
from negcache_fn import distributed, nn
from negcache_fn import random as noise
from tests.support.builders import at_step

Arguments = dict[str, Any]
TEXTS = {document: f"text {document % 7}" for document in range(-9, 40)}


class World:
    """A cache, a batch that fits it, and what is known of them; all drawn from one seed."""

    def __init__(self, seed: int) -> None:
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.capacity, self.dim = self.random.choice([6, 9, 70]), self.random.choice([2, 4])
        self.queries, self.rows = self.random.choice([(1, 1), (2, 2), (2, 4), (3, 5)])
        self.kind = self.random.choice(["tensor", "ids", "nested", "TensorDict"])
        dtype = self.random.choice(
            [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]
        )
        state = negcache_fn.init_cache(
            self.capacity, self.dim, self.features(1, width=4), embedding_dtype=dtype, seed=self.random.choice([0, -5])
        )
        for _ in range(self.random.choice([0, 1, 2, 3])):
            more = {"ids": self.ids(5), "log_weights": self.normal(5)}
            state = negcache_fn.update(state, self.features(5), self.normal(5, self.dim), **more)
        self.state = state

    def choose(self, *values: Any) -> Any:
        return self.random.choice(values)

    def maybe(self, **arguments: Any) -> Arguments:
        """Some of the arguments."""
        return {name: value for name, value in arguments.items() if self.random.random() < 0.4}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(-3, 12, shape, generator=self.generator)

    def features(self, rows: int, *, width: int = 3) -> Any:
        numbers = torch.randint(1, 9, (rows, width), generator=self.generator)
        if self.kind == "tensor":
            return self.normal(rows, width)
        if self.kind == "ids":
            return {"ids": numbers}
        nested = {"text": {"ids": numbers, "mask": numbers > 3}, "price": self.normal(rows)}
        return nested if self.kind == "nested" else TensorDict(nested, [rows])

    def encode(self, features: Any) -> Tensor:
        """Embeddings of the first leaf, without parameters."""
        while not isinstance(features, Tensor):
            features = features["text" if "text" in features else "ids"]
        total = features.float().cos().sum(1, keepdim=True)
        return torch.cat([total.sin() * (n + 1) for n in range(self.dim)], 1)

    def scored(self) -> Arguments:
        scale = self.choose(1.0, 20, torch.tensor(3.0), torch.tensor(3.0, requires_grad=True))
        return self.maybe(scale=scale, score_transform=torch.tanh)

    def known(self, *, function: bool = False, drawn: bool = False) -> negcache_fn.FalseNegatives:
        limits = [None, 0.5, torch.tensor(1.0), torch.linspace(-1, 2, self.queries)]
        limits += [lambda positive: positive + 1.0] if function else []
        ids, labels = self.choose(None, self.ids(self.queries, 2)), None
        if not drawn and self.random.random() < 0.3:  # those that a draw was made with
            labels = negcache_fn.Labels(*(self.ids(rows) for rows in (self.queries, self.rows, self.capacity)))
        return negcache_fn.FalseNegatives(ids, self.choose(*limits), labels)

    def facts(self) -> Arguments:
        return self.maybe(ids=self.ids(self.rows), log_weights=self.normal(self.rows))

    def targets(self) -> Arguments:
        rows = torch.randint(-1, self.rows, (self.queries, 1), generator=self.generator)
        return self.maybe(positive_rows=rows)

    def drawing(self) -> Arguments:
        number = self.choose({}, {"num_draws": self.choose(1, 5)}, {"draws_per_query": self.choose(1, 3)})
        return number | self.maybe(top_k=self.choose(1, 3))

    def asked(self) -> Tensor:
        dtype = self.choose(torch.float32, torch.float32, torch.float64, torch.bfloat16)
        return self.normal(self.queries, self.dim).to(dtype).requires_grad_(self.choose(True, False))

    def drawn(self, state: TensorDictBase | None = None, **options: Any) -> negcache_fn.Draw:
        state = self.state if state is None else state
        return negcache_fn.sample_gumbel(state, self.questions, **options)

    @property
    def questions(self) -> Tensor:
        return torch.linspace(-1, 1, self.queries * self.dim).view(self.queries, self.dim)

    def mined(self) -> Arguments:
        return {"scores": self.normal(self.queries, 6), "ids": self.ids(self.queries, 6)}


def update(w: World) -> Arguments:
    refresh = (torch.randint(-1, w.capacity, (3,), generator=w.generator), w.normal(3, w.dim))
    priorities = w.choose(w.normal(w.capacity), torch.arange(w.capacity))
    more = w.maybe(
        refresh=refresh, evict=w.choose("lru", "fifo"), priorities=priorities, cacheable=w.normal(w.rows) > 0
    )
    embeddings = w.normal(w.rows, w.dim)
    embeddings[0, 0] = w.choose(0.5, float("nan"), float("inf"))
    return {"state": w.state, "features": w.features(w.rows), "embeddings": embeddings} | w.facts() | more


def step(w: World) -> Arguments:
    options = w.maybe(
        in_batch=w.choose(True, False), reduction=w.choose("mean", "sum", "none"), evict=w.choose("lru", "fifo")
    ) | w.maybe(staleness_correction="none", refresh_stalest=w.choose(1, 0.2))
    options |= w.choose({}, {"score_transform": torch.tanh}, {"hardness": w.choose(2, 0.5)})
    more = w.maybe(
        scale=w.choose(2, torch.tensor(3.0)), cacheable=w.normal(w.rows) > 0, priorities=w.normal(w.capacity)
    )
    given = {"state": w.state, "queries": w.asked(), "features": w.features(w.rows), "encode": w.encode}
    return (
        given
        | w.facts()
        | more
        | {
            "options": negcache_fn.StepOptions(**(w.drawing() | options)),
            "false_negatives": w.known(function=True),
        }
        | w.targets()
    )


def loss(w: World) -> Arguments:
    draw = w.drawn(**w.choose({"num_draws": 3}, {"draws_per_query": 2}))
    more = w.maybe(
        scale=1.0, in_batch=w.choose(True, False), staleness_correction="none", reduction="none", hardness=2.0
    )
    negatives = w.normal(draw.slot.numel(), w.dim)
    given = {"queries": w.questions, "documents": w.normal(w.rows, w.dim), "negatives": negatives, "draw": draw}
    return given | w.facts() | w.targets() | more | {"false_negatives": w.known(function=True, drawn=True)}


def exact_loss(w: World) -> Arguments:
    more = w.maybe(in_batch=w.choose(True, False), reduction="sum", top_k=w.choose(1, 4), weigh_positives=False)
    given = {"state": w.state, "queries": w.asked(), "documents": w.normal(w.rows, w.dim)}
    return given | w.scored() | w.facts() | w.targets() | more | {"false_negatives": w.known(function=True)}


def sample_gumbel(w: World) -> Arguments:
    drawing = w.drawing()
    if "draws_per_query" not in drawing:
        drawing |= w.maybe(importance=w.normal(w.queries).exp())
    exclude = w.choose(w.ids(3), w.ids(w.queries, 2))
    more = w.maybe(exclude_ids=exclude, false_negatives=w.known())
    return {"state": w.state, "queries": w.asked()} | drawing | w.scored() | more


def top_negatives(w: World) -> Arguments:
    more = w.maybe(exclude_ids=w.choose(w.ids(3), w.ids(w.queries, 2)), false_negatives=w.known())
    return {"state": w.state, "queries": w.asked(), "n": w.choose(1, 4)} | w.scored() | more


def merge_draws(w: World) -> Arguments:
    number = w.choose({"num_draws": 3}, {"draws_per_query": 2})
    return {"a": w.drawn(**number), "b": w.drawn(at_step(w.state, 50), **number)}


def merged(w: World) -> Arguments:
    draw = negcache_fn.merge_draws(**merge_draws(w))
    return {"states": [w.state, w.state], "draw": draw}


def observed(w: World) -> TensorDictBase:
    frequency = negcache_fn.init_frequency(7, hashes=w.choose(1, 5))
    return negcache_fn.observe(frequency, w.ids(4))


def counters(w: World) -> Arguments:
    return {name: torch.arange(3) for name in ("seed", "step", "row", "quad")} | {"level": w.choose(0, 2)}


def padding(w: World) -> Arguments:
    values = {"tensor": 2, "ids": {"ids": 3}}.get(w.kind, {"text": {"ids": 1}})
    return {"state": w.state, "features": w.features(w.rows), "values": values}


VALID: dict[str, Callable[[World], Arguments]] = {
    "age_histogram": lambda w: {"state": w.state} | w.maybe(bins=3),
    "chunked": lambda w: {"encode": w.encode, "size": 2},
    "exact_loss": exact_loss,
    "hard_negatives": lambda w: (
        w.mined() | w.maybe(positives=w.ids(w.queries, 2), texts=TEXTS, num_negatives=2, range_min=1, min_score=0.1)
    ),
    "init_cache": lambda w: (
        {"capacity": 5, "embedding_dim": 3, "features": w.features(2)}
        | w.maybe(seed=w.choose(3, -(2**63)), embedding_dtype=torch.float16, device="cpu")
    ),
    "init_frequency": lambda w: {"buckets": 9} | w.maybe(hashes=2, device="cpu"),
    "log_frequency": lambda w: {"frequency": observed(w), "ids": w.ids(4)},
    "loss": loss,
    "memory_mapped": lambda w: {"state": w.state, "folder": None} | w.maybe(capacity=80),
    "merge_draws": merge_draws,
    "observe": lambda w: {"frequency": observed(w), "ids": w.ids(4)} | w.maybe(rate=0.5, mask=w.normal(4) > 0),
    "occupancy": lambda w: {"state": w.state},
    "offload_features": lambda w: {"state": w.state} | w.maybe(device="cpu"),
    "pad_features": padding,
    "prefill": lambda w: (
        {"state": w.state, "batches": [w.features(2), (w.features(3), w.ids(3))], "encode": w.encode}
        | w.maybe(options=negcache_fn.StepOptions(evict="fifo"))
    ),
    "reembed": lambda w: {"state": w.state, "encode": w.encode} | w.maybe(batch_size=2),
    "require_finite": lambda w: {"encode": w.encode},
    "reset": lambda w: {"state": w.state},
    "resize": lambda w: {"state": w.state, "capacity": w.choose(3, 90)},
    "sample_gumbel": sample_gumbel,
    "score": lambda w: {"state": w.state, "queries": w.asked()} | w.scored(),
    "split_refresh": lambda w: (lambda draw: {"draw": draw, "embeddings": w.normal(draw.slot.numel(), w.dim)})(
        merged(w)["draw"]
    ),
    "stalest": lambda w: {"state": w.state, "n": 2},
    "step": step,
    "take": lambda w: {"state": w.state, "slots": w.choose(torch.tensor([1, -1]), torch.tensor([[0], [2]]))},
    "take_drawn": merged,
    "top_negatives": top_negatives,
    "training_rows": lambda w: (
        {"queries": ["a"] * w.queries, "texts": TEXTS}
        | {"positives": w.ids(w.queries, 2), "negatives": w.ids(w.queries, 2)}
        | w.maybe(output_format=w.choose("n-tuple", "passages"))
    ),
    "update": update,
    "validate": lambda w: {"state": w.state},
    "StepOptions": lambda w: w.drawing() | w.maybe(in_batch=False, reduction="sum", evict="fifo", refresh_stalest=0.1),
    "nn.Cache": lambda w: {"state": w.state},
    "nn.NegativeCacheLoss": lambda w: (
        {"state": w.state} | w.maybe(scale=2.0, learnable_scale=True, options=negcache_fn.StepOptions(num_draws=3))
    ),
    "nn.Scale": lambda w: {"scale": w.choose(2, 20.0)} | w.maybe(learnable=True, max_scale=50.0),
    "random.gumbel": counters,
    "random.philox": lambda w: {"counter": (torch.arange(3),) * 4, "key": (torch.tensor(1),) * 2},
    "distributed.local_capacity": lambda w: {"capacity": 3072},
}
VALID |= {f"{name}_": VALID[name] for name in ("update", "step", "reembed")}


def function_named(name: str) -> Callable[..., Any]:
    """The function, or the class, by its name in `VALID`."""
    owners = {"nn": nn, "random": noise, "distributed": distributed}
    owner, _, rest = name.rpartition(".")
    return getattr(owners.get(owner, negcache_fn), rest)
