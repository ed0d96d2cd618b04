"""What a sharded step sends: bytes by collective as a function of the sizes, and what a rank really sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from negcache_fn import StepOptions
from negcache_fn._ranks import agree, operators

__all__ = ["Step", "counted", "messages", "sent_bytes", "watched"]


@dataclass(frozen=True)
class Step:
    """The sizes of a step of one rank: with ids, float32 queries and embeddings that the encoder gives in float32."""

    world: int
    batch: int
    """Queries of a rank."""
    documents: int
    """Of a rank's batch, the positives included."""
    dim: int
    options: StepOptions
    """Their `refresh_stalest` is a number of slots; `top_k`, `reduction` and `placement` are the defaults."""
    feature_bytes: int = 64
    """Of one document."""
    storage_bytes: int = 4
    """Of a number of a stored embedding."""


def messages(step: Step) -> list[tuple[str, str, int, int]]:
    """(what for, collective, how many, bytes of a rank's whole buffer) of a step and its backward pass."""
    options = step.options
    whole = options.draws_for(step.batch * step.world)
    draws = whole // step.world
    world, documents, dim = step.world, step.documents, step.dim
    excluded = documents if options.in_batch else step.batch
    numbers = 8 + 4 + 1  # of a new document: id, log-weight, mask
    outcome = 8  # what became of the encoder's call
    found = [
        ("agreeing on sizes", "all_gather", 1, 8 * 15),
        ("queries, excluded ids", "all_gather", 1, 4 * step.batch * dim + 8 * excluded),
        ("slots drawn", "all_gather", 1, 8 * draws),
        (
            "their stale embeddings, numbers and features",
            "all_to_all",
            1,
            world * draws * (step.storage_bytes * dim + 8 + 4 + 8 + step.feature_bytes),
        ),
        ("slots to evict", "all_gather", 1, 8 * world * documents),
        ("slots to replace", "all_reduce", 1, 8 * world * documents),
    ]
    if options.for_batch:
        found += [
            ("log-normalisers, and their gradients", "all_to_all", 2, 2 * 4 * world * step.batch),
            ("queries: gradients", "reduce_scatter", 1, 4 * world * step.batch * dim),
            ("weights of the queries", "all_gather", 1, 4 * step.batch),
            ("draws of each part", "all_gather", 1, 8 * 3 * (whole + 1)),
            ("metrics", "all_reduce", 2, 8 * 20 + 4 * whole * dim),
        ]
    else:
        found += [
            ("draws of each part", "all_to_all", 1, world * 8 * (3 * draws + step.batch)),
            ("metrics", "all_reduce", 1, 8 * 22),
        ]
    if options.in_batch == "global":
        found += [
            (
                "new documents: features and numbers",
                "all_gather",
                1,
                documents * (step.feature_bytes + numbers) + outcome,
            ),
            ("new documents: embeddings", "all_gather", 1, 4 * documents * dim),
            ("new documents: gradients", "reduce_scatter", 1, 4 * world * documents * dim),
        ]
    else:
        row = step.feature_bytes + numbers + step.storage_bytes * dim
        found.append(("new documents", "all_gather", 1, documents * row + outcome))
    if options.share_draws:
        found += [
            (
                "draws: stale embeddings and numbers",
                "all_gather",
                1,
                draws * (step.storage_bytes * dim + 8 * 3 + 4 * 2),
            ),
            ("draws: fresh embeddings", "all_gather", 1, 4 * draws * dim),
            ("draws: gradients", "reduce_scatter", 1, 4 * world * draws * dim),
        ]
        if not options.for_batch:
            found.append(("draws: how often expected", "all_reduce", 1, 8 * world * draws))
    else:
        found.append(("draws: slots and fresh embeddings", "all_gather", 1, draws * (8 + 4 * dim)))
    if options.refresh_stalest:
        stalest = int(options.refresh_stalest)
        found += [
            ("slots to renew", "all_gather", 1, 8 * world * stalest),
            ("slots to renew, wanted", "all_gather", 1, 8 * stalest),
            ("their features", "all_to_all", 1, world * stalest * step.feature_bytes),
            ("their fresh embeddings", "all_gather", 1, 4 * stalest * dim),
        ]
    return found


def sent_bytes(collective: str, buffer_bytes: float, world: int) -> float:
    """What a rank sends for a buffer: to each of the others, or what the ring algorithm takes."""
    share = {"all_gather": world - 1, "all_to_all": 1 - 1 / world, "reduce_scatter": 1 - 1 / world}
    return buffer_bytes * share.get(collective, 2 * (1 - 1 / world))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes of this rank's buffers by collective, of all that the library hands to torch.distributed meanwhile."""
    counter: Counter[str] = Counter()

    def count(name: str, buffer: Tensor, call: Callable[[], Any]) -> Any:
        counter[name] += buffer.numel() * buffer.element_size()
        return call()

    with watched(count):
        yield counter


@contextmanager
def watched(watch: Callable[[str, Tensor, Callable[[], Any]], Any]) -> Iterator[None]:
    """Meanwhile every collective of the library goes through `watch(name, buffer, call)`, which makes the call."""
    originals: dict[tuple[Any, str], Any] = {}

    def replace(owner: Any, attribute: str, name: str, argument: int) -> None:
        original = originals[owner, attribute] = getattr(owner, attribute)

        def replaced(*tensors: Any, **options: Any) -> Any:
            return watch(name, tensors[argument], lambda: original(*tensors, **options))

        setattr(owner, attribute, replaced)

    # Those are bound when the modules are imported: replacing them in torch.distributed would come too late.
    replace(operators, "gather_into", "all_gather", 1)
    replace(agree, "gather_into", "all_gather", 1)
    replace(operators, "_reduce_scatter", "reduce_scatter", 1)
    replace(dist, "all_to_all_single", "all_to_all", 1)
    replace(dist, "all_reduce", "all_reduce", 0)
    try:
        yield
    finally:
        for (owner, attribute), original in originals.items():
            setattr(owner, attribute, original)
