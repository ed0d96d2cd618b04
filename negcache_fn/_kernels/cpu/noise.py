"""Calls of the kernels that make noise, and choose by it."""

import torch
from torch import Tensor

from negcache_fn._kernels.cpu.build import library
from negcache_fn._kernels.cpu.functions import function, run

__all__ = ["choose_children", "choose_groups", "gumbel", "largest_children", "largest_groups"]


def gumbel(seed: Tensor, step: Tensor, row: Tensor, quad: Tensor, level: int) -> Tensor | None:
    """[..., 4] the variates of `negcache_fn.random.gumbel`, bit for bit; None where there is no kernel."""
    if row.device.type != "cpu" or library() is None:
        return None
    out = torch.empty(*row.shape, 4, dtype=torch.float32)
    row, quad = row.contiguous(), quad.contiguous()
    pointers = (row.data_ptr(), quad.data_ptr(), row.numel(), level, out.data_ptr())
    function("negcache_uniform")(int(seed), int(step), *pointers)
    return out.neg_().log1p_().neg_().log_().neg_()


def choose_groups(
    blocks: Tensor, seed: Tensor, step: Tensor, row: Tensor, level: int, first_group: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `negcache_fn._draws.choose`."""
    group, log_normalizer = torch.empty_like(row), blocks.new_empty(blocks.shape[0])
    perturbed, of_group = blocks.new_empty(row.shape), blocks.new_empty(*row.shape, width)
    blocks, row = blocks.contiguous(), row.contiguous()
    run(
        "negcache_choose_groups",
        *(int(seed), int(step), level, blocks.data_ptr(), *blocks.shape),
        *(row.data_ptr(), row.shape[1], first_group, width),
        *(group.data_ptr(), perturbed.data_ptr(), log_normalizer.data_ptr(), of_group.data_ptr()),
    )
    return group, perturbed, log_normalizer, of_group


def choose_children(
    log_mass: Tensor, seed: Tensor, step: Tensor, row: Tensor, level: int, parent: Tensor
) -> tuple[Tensor, Tensor]:
    """See `negcache_fn._draws.choose`."""
    child, score = torch.empty_like(parent), log_mass.new_empty(parent.shape)
    log_mass, row, parent = log_mass.contiguous(), row.contiguous(), parent.contiguous()
    function("negcache_choose_children")(
        *(int(seed), int(step), level, log_mass.data_ptr(), row.data_ptr(), parent.data_ptr()),
        *(parent.numel(), log_mass.shape[-1], child.data_ptr(), score.data_ptr()),
    )
    return child, score


def largest_groups(
    blocks: Tensor, seed: Tensor, step: Tensor, row: Tensor, level: int, first_group: int, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `negcache_fn._draws.choose`."""
    group, perturbed = torch.empty(n, dtype=torch.int64), blocks.new_empty(n)
    of_group, blocks = blocks.new_empty(n, blocks.shape[1]), blocks.contiguous()
    run(
        "negcache_largest_groups",
        *(int(seed), int(step), level, blocks.data_ptr(), *blocks.shape, int(row), first_group, n),
        *(group.data_ptr(), perturbed.data_ptr(), of_group.data_ptr()),
    )
    return group, perturbed, of_group


def largest_children(
    log_mass: Tensor, seed: Tensor, step: Tensor, row: Tensor, level: int, parent: Tensor, perturbed: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `negcache_fn._draws.choose`."""
    child, of_child, mass = torch.empty(n, dtype=torch.int64), log_mass.new_empty(n), log_mass.new_empty(n)
    log_mass, parent, perturbed = log_mass.contiguous(), parent.contiguous(), perturbed.contiguous()
    run(
        "negcache_largest_children",
        *(int(seed), int(step), level, log_mass.data_ptr(), *log_mass.shape, int(row)),
        *(parent.data_ptr(), perturbed.data_ptr(), n, child.data_ptr(), of_child.data_ptr(), mass.data_ptr()),
    )
    return child, of_child, mass
