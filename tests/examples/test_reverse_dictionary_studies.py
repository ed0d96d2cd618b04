"""The studies of inverted lists and of the precision of a pass, where the answer is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import normalize

pytest.importorskip("sklearn")

from examples.reverse_dictionary.inverted_lists import Lists, lists_of, simulate
from examples.reverse_dictionary.precision import PRODUCTS, errors
from negcache_fn._codec import encode
from negcache_fn._kernels.cpu.call import block_logsumexp
from negcache_fn._kernels.dispatch import Problem
from tests.kernels.test_cpu import HAS_INTEGERS, configured, needs_kernels

COUNT, DIM, BATCH = 300, 6, 20


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(12, DIM, generator=generator)
    documents = normalize(centers[torch.arange(COUNT) % 12] + 0.4 * torch.randn(COUNT, DIM, generator=generator))
    queries = normalize(documents[:BATCH] + 0.3 * torch.randn(BATCH, DIM, generator=generator))
    return queries, documents


def test_every_document_scored_or_in_a_list_of_its_own_is_exact() -> None:
    queries, documents = vectors()
    alone = Lists(torch.arange(COUNT), documents, torch.ones(COUNT, dtype=torch.int64))
    for lists, share in ((lists_of(documents, 12), 1.0), (alone, 0.0)):
        found = simulate(queries, torch.arange(BATCH), documents, lists, share=share, scale=8.0, repetitions=3)
        assert found.log_normalizer < 1e-6
        assert found.query_gradient < 1e-6


def test_the_more_is_scored_the_less_is_wrong() -> None:
    queries, documents = vectors()
    lists = lists_of(documents, 12)
    found = [
        simulate(queries, torch.arange(BATCH), documents, lists, share=share, scale=8.0, repetitions=200)
        for share in (0.5, 0.2, 0.0)
    ]
    for name in ("log_normalizer", "without_draws", "query_gradient"):
        errors = [getattr(one, name) for one in found]
        assert errors == sorted(errors)
        assert errors[0] > 0
    assert all(one.log_normalizer < one.without_draws for one in found[1:])  # of half there is nearly all mass
    assert all(one.bias < 0.5 * one.noise for one in found)


def test_errors_fall_with_the_parts_of_a_number() -> None:
    queries, documents = vectors()
    kinds = ("1 part, 1 product", "2 parts, 3 products", "3 parts, 6 products")
    found = [errors(20.0 * queries, documents, PRODUCTS[kind]) for kind in kinds]
    for one, next_one in itertools.pairwise(found):
        assert all(better < worse / 8 for worse, better in zip(one, next_one, strict=True))
    assert max(found[-1]) < 1e-4
    assert max(errors(20.0 * queries, documents, PRODUCTS["float32"])) < 1e-4


def test_integers_err_less_than_bfloat16_storage() -> None:
    queries, documents = vectors()
    integers = errors(20.0 * queries, documents, PRODUCTS["16-bit integers"])
    stored = errors(20.0 * queries, documents, PRODUCTS["bfloat16 storage, float32"])
    assert all(1e-6 < better < worse / 8 for worse, better in zip(stored, integers, strict=True))


@needs_kernels
@pytest.mark.skipif(not HAS_INTEGERS, reason="no AVX-512 with VNNI here")
def test_integers_are_those_of_the_kernels() -> None:
    queries, documents = vectors()
    nothing = torch.empty(BATCH, 0, dtype=torch.int64)
    with configured("high", products="vectors"):
        of_kernel = block_logsumexp(Problem(20.0 * queries, documents, torch.zeros(COUNT), nothing, None))
    scores = PRODUCTS["16-bit integers"](20.0 * queries, documents)
    torch.testing.assert_close(of_kernel.logsumexp(1), scores.logsumexp(1).float(), atol=5e-6, rtol=0)
    stored = encode(documents, torch.int8)
    problem = Problem(20.0 * queries, stored["embedding"], torch.zeros(COUNT), nothing, None)
    with configured("medium", products="vectors"):
        of_kernel = block_logsumexp(problem._replace(row_scale=stored["embedding_scale"]))
    scores = PRODUCTS["int8 storage, queries of 8 bits"](20.0 * queries, documents)
    torch.testing.assert_close(of_kernel.logsumexp(1), scores.logsumexp(1).float(), atol=5e-4, rtol=0)


def test_queries_of_8_bits_err_as_much_as_int8_storage() -> None:
    queries, documents = vectors()
    stored = errors(20.0 * queries, documents, PRODUCTS["int8 storage"])
    rounded = errors(20.0 * queries, documents, PRODUCTS["int8 storage, queries of 8 bits"])
    assert all(worse < 4 * better for worse, better in zip(rounded, stored, strict=True))
