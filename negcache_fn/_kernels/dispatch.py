"""The choice of a kernel. Every function returns None if no kernel supports the problem, so callers use plain torch.

A kernel for another device, or for another operation, is a file of its own beside `cpu` and `triton` and two lines
here: whether it supports the problem, and the call.
"""

from torch import Tensor

from negcache_fn._kernels.blocks import BLOCK
from negcache_fn._kernels.cpu import call as cpu
from negcache_fn._kernels.cpu import noise as cpu_noise
from negcache_fn._kernels.cpu import rows as cpu_rows
from negcache_fn._kernels.cpu import scans as cpu_scans
from negcache_fn._kernels.problem import Problem
from negcache_fn._kernels.triton import call as triton

__all__ = [
    "Problem",
    "assign_slots",
    "bias_without",
    "block_logsumexp",
    "blocks_and_sums",
    "choose_children",
    "choose_groups",
    "find_slots",
    "gumbel",
    "hardest",
    "largest_children",
    "largest_groups",
    "last_of_each",
    "logsumexp",
    "lowest_slots",
    "reads_in_place",
    "score_blocks",
    "slot_masses",
    "sum_of_rows",
    "write_rows",
    "writes_rows",
]


def block_logsumexp(problem: Problem) -> Tensor | None:
    """[B, ceil(C / BLOCK)]: the log-sum-exp of every block of scores."""
    if cpu.supports(problem):
        return cpu.block_logsumexp(problem)
    if triton.supports(problem):
        return triton.block_logsumexp(problem)
    return None


def blocks_and_sums(problem: Problem) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same, `exp(scores - log_scale) @ embeddings` [B, D], and that log-scale [B], -inf where a row is empty."""
    if cpu.supports(problem):
        return cpu.blocks_and_sums(problem)
    if triton.supports(problem):
        return triton.blocks_and_sums(problem)
    return None


def score_blocks(problem: Problem, blocks: Tensor) -> Tensor | None:
    """[B, m, BLOCK]: the scores in the blocks [B, m], see `ScoreMatrix.scores_at`."""
    if cpu.supports(problem):
        return cpu.score_blocks(problem, blocks)
    return None


def slot_masses(problem: Problem, log_weight: Tensor, log_scale: Tensor, places: Tensor | None = None) -> Tensor | None:
    """[C rounded up to whole blocks]: the log-sum-exp over the rows of the scores and a weight [B] of each row.

    A row whose weight is -inf does not count, whatever its scores are. With places, the embeddings of block i are those
    of block `places[i]`; see `reads_in_place`.
    """
    if log_weight.dtype != problem.queries.dtype:
        return None
    if cpu.supports(problem):
        return cpu.slot_masses(problem, log_weight, log_scale, places)
    if triton.supports(problem):
        return triton.slot_masses(problem, log_weight)
    return None


def reads_in_place(problem: Problem) -> bool:
    """Whether `slot_masses` takes places: blocks need not be copied."""
    return problem.embeddings.shape[0] % BLOCK == 0 and cpu.supports(problem)


def sum_of_rows(values: Tensor, log_weight: Tensor) -> Tensor | None:
    """[B, n] -> [n]: the log-sum-exp over the rows of the values and a weight [B] of each row, as `slot_masses`."""
    if cpu.supports_sums(values) and log_weight.dtype == values.dtype:
        return cpu.sum_of_rows(values, log_weight)
    return None


def hardest(problem: Problem, n: int) -> tuple[Tensor, Tensor] | None:
    """The `n` highest scores of each query and their slots, [B, n], ties by slot; (-inf, -1) if there are fewer."""
    if cpu.supports_hardest(problem, n):
        return cpu.hardest(problem, n)
    return None


def lowest_slots(key: Tensor, skip: Tensor, n: int) -> Tensor | None:
    """[n] slots of the smallest `key` [C], ascending, ties by slot, without those to skip [C]; -1 if too few."""
    if cpu_scans.supports(key):
        return cpu_scans.lowest_slots(key, skip, n)
    return None


def find_slots(ids: Tensor, cached: Tensor, embedded_at: Tensor) -> Tensor | None:
    """[P] the live slot of each id [P] among those `cached` [C], -1 where it is not there."""
    if cpu_scans.supports(ids):
        return cpu_scans.find_slots(ids, cached, embedded_at)
    return None


def bias_without(ids: Tensor, cached: Tensor, embedded_at: Tensor, log_weight: Tensor) -> Tensor | None:
    """[C] float32: the `log_weight` [C] of the live slots that have none of the `ids` [P], -inf elsewhere."""
    return cpu_scans.bias_without(ids, cached, embedded_at, log_weight) if cpu_scans.supports(ids) else None


def assign_slots(ids: Tensor, wanted: Tensor, cached: Tensor, embedded_at: Tensor, key: Tensor) -> Tensor | None:
    """[M] the slot that each row takes, -1 if it takes none: see `negcache_fn._cache.assign`."""
    return cpu_scans.assign_slots(ids, wanted, cached, embedded_at, key) if cpu_scans.supports(ids) else None


def last_of_each(ids: Tensor) -> Tensor | None:
    """[M] bool: whether no later row has the same id."""
    return cpu_scans.last_of_each(ids) if cpu_scans.supports(ids) else None


def writes_rows(columns: list[Tensor], values: list[Tensor], slots: Tensor) -> bool:
    """Whether `write_rows` takes them."""
    return cpu_rows.supports(columns, values, slots)


def write_rows(columns: list[Tensor], values: list[Tensor], slots: Tensor) -> None:
    """Writes rows [M, ...] into the slots [M] of each of the columns [C, ...], see `negcache_fn._cache.rows`."""
    cpu_rows.write_rows(columns, values, slots)


def gumbel(seed: Tensor, step: Tensor, row: Tensor, quad: Tensor, level: int) -> Tensor | None:
    """[..., 4] the variates of `negcache_fn.random.gumbel`; `row` and `quad` have the same shape."""
    found = cpu_noise.gumbel(seed, step, row, quad, level)
    return triton.gumbel(seed, step, row, quad, level) if found is None else found


def logsumexp(values: Tensor) -> Tensor | None:
    """[B, n] -> [B]: the log-sum-exp of every row."""
    return cpu.logsumexp(values) if cpu.supports_sums(values) else None


def choose_groups(
    blocks: Tensor, seed: Tensor, step: Tensor, row: Tensor, level: int, first_group: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Groups [B, k], their perturbed log-masses, log-normalisers [B], and the blocks of the groups [B, k, width].

    Of the blocks [B, n], `width` to a group, by the rows of noise [B, k].
    """
    if cpu.supports_sums(blocks):
        return cpu_noise.choose_groups(blocks, seed, step, row, level, first_group, width)
    return None


def choose_children(
    log_mass: Tensor, seed: Tensor, step: Tensor, row: Tensor, level: int, parent: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The numbers [B, k] of children, and their log-masses: one of the n of each parent [B, k], from [B, k, n]."""
    if cpu.supports_sums(log_mass):
        return cpu_noise.choose_children(log_mass, seed, step, row, level, parent)
    return None


def largest_groups(
    blocks: Tensor, seed: Tensor, step: Tensor, row: Tensor, level: int, first_group: int, n: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The n groups of largest perturbed log-mass, ascending, with it and their blocks [n, w], of blocks [G, w]."""
    if cpu.supports_sums(blocks):
        return cpu_noise.largest_groups(blocks, seed, step, row, level, first_group, n)
    return None


def largest_children(
    log_mass: Tensor, seed: Tensor, step: Tensor, row: Tensor, level: int, parent: Tensor, perturbed: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The n children of largest perturbed log-mass given their parents', ascending, with it and the log-mass [n]."""
    if cpu.supports_sums(log_mass) and perturbed.dtype == log_mass.dtype:
        return cpu_noise.largest_children(log_mass, seed, step, row, level, parent, perturbed, n)
    return None
