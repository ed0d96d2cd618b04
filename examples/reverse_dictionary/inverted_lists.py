"""What draws from inverted lists would lose: ``python -m examples.reverse_dictionary.inverted_lists``, a simulation.

With 10^9 documents a step cannot pass over all of them. Here they are in lists around centroids: each query
scores the documents of its best lists, and all others have the score of their centroid. Such a score is like a stale
one: documents are drawn by it for the batch, and the ratio that corrects staleness corrects it. Everything is compared
with the exact softmax over all, where nothing is stale.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor
from tqdm import tqdm

from examples.benchmarks.report import fill_page
from examples.command_line import CommandParser, positive, run
from examples.reverse_dictionary.corpus import Corpus
from examples.reverse_dictionary.encoder import Encoder
from examples.whole_files import written_whole

__all__ = ["Found", "Lists", "embedded", "lists_of", "main", "simulate"]

_SHARES = (1.0, 0.1, 0.03, 0.01, 0.0)


def main(arguments: list[str] | None = None) -> int:
    """Simulates, prints the table, and fills a page; returns the exit status."""
    parser = CommandParser("reverse_dictionary.inverted_lists", description=__doc__)
    data = Path("runs/reverse_dictionary/prepared")
    parser.add_argument("--data", type=Path, default=data, metavar="DIR", help="what `prepare` wrote")
    parser.add_argument("--lists", type=positive, default=1024, help="number of lists")
    parser.add_argument("--batch", type=positive, default=256, help="queries, and documents drawn for them")
    parser.add_argument("--scale", type=float, default=20.0, help="of the scores")
    parser.add_argument("--draws", type=positive, default=64, help="repetitions of the draw")
    parser.add_argument("--page", type=Path, metavar="FILE", help="fill this page")
    return run(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    corpus = Corpus.load(options.data, torch.device("cpu"))
    documents = embedded(options.data, corpus)
    rows = corpus.rows_of("validation", at_most=options.batch)
    with torch.no_grad():
        queries = Encoder.load(options.data)(corpus.queries[rows])
    lists = lists_of(documents, options.lists)
    lines = [
        f"{len(documents):,} documents in {options.lists:,} lists; {options.batch} queries, as many draws for the "
        f"batch; scale {options.scale:g}.",
        "",
        "| a query scores | log-normalizer | without the draws | query gradient | document gradient: bias | noise |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for share in _SHARES:
        found = simulate(queries, rows, documents, lists, share=share, scale=options.scale, repetitions=options.draws)
        cells = (f"{share:.0%}", *(f"{value:.2f}" for value in found.values()))
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    if options.page is not None:
        fill_page(options.page, {"inverted_lists": "\n".join(lines)})


def embedded(folder: Path, corpus: Corpus) -> Tensor:
    """The embeddings of all documents, kept in a file: encoding them takes minutes."""
    file = folder / "embeddings.npy"
    if not file.exists():
        encoder = Encoder.load(folder)
        with torch.no_grad():
            parts = [encoder(tokens) for tokens in tqdm(corpus.documents.split(512), desc="encoding", unit="batch")]
        with written_whole(file) as unfinished, unfinished.open("wb") as opened:
            np.save(opened, torch.cat(parts).numpy())
    return torch.from_numpy(np.load(file))


@dataclass(frozen=True)
class Lists:
    """N documents in L lists."""

    of_document: Tensor
    """[N] int64."""
    centroids: Tensor
    """[L, D]: the means of their documents."""
    sizes: Tensor
    """[L] int64."""

    @property
    def spread(self) -> Tensor:
        """[L]: the variance in every direction, if it is the same in all; documents have unit length."""
        return (1 - self.centroids.square().sum(1)) / self.centroids.shape[1]

    def scores(self, queries: Tensor) -> Tensor:
        """[B, L]: what a document of a list scores, as if they were normal around the centroid."""
        return queries @ self.centroids.T + queries.square().sum(1, keepdim=True) * self.spread / 2

    def gradient(self, queries: Tensor, weights: Tensor) -> Tensor:
        """[B, D]: of `(weights * scores(queries)).sum()`."""
        return weights @ self.centroids + queries * (weights @ self.spread)[:, None]


@dataclass(frozen=True)
class Found:
    """Root mean squares; of gradients relative to the exact one's length."""

    log_normalizer: float
    without_draws: float
    """Error of the log-normalizer that leaves out what was not scored."""
    query_gradient: float
    bias: float
    noise: float

    def values(self) -> tuple[float, ...]:
        """In the order of the table."""
        return self.log_normalizer, self.without_draws, self.query_gradient, self.bias, self.noise


def lists_of(documents: Tensor, count: int) -> Lists:
    """By k-means."""
    found = MiniBatchKMeans(count, batch_size=16_384, n_init=1, random_state=0).fit(documents.numpy())
    of_document = torch.from_numpy(found.labels_).long()
    sizes = of_document.bincount(minlength=count)
    total = torch.zeros(count, documents.shape[1]).index_add_(0, of_document, documents)
    return Lists(of_document, total / sizes.clamp(min=1)[:, None], sizes)


def simulate(
    queries: Tensor, positives: Tensor, documents: Tensor, lists: Lists, *, share: float, scale: float, repetitions: int
) -> Found:
    """Draws as many documents as there are queries, from a cache of all but the batch's.

    Args:
        queries: [B, D] of unit length.
        positives: [B] rows of their documents, which are the batch.
        documents: [N, D] of unit length.
        lists: of all documents.
        share: of the documents that a query scores, in the lists of most mass for it.
        scale: of the scores.
        repetitions: independent draws.
    """
    queries, documents, count = scale * queries.double(), documents.double(), len(queries)
    fresh = queries @ documents.T
    in_batch = fresh[:, positives].logsumexp(1)
    fresh[:, positives] = -math.inf

    lists = replace(lists, centroids=lists.centroids.double())
    per_list, of = lists.scores(queries), lists.of_document
    best = (per_list + lists.sizes.log()).argsort(1, descending=True)
    within = lists.sizes[best].cumsum(1) <= share * len(documents)
    scored = torch.zeros_like(within).scatter_(1, best, within)[:, of]
    # What the cache would know: as if it were stale, scores that the draws correct.
    known = torch.where(scored, fresh, per_list[:, of]).index_fill(1, positives, -math.inf)
    total = known.logsumexp(1)
    log_a = _needed(known, total, in_batch).logsumexp(0)

    def derivative(weights: Tensor, scored: Tensor, documents: Tensor, of: Tensor) -> Tensor:
        """[B, D]: of the known scores of some documents, each with its weight."""
        unscored = torch.zeros_like(per_list).index_add_(1, of, weights * ~scored)
        return (weights * scored) @ documents + lists.gradient(queries, unscored)

    at_all = derivative((known - total[:, None]).exp(), scored, documents, of)
    exact = _needed(fresh, fresh.logsumexp(1), in_batch).exp() @ documents
    generator = torch.Generator().manual_seed(0)
    errors: list[Tensor] = []
    at_queries: list[Tensor] = []
    at_documents: list[Tensor] = []
    for _ in range(repetitions):
        slots, log_weight = _draw(log_a, count, generator)
        weighed_fresh, weighed_known = fresh[:, slots] + log_weight, known[:, slots] + log_weight
        logit = total + weighed_fresh.logsumexp(1) - weighed_known.logsumexp(1)
        errors.append(logit - fresh.logsumexp(1))
        after, drawn = weighed_fresh.softmax(1), documents[slots]
        at_drawn = derivative(weighed_known.softmax(1), scored[:, slots], drawn, of[slots])
        share_of_cache = _share(logit, in_batch)[:, None]
        at_queries.append(share_of_cache * (at_all + after @ drawn - at_drawn))
        at_documents.append(queries.T @ (share_of_cache * after) @ drawn)
    whole = queries.T @ exact
    stacked = torch.stack(at_documents)
    mean = stacked.mean(0)
    variance = float((stacked - mean).square().sum((1, 2)).mean())
    bias = float((mean - whole).square().sum()) - variance / repetitions  # less what the mean still has of the noise
    left_out = fresh.masked_fill(~scored, -math.inf).logsumexp(1)
    return Found(
        log_normalizer=_root_mean_square(torch.stack(errors)),
        without_draws=_root_mean_square(left_out - fresh.logsumexp(1)),
        query_gradient=_root_mean_square(torch.stack(at_queries) - exact) / _root_mean_square(exact),
        bias=math.sqrt(max(0.0, bias)) / float(whole.norm()),
        noise=math.sqrt(variance) / float(whole.norm()),
    )


def _draw(log_a: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[M] different documents in proportion to exp(log_a), and log of one over their inclusion probability."""
    uniform = torch.rand(len(log_a), generator=generator, dtype=log_a.dtype)
    values, slots = (log_a - (-uniform.log()).log()).topk(count + 1)
    return slots[:-1], -torch.log(-torch.expm1(-(log_a[slots[:-1]] - values[-1]).exp()))


def _share(logit: Tensor, in_batch: Tensor) -> Tensor:
    """P_i, the share of the cache in a query's softmax."""
    return (logit - torch.logaddexp(in_batch, logit)).exp()


def _needed(scores: Tensor, total: Tensor, in_batch: Tensor) -> Tensor:
    """log(P_i p_i(j)): how much of the loss's gradient is in each score."""
    return scores - total[:, None] + _share(total, in_batch).log()[:, None]


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


if __name__ == "__main__":
    sys.exit(main())
