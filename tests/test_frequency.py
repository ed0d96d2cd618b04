"""Frequencies of a stream against plain Python and known probabilities; log-Q correction over all streams, exactly."""

from __future__ import annotations

import importlib
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDictBase
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import negcache_fn
from negcache_fn.frequency import init_frequency, log_frequency, observe
from tests.support import oracles
from tests.support.builders import assert_same_state, is_close, unit
from tests.support.checks.steps import Tower, documents
from tests.support.checks.updates import pure

IDS = (-1, 0, 1, 2, 3, 5, 2**32, 2**40 + 3, 2**62, -2, -(2**63))
# Errors in units of the standard error, of means over 96 documents: beyond 6 with probability 4e-8 (Student's t).
DOCUMENTS, LIMIT = 96, 6.0
CORPUS = (0.6, 0.3, 0.1)  # probabilities with which a document is drawn from a corpus of three
SCORES = (1.1, -0.7, 0.3)


class Model:
    """The estimator with dictionaries and floats."""

    def __init__(self, buckets: int, hashes: int) -> None:
        self.buckets, self.hashes, self.step = buckets, hashes, 0
        self.tables: list[dict[int, tuple[float, int, int]]] = [{} for _ in range(hashes)]

    def bucket(self, table: int, name: int) -> int:
        """A word of Philox with the id as counter."""
        words = oracles.philox4x32([name % 2**32, (name >> 32) % 2**32, table // 4, 0], [0x6E656763, 0x61636865])
        return words[table % 4] % self.buckets

    def observe(self, ids: list[int], rate: float) -> None:
        """One batch; ids are those that count."""
        self.step += 1
        for number, table in enumerate(self.tables):
            for bucket in {self.bucket(number, name) for name in ids}:
                mean, seen_at, count = table.get(bucket, (0.0, 0, 0))
                weight = max(rate, 1 / (count + 1))
                table[bucket] = ((1 - weight) * mean + weight * (self.step - seen_at), self.step, count + 1)

    def log_frequency(self, name: int) -> float:
        """Of one id."""
        if name == -1:
            return 0.0
        unknown = (self.step + 1.0, 0, 0)
        return -math.log(max(table.get(self.bucket(n, name), unknown)[0] for n, table in enumerate(self.tables)))


def observed(batches: Tensor, *, buckets: int = 2**12, hashes: int = 4, rate: float = 0.05) -> TensorDictBase:
    """The frequency after batches [steps, documents] bool of documents 0, 1, ..."""
    frequency = init_frequency(buckets, hashes=hashes)
    names = torch.arange(batches.shape[1])
    for present in batches:
        frequency = observe(frequency, names, rate=rate, mask=present)
    return frequency


@given(data=st.data(), buckets=st.sampled_from([1, 3, 7, 1000]), hashes=st.integers(1, 6))
def test_equals_a_plain_model(data: st.DataObject, buckets: int, hashes: int) -> None:
    """Any stream with duplicates, collisions, anonymous and masked rows."""
    frequency, model = init_frequency(buckets, hashes=hashes), Model(buckets, hashes)
    for _ in range(data.draw(st.integers(1, 6))):
        rate = data.draw(st.sampled_from([1e-6, 0.05, 0.4, 1]))
        ids = data.draw(st.lists(st.sampled_from(IDS), min_size=1, max_size=6))
        mask = data.draw(st.none() | st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        model.observe([name for n, name in enumerate(ids) if name != -1 and (mask is None or mask[n])], rate)
        tensors = torch.tensor(ids), None if mask is None else torch.tensor(mask)
        frequency = observe(frequency, tensors[0], rate=rate, mask=tensors[1])
        expected = torch.tensor([model.log_frequency(name) for name in IDS], dtype=torch.float64)
        found = log_frequency(frequency, torch.tensor(IDS))
        assert found.dtype == torch.float32
        assert is_close(found, expected, 1e-6)
    for number, table in enumerate(model.tables):
        assert {n: int(count) for n, count in enumerate(frequency["sightings"][number]) if count} == {
            bucket: count for bucket, (_, _, count) in table.items()
        }
        assert all(int(frequency["seen_at"][number, bucket]) == at for bucket, (_, at, _) in table.items())
    assert int(frequency["step"]) == model.step


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_unbiased_from_the_first_sighting(probability: float) -> None:
    """Over all streams of 8 batches: the interval of what is in the last one has mean `(1 - (1 - p)^8) / p`."""
    steps = 8
    streams = torch.tensor(list(itertools.product([False, True], repeat=steps - 1)))
    streams = torch.cat([streams, torch.ones(len(streams), 1, dtype=torch.bool)], 1)  # a document each
    hits = streams[:, :-1].sum(1).double()
    chances = probability**hits * (1 - probability) ** (steps - 1 - hits)
    intervals = (-log_frequency(observed(streams.t(), rate=1e-6), torch.arange(len(streams)))).double().exp()
    expected = (1 - (1 - probability) ** steps) / probability
    assert float(chances.sum()) == pytest.approx(1, rel=1e-12)
    assert float(chances @ intervals) == pytest.approx(expected, rel=1e-6)


def standard_errors(frequency: TensorDictBase, probability: float, names: Tensor) -> float:
    """How far the mean interval of documents of one probability is from its inverse."""
    intervals = (-log_frequency(frequency, names)).double().exp()
    return float((intervals.mean() - 1 / probability).abs() / (intervals.std() / math.sqrt(len(names))))


def stream(steps: int, probabilities: Tensor, seed: int) -> Tensor:
    """[steps, documents] bool, every document in every batch by a coin of its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, len(probabilities), generator=generator) < probabilities


def test_converges_to_known_frequencies() -> None:
    """Documents of three frequencies in one stream."""
    known = (0.5, 0.2, 0.05)
    frequency = observed(stream(300, torch.tensor(known).repeat_interleave(DOCUMENTS), seed=1))
    for n, probability in enumerate(known):
        names = torch.arange(n * DOCUMENTS, (n + 1) * DOCUMENTS)
        assert standard_errors(frequency, probability, names) < LIMIT
        assert standard_errors(frequency, probability * 1.3, names) > LIMIT  # so the test can fail


def test_follows_a_changed_frequency() -> None:
    """What was rare becomes frequent and the other way round; of the old mean a factor 0.8^50 is left."""
    before, after = torch.tensor([0.1, 0.5]), torch.tensor([0.5, 0.1])
    parts = [stream(500, values.repeat_interleave(DOCUMENTS), seed=n) for n, values in enumerate((before, after))]
    frequency = observed(torch.cat(parts), rate=0.2)
    for n in range(2):
        names = torch.arange(n * DOCUMENTS, (n + 1) * DOCUMENTS)
        assert standard_errors(frequency, float(after[n]), names) < LIMIT
        assert standard_errors(frequency, float(before[n]), names) > LIMIT


@given(
    batches=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=12),
    buckets=st.sampled_from([1, 2, 5]),
)
def test_collisions_bias_upwards_at_most(batches: list[list[int]], buckets: int) -> None:
    """Of what is in the last batch, never below its own share of the batches; more hashes never raise it."""
    frequencies = {}
    for hashes in (1, 3):
        frequency = init_frequency(buckets, hashes=hashes)
        for ids in batches:
            frequency = observe(frequency, torch.tensor(ids), rate=1e-6)
        frequencies[hashes] = log_frequency(frequency, torch.tensor(batches[-1])).exp().tolist()
    for one, three, name in zip(frequencies[1], frequencies[3], batches[-1], strict=True):
        share = sum(name in ids for ids in batches) / len(batches)
        assert share - 1e-6 <= three <= one <= 1


def test_a_batch_counts_a_document_once() -> None:
    """The frequency is the probability of being in a batch, not the expected number of copies."""
    once, often = (observe(init_frequency(50), torch.tensor(ids)) for ids in ([4, 9, 9], [9, 4, 4, 4, 9]))
    assert_same_state(once, often)


def test_anonymous_ids_are_not_observed_and_not_corrected() -> None:
    """A batch without ids is a batch all the same."""
    frequency = observe(init_frequency(50), torch.tensor([-1, -1]))
    assert int(frequency["step"]) == 1
    assert not bool(frequency["sightings"].any())
    assert log_frequency(frequency, torch.tensor([-1])).tolist() == [0.0]
    assert log_frequency(init_frequency(50), torch.tensor([3])).tolist() == [0.0]


@pytest.mark.parametrize("locked", [True, False])
def test_frequencies_are_values(locked: bool) -> None:
    """Nothing is written to an argument, no storage shared, the lock as it was; saved and loaded it goes on."""
    frequency = observe(init_frequency(50, hashes=5), torch.tensor([1, 2]))
    frequency = frequency if locked else frequency.unlock_()
    ids, mask = torch.tensor([1, 3, -1, 7]), torch.tensor([True, True, True, False])
    after = pure(observe, frequency, ids, rate=0.5, mask=mask)
    pure(log_frequency, after, ids)
    pure(init_frequency, 50, hashes=5)
    assert after.is_locked == locked
    before = {value.data_ptr() for value in frequency.values()}
    assert not before & {value.data_ptr() for value in after.values()}
    assert {value.dtype for value in after.values()} == {torch.int64, torch.float32}


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, at the import of inductor
        importlib.import_module("torch._inductor.compile_fx")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.no_cover
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_compiles_into_one_frame(backend: str) -> None:
    """Observing and correcting, without inductor also the step: one full graph for four steps, equal to eager."""
    tower = Tower()

    def train_step(state: Any, frequency: TensorDictBase, batch: Any, ids: Tensor) -> tuple[Tensor, Any, Any]:
        frequency = observe(frequency, ids, mask=ids != 3)
        weights = -log_frequency(frequency, ids)
        if backend == "inductor":
            return weights, state, frequency
        out = negcache_fn.step(state, tower(batch), batch, tower, ids=ids, log_weights=weights)
        return out.loss, out.state, frequency

    counter = CompileCounterWithBackend(backend)
    ends = []
    for function in (train_step, torch.compile(train_step, fullgraph=True, backend=counter)):
        state, frequency = negcache_fn.init_cache(40, 6, documents(1, 0)), init_frequency(30, hashes=3)
        results = []
        for n in range(4):
            result, state, frequency = function(state, frequency, documents(4, n), torch.tensor([n % 2, 5, -1, 3]))
            results.append(result.detach())
        assert frequency.is_locked
        ends.append((torch.stack(results), frequency, state["items", "log_weight"]))
    assert counter.frame_count == 1
    assert is_close(ends[1][0], ends[0][0], 1e-5)
    assert is_close(ends[1][2], ends[0][2], 1e-6)
    for key in ("seen_at", "sightings", "step"):
        assert torch.equal(ends[1][1][key], ends[0][1][key])
    assert is_close(ends[1][1]["interval"], ends[0][1]["interval"], 1e-6)


def expected_partition(log_weights: list[float], insertions: int, *, with_ids: bool) -> float:
    """Mean of the cache's partition function over all streams from the corpus: `insertions` documents are cached.

    Without ids the streams are one longer than the cache, so that the first document is evicted.
    """
    length = insertions if with_ids else insertions + 1
    query = torch.ones(1, 1, dtype=torch.float64)
    vectors, weights = torch.tensor(SCORES, dtype=torch.float64)[:, None], torch.tensor(log_weights)
    empty = negcache_fn.init_cache(insertions, 1, vectors, embedding_dtype=torch.float64)
    total = 0.0
    for documents_ in itertools.product(range(len(CORPUS)), repeat=length):
        state = empty
        for rows in torch.tensor(documents_).split(insertions - 1):
            ids = rows if with_ids else None
            state = negcache_fn.update(state, vectors[rows], vectors[rows], ids=ids, log_weights=weights[rows])
        partition = negcache_fn.sample_gumbel(state, query).log_normalizer.exp()
        total += math.prod(CORPUS[name] for name in documents_) * float(partition)
    return total


CASES = [
    # Every copy counts (Hansen-Hurwitz): the expected number of copies.
    pytest.param(False, lambda chance, insertions: insertions * chance, id="without ids"),
    # A document is in the cache once (Horvitz-Thompson): the probability that it is.
    pytest.param(True, lambda chance, insertions: 1 - (1 - chance) ** insertions, id="with ids"),
]


@pytest.mark.parametrize(("with_ids", "rate"), CASES)
def test_correction_makes_the_partition_function_unbiased(with_ids: bool, rate: Any) -> None:
    """Minus the log, over all streams, up to float32; plus the log, or the other case's weights, is far off."""
    insertions, exact = 3, sum(map(math.exp, SCORES))
    right = [-math.log(rate(chance, insertions)) for chance in CORPUS]
    other = [-math.log(CASES[not with_ids].values[1](chance, insertions)) for chance in CORPUS]
    assert expected_partition(right, insertions, with_ids=with_ids) == pytest.approx(exact, rel=1e-6)
    for wrong in (other, [-weight for weight in right]):
        assert expected_partition(wrong, insertions, with_ids=with_ids) != pytest.approx(exact, rel=0.1)


def test_rarer_documents_weigh_more() -> None:
    """The sign: `-log_frequency` is what `logits - log(candidate_sampling_probability)` adds."""
    frequency = observed(stream(300, torch.tensor([0.9, 0.5, 0.1]), seed=0))
    weights = -log_frequency(frequency, torch.arange(3))
    assert weights.diff().min() > 0
    state = negcache_fn.init_cache(4, 6, torch.zeros(1, 3))
    queries, own = unit(3, 6, 0, torch.float64), unit(3, 6, 1, torch.float64)
    found = negcache_fn.exact_loss(state, queries, own, scale=5.0, log_weights=weights)
    logits = 5.0 * queries @ own.t() - weights.neg().double().exp().log()
    assert is_close(found, torch.nn.functional.cross_entropy(logits, torch.arange(3)), 1e-6)


def test_the_positive_can_stay_uncorrected() -> None:
    """The loss without the weight of the positive alone, whose gradient is that of `(1 - p) (log Z - s)`, p constant.

    That is the loss of Khrylchenko et al., RecSys 2025, in which the positive is not among the sampled.
    """
    state = negcache_fn.init_cache(8, 6, torch.zeros(1, 3), embedding_dtype=torch.float64)
    state = negcache_fn.update(state, torch.zeros(5, 3), unit(5, 6, 2, torch.float64), log_weights=torch.arange(5.0))
    queries, own = unit(3, 6, 0, torch.float64).requires_grad_(), unit(4, 6, 1, torch.float64).requires_grad_()
    weights = torch.tensor([0.5, 2.0, -1.0, 3.0], dtype=torch.float64)
    found = negcache_fn.exact_loss(
        state, queries, own, scale=4.0, log_weights=weights, weigh_positives=False, reduction="none"
    )
    in_batch = 4.0 * queries @ own.t() + weights * (1 - torch.eye(3, 4, dtype=torch.float64))
    logits = torch.cat([in_batch, negcache_fn.score(state, queries, scale=4.0)], 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(3), reduction="none")
    assert is_close(found, expected, 1e-12)
    positive, others = logits.diagonal(), logits.masked_fill(torch.eye(*logits.shape, dtype=torch.bool), -math.inf)
    of_paper = (-expected.detach()).expm1().neg() * (others.logsumexp(1) - positive)
    gradients = [
        torch.autograd.grad(losses.sum(), [queries, own], retain_graph=True) for losses in (found, expected, of_paper)
    ]
    for one, other, papers in zip(*gradients, strict=True):
        assert is_close(one, other, 1e-11)
        assert is_close(one, papers, 1e-11)


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (ValueError, "buckets is 0", lambda f: init_frequency(0)),
        (TypeError, "hashes is 1.5", lambda f: init_frequency(5, hashes=1.5)),
        (TypeError, "frequency is a dict", lambda f: observe({}, torch.tensor([1]))),
        (ValueError, "frequency has keys", lambda f: log_frequency(f.exclude("step"), torch.tensor([1]))),
        (ValueError, r"ids has shape \(0,\)", lambda f: observe(f, torch.empty(0, dtype=torch.int64))),
        (ValueError, r"ids has shape \(1, 1\)", lambda f: log_frequency(f, torch.tensor([[1]]))),
        (TypeError, "ids has dtype torch.float32", lambda f: observe(f, torch.ones(2))),
        (ValueError, "rate is 0;", lambda f: observe(f, torch.tensor([1]), rate=0)),
        (ValueError, "rate is nan", lambda f: observe(f, torch.tensor([1]), rate=math.nan)),
        (TypeError, "rate is a bool", lambda f: observe(f, torch.tensor([1]), rate=True)),
        (ValueError, "mask has shape", lambda f: observe(f, torch.tensor([1]), mask=torch.ones(2, dtype=torch.bool))),
        (TypeError, "mask has dtype", lambda f: observe(f, torch.tensor([1]), mask=torch.tensor([1]))),
        (TypeError, "group is a str", lambda f: observe(f, torch.tensor([1]), group="world")),
    ],
)
def test_errors_name_what_is_wrong(error: type[Exception], text: str, call: Any) -> None:
    """The argument, what came and what was expected."""
    with pytest.raises(error, match=text):
        call(init_frequency(5))
