"""Calls of the Triton kernel in `block_logsumexp.py`, the streaming pass on CUDA.

Its precision is that of `torch.set_float32_matmul_precision`. With float32 storage, "highest" and
"high" make three TF32 products (error about 2^-21 |q| |e|, that of float32), "medium" one (2^-11). With bfloat16 and
float16 storage the queries are cut into parts of that dtype, which tensor cores multiply exactly: two parts, of an error below 2^-16
and 2^-20 of |q| |e|, which is little beside the 2^-9 and 2^-12 to which the storage is rounded; or with "medium" one
part, 2^-9 and 2^-12, in half the time. Where Triton is missing, or with NEGCACHE_FN_NATIVE=0 in the environment, plain
torch computes the same.
"""

import functools
import importlib
import logging
import os
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from negcache_fn._codec import STORAGES
from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.problem import Problem

__all__ = ["block_logsumexp", "gumbel", "kernel", "supports"]

_STORAGE = tuple(dtype for dtype, storage in STORAGES.items() if storage.triton)
# Three TF32 products err no more than float32 ones do (on an H100 less, at a third of the time).
_PRECISION = {"highest": "tf32x3", "high": "tf32x3", "medium": "tf32"}
_LEAST_CAPABILITY = (8, 0)  # bfloat16 and TF32
_LOGGER = logging.getLogger(__name__)


@functools.cache
def kernel() -> ModuleType | None:
    """The module of the kernel; None where it cannot be had."""
    if os.environ.get("NEGCACHE_FN_NATIVE", "1") == "0":
        return None
    try:
        return importlib.import_module("negcache_fn._kernels.triton.block_logsumexp")
    except ImportError as error:
        _LOGGER.info("no Triton: the streaming passes on CUDA run in plain torch: %s", error)
        return None


def supports(problem: Problem) -> bool:
    """Whether the kernel takes it: CUDA, float32 queries, contiguous embeddings in a dtype that it reads."""
    queries, embeddings = problem.queries, problem.embeddings
    return (
        queries.device.type == "cuda"
        and queries.dtype == torch.float32
        and embeddings.dtype in _STORAGE
        and embeddings.is_contiguous()
        and torch.cuda.get_device_capability(queries.device) >= _LEAST_CAPABILITY
        and kernel() is not None
    )


def block_logsumexp(problem: Problem) -> Tensor:
    """[B, ceil(C / BLOCK)]: the log-sum-exp of every block of scores."""
    queries, embeddings, bias, excluded, max_score = problem
    module = kernel()
    if module is None:
        raise RuntimeError("the CUDA kernel is not available: ask `supports` first")
    precision = torch.get_float32_matmul_precision()
    parts, magnitude = _split(queries, embeddings.dtype, precision)
    products = _PRECISION[precision] if embeddings.dtype == torch.float32 else "tf32"  # elsewhere without meaning
    out = queries.new_empty(queries.shape[0], -(-embeddings.shape[0] // BLOCK))
    with torch.cuda.device_of(queries):  # Triton launches on the current device
        module.launch(parts, magnitude, embeddings, bias.contiguous(), excluded.contiguous(), max_score, products, out)
    return out


def gumbel(seed: Tensor, step: Tensor, row: Tensor, quad: Tensor, level: int) -> Tensor | None:
    """[..., 4]: the variates of `negcache_fn.random.gumbel`; None where there is no kernel."""
    if row.device.type != "cuda" or kernel() is None:
        return None
    return cast(Tensor, _gumbel_op(seed, step, *torch.broadcast_tensors(row, quad), level))


@torch.library.custom_op("negcache_fn::gumbel", mutates_args=())
def _gumbel_op(seed: Tensor, step: Tensor, row: Tensor, quad: Tensor, level: int) -> Tensor:
    out = torch.empty(*row.shape, 4, device=row.device)
    if out.numel() > 0:
        module = importlib.import_module("negcache_fn._kernels.triton.gumbel")
        with torch.cuda.device_of(row):
            module.launch(seed, step, row.contiguous(), quad.contiguous(), level, out)
    return out


@_gumbel_op.register_fake
def _(seed: Tensor, step: Tensor, row: Tensor, quad: Tensor, level: int) -> Tensor:
    return torch.empty(*row.shape, 4, device=row.device)


def _split(queries: Tensor, storage: torch.dtype, precision: str) -> tuple[Tensor, Tensor]:
    """Parts [n, B, D] in the storage dtype, and powers of two [B]: the sum of the parts times these is the queries.

    Each part is the rounded rest of those before it. The powers keep float16 from overflow.
    """
    exponent = torch.frexp(queries.abs().amax(1)).exponent.clamp(-126, 126)
    magnitude = torch.ldexp(torch.ones_like(exponent, dtype=queries.dtype), exponent)
    rest = queries / magnitude[:, None]
    parts: list[Tensor] = []
    for _ in range(1 if storage == torch.float32 or precision == "medium" else 2):
        parts.append(rest.to(storage))
        rest = rest - parts[-1]
    return torch.stack(parts), magnitude
