"""A sharded step compiles into one graph, and works with encoders wrapped by FSDP2."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from negcache_fn._ranks.group import ranks_of
from tests.ranks.test_equivalence import DOUBLE, assert_same
from tests.support.processes import run_ranks, without_coverage
from tests.support.sharded_training import train

MESSAGES = torch.ops.negcache_fn
# Inductor, which reorders and fuses, takes half a minute for each: tests/properties/test_compile.py has it for all
# kinds of draws, on one rank.
COMPILED: dict[str, dict[str, Any]] = {
    "global": DOUBLE
    | {"backend": "inductor", "steps": 5, "in_batch": "global", "draws_per_query": 2, "refresh_stalest": 3},
    "batch": DOUBLE | {"backend": "aot_eager", "steps": 3, "in_batch": "global", "num_draws": 8, "refresh_stalest": 3},
    "batch-top-k": DOUBLE | {"backend": "aot_eager", "steps": 3, "in_batch": False, "num_draws": 8, "top_k": 40},
    "top-k": DOUBLE
    | {"backend": "aot_eager", "steps": 3, "in_batch": False, "top_k": 40, "share_draws": False, "draws_per_query": 2},
}


def compare(rank: int, world: int, *, backend: str, **options: Any) -> int:
    torch._dynamo.reset()
    eager = train(rank, world, wrap="none", **options)
    with without_coverage():
        compiled = train(rank, world, wrap="none", backend=backend, **options)
    # The weights of draws for the batch are functions of the noise, whose logarithms a compiler may round otherwise:
    # float32.
    assert_same("compiled", compiled, eager, tolerance=1e-6 if "num_draws" in options else 1e-12)
    return compiled.graphs


def test_compiled_equals_eager_in_one_graph(tmp_path: Path) -> None:
    cases = {name: (compare, options) for name, options in COMPILED.items()}
    for name, graphs in run_ranks(2, cases, tmp_path).items():
        assert graphs == [1, 1], name


def test_fsdp(tmp_path: Path) -> None:
    options = DOUBLE | {"steps": 4, "in_batch": "global"}
    (record, _) = run_ranks(2, {"fsdp": (train, options | {"wrap": "fsdp"})}, tmp_path)["fsdp"]
    assert_same("fsdp", record, train(0, 1, alone=True, **options))


def gradients_sent(rank: int, world: int, *, chained: bool) -> list[bool]:
    """Whether each message of the backward pass needs, directly or not, the one before it."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def send_twice(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        ranks = ranks_of(torch.distributed.group.WORLD)
        received = ranks.gather(values)
        ranks.all_sum(values.detach())
        if not chained:
            ranks.last.clear()
        return received.sum() + ranks.exchange(others).square().sum()

    values, others = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    compiled = torch.compile(send_twice, backend=aot_autograd(fw_compiler=keep))
    compiled(values, others).backward()
    _, backward = graphs
    needed: dict[torch.fx.Node, set[torch.fx.Node]] = {}
    for node in backward.graph.nodes:
        needed[node] = set().union(*({before, *needed[before]} for before in node.all_input_nodes))
    sent = [node for node in needed if node.target in (MESSAGES.reduce_scatter.default, MESSAGES.all_to_all.default)]
    return [before in needed[node] for before, node in itertools.pairwise(sent)]


def test_gradients_are_sent_in_one_order(tmp_path: Path) -> None:
    cases = {str(chained): (gradients_sent, {"chained": chained}) for chained in (True, False)}
    assert run_ranks(2, cases, tmp_path) == {"True": [[True]] * 2, "False": [[False]] * 2}
