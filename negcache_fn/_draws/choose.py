"""Choices by Gumbel noise along the levels of the tree, one operator for each level: the largest, or the n largest.

Each has a kernel, whose noise is that of `Noise`, apart from rounding, and plain torch, which is compiled into a graph
where there is no kernel.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from negcache_fn._cache.select import ordered
from negcache_fn._draws.noise import AMONG_GROUPS, Noise
from negcache_fn._kernels import dispatch
from negcache_fn._kernels.blocks import BLOCK, GROUP
from negcache_fn._operators import operator

__all__ = ["choose_children", "choose_groups", "largest_children", "largest_groups"]

_BLOCKS = GROUP // BLOCK  # of a group
_INFINITY = float("inf")
_LINEAR = 50.0  # from where log(1 + exp(x)) is x, in float64 as well
_Chosen = tuple[Tensor, Tensor, Tensor, Tensor]


def choose_groups(blocks: Tensor, noise: Noise, first_group: int | Tensor) -> _Chosen:
    """The group of largest perturbed log-sum-exp of each sample, by the log-sum-exp of the blocks.

    Args:
        blocks: [B, n], those of the groups `first_group ...`; the last group may have fewer than others.
        noise: of B x k samples.
        first_group: the number of the first group in the whole cache.

    Returns:
        [B, k] numbers of groups; [B, k] their perturbed log-sum-exp; [B] that of all blocks, without noise; and
        [B, k, blocks of a group], filled up with -inf.
    """
    if not _has_kernel(blocks):
        return _choose_groups(blocks, noise, first_group)
    return _choose_groups_op(blocks, *noise, *_as_arguments(first_group))


def choose_children(log_mass: Tensor, noise: Noise, level: int, parent: Tensor) -> tuple[Tensor, Tensor]:
    """One of the n children of each parent [B, k], by their log-masses [B, k, n]: its number and its log-mass."""
    if not _has_kernel(log_mass):
        return _choose_children(log_mass, noise, level, parent)
    return _choose_children_op(log_mass, *noise, level, parent)


def largest_groups(blocks: Tensor, noise: Noise, first_group: int | Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The (at most n) groups of largest perturbed log-mass, of a draw for the batch.

    Args:
        blocks: [G, w] log-masses of the blocks of each group.
        noise: of the batch.
        first_group: the number of the first group in the whole cache.
        n: how many.

    Returns:
        [m] numbers of groups, ascending; [m] their perturbed log-masses; and [m, w] their blocks.
    """
    n = min(n, blocks.shape[0])
    if not _has_kernel(blocks):
        return _largest_groups(blocks, noise, first_group, n)
    return _largest_groups_op(blocks, *noise, *_as_arguments(first_group), n)


def largest_children(
    log_mass: Tensor, noise: Noise, level: int, parent: Tensor, perturbed: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The (at most n) children of largest perturbed log-mass, of a draw for the batch.

    Args:
        log_mass: [p, c] of the children.
        noise: of the batch.
        level: of the children.
        parent: [p] numbers, ascending.
        perturbed: [p] the parents' perturbed log-masses, each of which is the largest of its children's.
        n: how many.

    Returns:
        [m] numbers of children, ascending; [m] their perturbed log-masses; and [m] their log-masses.
    """
    n = min(n, log_mass.shape[0] * log_mass.shape[1])
    if not _has_kernel(log_mass):
        return _largest_children(log_mass, noise, level, parent, perturbed, n)
    return _largest_children_op(log_mass, *noise, level, parent, perturbed, n)


def _has_kernel(log_mass: Tensor) -> bool:
    """Known while a graph is made: where it is not, the operator calls plain torch."""
    return log_mass.device.type == "cpu" and log_mass.dtype == torch.float32


def _as_arguments(number: int | Tensor) -> tuple[Tensor | None, int]:
    """Two of an operator, whose sum is the number: an operator takes no "either"."""
    return (number, 0) if isinstance(number, Tensor) else (None, number)


def _number(origin: Tensor | None, offset: int) -> int:
    return offset if origin is None else int(origin) + offset


def _choose_groups(blocks: Tensor, noise: Noise, first_group: int | Tensor) -> _Chosen:
    blocks = pad(blocks, (0, -blocks.shape[1] % _BLOCKS), value=-_INFINITY)
    blocks = blocks.view(blocks.shape[0], blocks.shape[1] // _BLOCKS, _BLOCKS)
    groups = blocks.logsumexp(-1)
    perturbed, group = (groups[:, None] + noise.of_groups(first_group, groups.shape[1])).max(-1)
    of_query = torch.arange(groups.shape[0], device=groups.device)[:, None]
    return group + first_group, perturbed, groups.logsumexp(-1), blocks[of_query, group]


def _choose_children(log_mass: Tensor, noise: Noise, level: int, parent: Tensor) -> tuple[Tensor, Tensor]:
    children = log_mass.shape[-1]
    place = (log_mass + noise.of_children(parent, children, level)).argmax(-1)
    return parent * children + place, log_mass.gather(-1, place[..., None]).squeeze(-1)


def _largest_groups(blocks: Tensor, noise: Noise, first_group: int | Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    noisy = blocks.logsumexp(-1) + noise.of_groups(first_group, blocks.shape[0])[0, 0]
    place = _largest(noisy, n)
    return place + first_group, noisy[place], blocks[place]


def _largest_children(
    log_mass: Tensor, noise: Noise, level: int, parent: Tensor, perturbed: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    children = log_mass.shape[1]
    noisy = _given_maximum(log_mass + noise.of_children(parent[None], children, level)[0], perturbed).flatten()
    place = _largest(noisy, n)
    return parent[place // children] * children + place % children, noisy[place], log_mass.flatten()[place]


def _given_maximum(perturbed: Tensor, maximum: Tensor) -> Tensor:
    """[p, n] perturbed masses, changed so that the largest one is `maximum` [p].

    With `Z` the largest, `G` becomes `-log(exp(-maximum) - exp(-Z) + exp(-G))`: Gumbel variables become variables with
    their law given the maximum. The place of the largest one stays the same.
    """
    below = perturbed - perturbed.amax(-1, keepdim=True)
    difference = maximum[:, None] - perturbed + torch.log(-torch.expm1(below))
    given = maximum[:, None] - softplus(difference, threshold=_LINEAR)
    return given.masked_fill(perturbed == -_INFINITY, -_INFINITY)


def _largest(values: Tensor, n: int) -> Tensor:
    """[n] places of the n largest values, ties by place; the places ascend."""
    if values.dtype == torch.float32:
        # As integers in the same order, all different, of which `topk` finds the largest in a third of the time.
        place = torch.arange(values.shape[0], device=values.device)
        return (ordered(values) * 2**32 - place).topk(n, sorted=False).indices.sort().values
    return values.sort(descending=True, stable=True).indices[:n].sort().values


def _fake_groups(blocks: Tensor, seed: Tensor, step: Tensor, row: Tensor, *_: Any) -> _Chosen:
    of_group = blocks.new_empty(*row.shape, _BLOCKS)
    return torch.empty_like(row), blocks.new_empty(row.shape), blocks.new_empty(blocks.shape[0]), of_group


@operator("choose_groups", fake=_fake_groups)
def _choose_groups_op(
    blocks: Tensor, seed: Tensor, step: Tensor, row: Tensor, origin: Tensor | None, offset: int
) -> _Chosen:
    first = _number(origin, offset)
    found = dispatch.choose_groups(blocks, seed, step, row, AMONG_GROUPS, first, _BLOCKS)
    return _choose_groups(blocks, Noise(seed, step, row), first) if found is None else found


def _fake_children(log_mass: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    parent = cast(Tensor, arguments[-1])
    return torch.empty_like(parent), log_mass.new_empty(parent.shape)


@operator("choose_children", fake=_fake_children)
def _choose_children_op(
    log_mass: Tensor, seed: Tensor, step: Tensor, row: Tensor, level: int, parent: Tensor
) -> tuple[Tensor, Tensor]:
    found = dispatch.choose_children(log_mass, seed, step, row, level, parent)
    return _choose_children(log_mass, Noise(seed, step, row), level, parent) if found is None else found


def _fake_largest_groups(blocks: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    n = arguments[-1]
    return blocks.new_empty(n, dtype=torch.int64), blocks.new_empty(n), blocks.new_empty(n, blocks.shape[1])


@operator("largest_groups", fake=_fake_largest_groups)
def _largest_groups_op(
    blocks: Tensor, seed: Tensor, step: Tensor, row: Tensor, origin: Tensor | None, offset: int, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    first = _number(origin, offset)
    found = dispatch.largest_groups(blocks, seed, step, row, AMONG_GROUPS, first, n)
    return _largest_groups(blocks, Noise(seed, step, row), first, n) if found is None else found


def _fake_largest_children(log_mass: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    n = arguments[-1]
    return log_mass.new_empty(n, dtype=torch.int64), log_mass.new_empty(n), log_mass.new_empty(n)


@operator("largest_children", fake=_fake_largest_children)
def _largest_children_op(
    log_mass: Tensor,
    seed: Tensor,
    step: Tensor,
    row: Tensor,
    level: int,
    parent: Tensor,
    perturbed: Tensor,
    n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    found = dispatch.largest_children(log_mass, seed, step, row, level, parent, perturbed, n)
    return _largest_children(log_mass, Noise(seed, step, row), level, parent, perturbed, n) if found is None else found
