"""Which kernel takes a problem, and that callers are told when none does."""

from __future__ import annotations

import pytest
import torch

from negcache_fn._kernels import dispatch
from tests.kernels.test_cpu import needs_kernels, problem

NOT_FOR_KERNELS = {
    "a storage without a kernel": lambda given: given._replace(embeddings=given.embeddings.double()),
    "float64 queries": lambda given: given._replace(queries=given.queries.double()),
    "embeddings that are not contiguous": lambda given: given._replace(embeddings=given.embeddings.T.contiguous().T),
    "another device": lambda given: given._replace(queries=given.queries.to("meta")),
}


@pytest.mark.parametrize("case", NOT_FOR_KERNELS)
def test_no_kernel_takes(case: str) -> None:
    given_problem = NOT_FOR_KERNELS[case](dispatch.Problem(*problem(3, 130, 8, torch.float32, 1, 0), None))
    assert dispatch.block_logsumexp(given_problem) is None
    assert dispatch.score_blocks(given_problem, torch.zeros(3, 1, dtype=torch.int64)) is None
    assert dispatch.hardest(given_problem, 2) is None


@needs_kernels
def test_only_so_many_are_the_hardest() -> None:
    given_problem = dispatch.Problem(*problem(1, 1100, 2, torch.float32, 0, 0), None)
    assert dispatch.hardest(given_problem, 1024) is not None
    assert dispatch.hardest(given_problem, 1025) is None


def test_no_scan_of_another_device() -> None:
    key = torch.zeros(4, dtype=torch.int64, device="meta")
    assert dispatch.lowest_slots(key, key > 0, 2) is None
    assert dispatch.find_slots(key, key, key) is None
