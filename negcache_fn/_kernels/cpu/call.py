"""Calls of the kernels of scores."""

import functools

import torch
from torch import Tensor

from negcache_fn._codec import STORAGES
from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.cpu.build import library
from negcache_fn._kernels.cpu.functions import PassedProblem, function, run
from negcache_fn._kernels.problem import Problem

__all__ = [
    "block_logsumexp",
    "blocks_and_sums",
    "hardest",
    "logsumexp",
    "score_blocks",
    "slot_masses",
    "sum_of_rows",
    "supports",
    "supports_hardest",
    "supports_sums",
]

_NUMBERS = {dtype: storage.number for dtype, storage in STORAGES.items() if storage.number is not None}
_PARTS = {"highest": 3, "high": 2, "medium": 1}  # bfloat16 parts, by `torch.set_float32_matmul_precision`
_FEW_QUERIES = 64  # up to this many, rearranging the embeddings into tiles takes longer than tiles save
_MOST_HARDEST = 1024  # above it, candidates take more memory than they save time


def supports(problem: Problem) -> bool:
    """Whether the kernels take it: CPU, float32 queries, contiguous embeddings in a dtype that has a number."""
    queries, embeddings = problem.queries, problem.embeddings
    return (
        queries.device.type == "cpu"
        and queries.dtype == torch.float32
        and embeddings.dtype in _NUMBERS
        and embeddings.is_contiguous()
        and library() is not None
    )


def supports_hardest(problem: Problem, n: int) -> bool:
    """Whether `hardest` takes it."""
    return n <= _MOST_HARDEST and supports(problem)


def supports_sums(values: Tensor) -> bool:
    """Whether `sum_of_rows`, `logsumexp` and the choices in `noise.py` take values like these."""
    return values.device.type == "cpu" and values.dtype == torch.float32 and library() is not None


def block_logsumexp(problem: Problem) -> Tensor:
    """[B, ceil(C / BLOCK)]: the log-sum-exp of every block of scores."""
    out = problem.queries.new_empty(problem.queries.shape[0], -(-problem.embeddings.shape[0] // BLOCK))
    _score("negcache_block_logsumexp", problem, *_arithmetic_of_pass(problem), out.data_ptr())
    return out


def blocks_and_sums(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The same, `exp(scores - log_scale) @ embeddings` [B, D], and that log-scale [B], -inf where a row is empty."""
    queries = problem.queries
    out = queries.new_empty(queries.shape[0], -(-problem.embeddings.shape[0] // BLOCK))
    total, log_scale = queries.new_empty(queries.shape), queries.new_empty(queries.shape[0])
    pointers = (out.data_ptr(), total.data_ptr(), log_scale.data_ptr())
    _score("negcache_blocks_and_sums", problem, *_arithmetic_of_pass(problem), *pointers)
    return out, total, log_scale


def score_blocks(problem: Problem, blocks: Tensor) -> Tensor:
    """[B, m, BLOCK]: the scores in the blocks [B, m], read in place."""
    out = problem.queries.new_empty(*blocks.shape, BLOCK)
    blocks = blocks.contiguous()
    _score("negcache_score_blocks", problem, blocks.data_ptr(), blocks.shape[1], out.data_ptr())
    return out


def slot_masses(problem: Problem, log_weight: Tensor, log_scale: Tensor, places: Tensor | None = None) -> Tensor:
    """[ceil(C / BLOCK) * BLOCK]: `(scores + log_weight[:, None]).logsumexp(0)`, over rows with a weight above -inf.

    Args:
        problem: of C slots.
        log_weight: [B].
        log_scale: [ceil(C / BLOCK)] about the log-sum-exp of each block's results. Of a slot that is smaller by 60 or
            more, only the row of the largest score counts.
        places: [ceil(C / BLOCK)] which blocks of the embeddings are meant, C being a multiple of BLOCK.
    """
    out = problem.queries.new_empty(-(-problem.bias.shape[0] // BLOCK) * BLOCK)
    log_weight, log_scale = log_weight.contiguous(), log_scale.contiguous()
    tiles, _ = _arithmetic(problem)  # in full precision: few slots are scored again
    pointers = (log_weight.data_ptr(), log_scale.data_ptr(), out.data_ptr())
    _score("negcache_slot_masses", problem, tiles, _PARTS["highest"], *pointers, places=places)
    return out


def sum_of_rows(values: Tensor, log_weight: Tensor) -> Tensor:
    """[B, n] -> [n]: `(values + log_weight[:, None]).logsumexp(0)`, over rows with a weight above -inf."""
    out = values.new_empty(values.shape[1])
    values, log_weight = values.contiguous(), log_weight.contiguous()
    function("negcache_sum_of_rows")(values.data_ptr(), log_weight.data_ptr(), *values.shape, out.data_ptr())
    return out


def logsumexp(values: Tensor) -> Tensor:
    """[B, n] -> [B]: `values.logsumexp(1)`."""
    out = values.new_empty(values.shape[0])
    values = values.contiguous()
    function("negcache_logsumexp")(values.data_ptr(), *values.shape, out.data_ptr())
    return out


def hardest(problem: Problem, n: int) -> tuple[Tensor, Tensor]:
    """The `n` highest scores of each query and their slots, ties by slot; (-inf, -1) if there are fewer."""
    scores = problem.queries.new_empty(problem.queries.shape[0], n)
    slots = torch.empty_like(scores, dtype=torch.int64)
    tiles, parts = _arithmetic(problem)
    parts = parts if tiles else max(parts, 2)  # queries of 8 bits do not rank well enough
    _score("negcache_hardest", problem, tiles, parts, n, scores.data_ptr(), slots.data_ptr())
    return scores, slots


def _score(name: str, problem: Problem, *arguments: int, places: Tensor | None = None) -> None:
    """Calls a score kernel, copies of tensors that are not contiguous must live until it returns."""
    queries, embeddings, bias, excluded, *others = problem
    queries, bias, excluded = queries.contiguous(), bias.contiguous(), excluded.contiguous()
    others = [None if values is None else values.contiguous() for values in (*others, places)]
    passed = PassedProblem(
        embeddings.data_ptr(),
        _NUMBERS[embeddings.dtype],
        bias.shape[0],
        embeddings.shape[1],
        queries.shape[0],
        queries.data_ptr(),
        bias.data_ptr(),
        excluded.data_ptr(),
        excluded.shape[1],
        *(None if values is None else values.data_ptr() for values in others),
    )
    if run(name, passed, *arguments) != 0:
        raise RuntimeError(f"{name} does not know the storage number of {embeddings.dtype}: see `_codec.STORAGES`")


@functools.cache
def _multiplies_tiles() -> bool:
    return library() is not None and bool(function("negcache_has_amx")())


def _arithmetic(problem: Problem) -> tuple[int, int]:
    """Whether to multiply by tiles; of how many parts, see `stream.h`, as `torch.set_float32_matmul_precision` asks."""
    tiles = problem.queries.shape[0] > _FEW_QUERIES and _multiplies_tiles()
    parts = _PARTS[torch.get_float32_matmul_precision()]
    if problem.embeddings.dtype == torch.float16:
        parts = max(parts, 2)  # one bfloat16 has less precision than the stored numbers
    return int(tiles), parts


def _arithmetic_of_pass(problem: Problem) -> tuple[int, int]:
    """The same where all of the cache is summed over: two parts, or integers for int8, are enough."""
    tiles, parts = _arithmetic(problem)
    return tiles, min(parts, 2) if tiles or problem.embeddings.dtype == torch.int8 else parts
