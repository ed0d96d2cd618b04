"""Calls of the Triton kernel in `block_logsumexp.py`, the streaming pass on CUDA.

Its precision is that of `torch.set_float32_matmul_precision`. With float32 storage, "highest" and "high" make three
TF32 products (error about 2^-21 |q| |e|, that of float32), "medium" one (2^-11). With bfloat16 and float16 storage the
queries are cut into parts of that dtype, which tensor cores multiply exactly: two parts, of an error below 2^-16 and
2^-20 of |q| |e|, which is little beside the 2^-9 and 2^-12 to which the storage is rounded; or with "medium" one part,
2^-9 and 2^-12, in half the time. Int8 storage is read as bfloat16, which holds the integers exactly, and the products
are multiplied with the scales of the rows. Weights of a mean are rounded to the dtype of the embeddings that they
multiply. Where Triton is missing, or with NEGCACHE_FN_NATIVE=0 in the environment, plain torch computes the same.
"""

import functools
import importlib
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from negcache_fn._codec import STORAGES
from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.problem import Problem

__all__ = ["block_logsumexp", "blocks_and_sums", "gumbel", "kernel", "slot_masses", "supports"]

_STORAGE = tuple(dtype for dtype, storage in STORAGES.items() if storage.triton)
# Three TF32 products err no more than float32 ones do (on an H100 less, at a third of the time).
_PRECISION = {"highest": "tf32x3", "high": "tf32x3", "medium": "tf32"}
_LEAST_CAPABILITY = (8, 0)  # bfloat16 and TF32
_WEIGHTS_BYTES = 2**25  # of weights at a time: they stay in the L2 cache of large GPUs
_UNIT = 2.0**15  # of weights, at most 1: float16 then reaches from 1 down to 2^-39
_INFINITY = float("inf")
_LOGGER = logging.getLogger(__name__)


@functools.cache
def kernel() -> ModuleType | None:
    """The module of the kernel; None if it is not available."""
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
    return _Pass(problem).of_slots(0, problem.embeddings.shape[0], None)


def blocks_and_sums(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The same, `exp(scores - log_scale) @ embeddings` [B, D], and that log-scale [B], -inf where a row is empty.

    The kernel writes the softmax inside every block of some slots; scaled by the masses of the blocks, relative to the
    largest so far, it is multiplied with the embeddings, which is a product for cuBLAS.
    """
    queries, embeddings = problem.queries, problem.embeddings
    (rows, dim), capacity = queries.shape, embeddings.shape[0]
    dtype = _dtype_of_products(embeddings.dtype)
    slots = max(1, _WEIGHTS_BYTES // (max(1, rows) * BLOCK * dtype.itemsize)) * BLOCK
    weights = embeddings.new_empty(rows * min(slots, -(-capacity // BLOCK) * BLOCK), dtype=dtype)
    run = _Pass(problem)
    parts: list[Tensor] = []
    total = queries.new_zeros(rows, dim)
    log_scale = torch.full_like(total[:, 0], -_INFINITY)
    for start in range(0, capacity, slots):
        stop = min(start + slots, capacity)
        shares = weights[: rows * -(-(stop - start) // BLOCK) * BLOCK].view(rows, -1, BLOCK)
        parts.append(run.of_slots(start, stop, shares))
        larger = torch.maximum(log_scale, parts[-1].amax(1))
        shift = larger.masked_fill(larger == -_INFINITY, 0.0)
        shares.mul_((parts[-1] - shift[:, None]).exp_()[:, :, None])
        product = _multiply(shares.flatten(1)[:, : stop - start], embeddings[start:stop])
        total.mul_((log_scale - shift).exp_()[:, None]).add_(product)
        log_scale = larger
    return torch.cat(parts, dim=1), total.div_(_UNIT), log_scale


class _Pass:
    """A problem in the form that the kernel takes."""

    def __init__(self, problem: Problem) -> None:
        module = kernel()
        if module is None:
            raise RuntimeError("the CUDA kernel is not available: ask `supports` first")
        self.module, self.problem = module, problem
        storage, precision = problem.embeddings.dtype, torch.get_float32_matmul_precision()
        self.parts, self.magnitude = _split(problem.queries, storage, precision)
        self.products = _PRECISION[precision] if storage == torch.float32 else "tf32"  # elsewhere without meaning

    def of_slots(self, start: int, stop: int, shares: Tensor | None) -> Tensor:
        """[B, blocks] of the slots `start ... stop - 1`; to `shares` [B, blocks, BLOCK] the softmax inside them."""
        queries, embeddings, bias, excluded, max_score, row_labels, slot_labels, row_scale = self.problem
        out = queries.new_empty(queries.shape[0], -(-(stop - start) // BLOCK))
        with torch.cuda.device_of(queries):  # Triton launches on the current device
            self.module.launch(
                self.parts,
                self.magnitude,
                embeddings[start:stop],
                bias[start:stop].contiguous(),
                (excluded - start).contiguous() if start else excluded.contiguous(),
                max_score,
                self.products,
                out,
                shares,
                _UNIT,
                row_labels,
                None if slot_labels is None else slot_labels[start:stop],
                None if row_scale is None else row_scale[start:stop].contiguous(),
            )
        return out


def _multiply(weights: Tensor, embeddings: Tensor) -> Tensor:
    """[B, D]: their product, in float32."""
    embeddings = embeddings.to(_dtype_of_products(embeddings.dtype))
    if embeddings.dtype == torch.float32 or not weights.is_cuda:
        return weights.float() @ embeddings.float()
    return torch.mm(weights, embeddings, out_dtype=torch.float32)


def slot_masses(problem: Problem, log_weight: Tensor) -> Tensor:
    """[C rounded up to whole blocks]: the log-sum-exp over the rows of the scores and a weight [B] of each row."""
    queries, embeddings, bias, excluded, max_score, row_labels, slot_labels, row_scale = problem
    storage, precision = embeddings.dtype, torch.get_float32_matmul_precision()
    parts, magnitude = _split(queries, storage, precision)
    capacity = embeddings.shape[0]
    out = queries.new_full((-(-capacity // BLOCK) * BLOCK,), -_INFINITY)
    if capacity > 0 and queries.shape[0] > 0:
        module = importlib.import_module("negcache_fn._kernels.triton.slot_masses")
        products = _PRECISION[precision] if storage == torch.float32 else "tf32"
        with torch.cuda.device_of(queries):
            module.launch(
                parts,
                magnitude,
                embeddings,
                bias.contiguous(),
                excluded.contiguous(),
                max_score,
                row_labels,
                slot_labels,
                log_weight,
                products,
                out,
                None if row_scale is None else row_scale.contiguous(),
            )
    return out


def gumbel(seed: Tensor, step: Tensor, row: Tensor, quad: Tensor, level: int) -> Tensor | None:
    """[..., 4] the variates of `negcache_fn.random.gumbel`; None where there is no kernel."""
    if row.device.type != "cuda" or kernel() is None:
        return None
    out = torch.empty(*row.shape, 4, dtype=torch.float32, device=row.device)
    if out.numel() > 0:
        module = importlib.import_module("negcache_fn._kernels.triton.gumbel")
        with torch.cuda.device_of(row):
            module.launch(seed, step, row.contiguous(), quad.contiguous(), level, out)
    return out


def _split(queries: Tensor, storage: torch.dtype, precision: str) -> tuple[Tensor, Tensor]:
    """Parts [n, B, D] in the dtype of products, and powers of two [B]: the sum of the parts times these is the queries.

    Each part is the rounded rest of those before it. The powers keep float16 from overflow.
    Float32 is one part as it is.
    """
    if storage == torch.float32:
        return queries.contiguous()[None], torch.ones_like(queries[:, 0])
    exponent = torch.frexp(queries.abs().amax(1)).exponent.clamp(-126, 126)
    magnitude = torch.ldexp(torch.ones_like(exponent, dtype=queries.dtype), exponent)
    rest = queries / magnitude[:, None]
    parts: list[Tensor] = []
    for _ in range(1 if precision == "medium" else 2):
        parts.append(rest.to(_dtype_of_products(storage)))
        rest = rest - parts[-1]
    return torch.stack(parts), magnitude


def _dtype_of_products(storage: torch.dtype) -> torch.dtype:
    """In which queries, and the weights of a mean, are multiplied with embeddings."""
    return torch.bfloat16 if storage == torch.int8 else storage
