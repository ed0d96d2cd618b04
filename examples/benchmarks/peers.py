"""Other people's code, used as it is meant to be; every import is optional."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from examples.benchmarks.methods import Call, Method, UnavailableError
from examples.benchmarks.problem import SCALE, TOKENS, Problem

__all__ = ["PEERS"]


def _optional(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name.split('.')[0]} is not installed") from error


def _port(problem: Problem, top_k: int | None) -> Call:
    """The port's CacheLossHandler: loss on the cache, its update, then the backward pass of the caller."""
    handlers, losses = _optional("negative_cache.handlers"), _optional("negative_cache.losses")
    caches = _optional("negative_cache.negative_cache")
    batch, capacity, dim = problem.shape.batch, problem.shape.capacity, problem.shape.dim
    if problem.shape.samples > 1:
        raise UnavailableError("draws one document per query")
    if top_k is not None and capacity % top_k:
        raise UnavailableError(f"wants a capacity that is a multiple of {top_k}")
    specs = {
        "embedding": caches.FixedLenFeature([dim], torch.float32),
        "tokens": caches.FixedLenFeature([TOKENS], torch.int64),
    }
    handler = handlers.CacheLossHandler(
        caches.CacheManager(specs, capacity),
        losses.CacheClassificationLoss("embedding", ["tokens"], score_transform=_scaled, top_k=top_k),
        "embedding",
        ["tokens"],
    )
    tensors = handler.cache.data
    for name in tensors:
        tensors[name] = tensors[name].to(problem.device)
    tensors["embedding"].copy_(problem.embeddings())
    tensors["tokens"].fill_(1)
    handler.cache.age.copy_(torch.arange(capacity, 0, -1) // batch)

    def call() -> None:
        problem.next_batch()
        documents, drawn = problem.encoded.split(batch)
        handler.update_cache_and_compute_loss(lambda _: drawn, problem.queries, documents, problem.features).backward()

    return call


def _scaled(scores: Tensor) -> Tensor:
    return SCALE * scores


def _cross_batch_memory(problem: Problem) -> Call:
    """pytorch-metric-learning: queries against a memory into which the batch's documents go first."""
    losses = _optional("pytorch_metric_learning.losses")
    batch, capacity = problem.shape.batch, problem.shape.capacity
    if problem.shape.samples > 1:
        raise UnavailableError("draws nothing")
    inner = losses.NTXentLoss(temperature=1 / SCALE)
    memory = losses.CrossBatchMemory(inner, problem.shape.dim, memory_size=capacity)
    memory.embedding_memory = problem.embeddings().clone()
    memory.label_memory = problem.state()["items", "id"].clone()
    memory.has_been_filled = True
    of_documents = torch.arange(2 * batch, device=problem.device) >= batch

    def call() -> None:
        problem.next_batch()
        embeddings = torch.cat([problem.queries, problem.encoded[:batch]])
        memory(embeddings, problem.ids.repeat(2), enqueue_mask=of_documents).backward()

    return call


def _cut_cross_entropy(problem: Problem) -> Call:
    """The forward pass alone, in bfloat16: the loss against the cache, without a matrix of scores."""
    if problem.device.type != "cuda":
        raise UnavailableError("needs CUDA")
    function = _optional("cut_cross_entropy").linear_cross_entropy
    queries = problem.queries.detach().to(torch.bfloat16) * SCALE
    embeddings = problem.embeddings(torch.bfloat16)
    target = torch.zeros(problem.shape.batch, dtype=torch.int64, device=problem.device)

    def call() -> None:
        with torch.no_grad():
            function(queries, embeddings, target)

    return call


PEERS = (
    Method("port", "the port", lambda problem: _port(problem, None), lambda shape: 24 * shape.scores),
    Method("port-top64", "the port, `top_k=64`", lambda problem: _port(problem, 64), lambda shape: 24 * shape.scores),
    Method(
        "memory-bank",
        "`CrossBatchMemory(NTXentLoss)`",
        _cross_batch_memory,
        lambda shape: (20 * shape.batch + 40) * shape.scores,
    ),
    Method("cut-cross-entropy", "cut-cross-entropy, forward only", _cut_cross_entropy, swept=False),
)
