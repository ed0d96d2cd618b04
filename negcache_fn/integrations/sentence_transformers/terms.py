"""Additions of `MultipleNegativesRankingLoss` to a query's softmax over documents: directions, weights of hardness.

With `s_ij` the scores of query i and the documents of the batch, `s_i` that of its positive, and `c_i` the logit of the
cache, which a step estimates:

    Z_i              exp(c_i) + sum_j exp(s_ij + hardness_ij)
    "joint"          log(Z_i + sum of the exponentials of the further directions) - s_i
    "per_direction"  the mean of `log Z - s_i` over the directions

The hardness is `strength * stop_gradient(q_i . d_j)`, or 0 where the mode leaves a document out:

| mode                   | the positive | own hard negatives | other documents of the batch | the cache |
| ---------------------- | ------------ | ------------------ | ---------------------------- | --------- |
| "hard_negatives"       | 0            | weighted           | 0                            | 0         |
| "in_batch_negatives"   | 0            | 0                  | weighted                     | weighted  |
| "all_negatives"        | 0            | weighted           | weighted                     | weighted  |

Cached documents are those of other queries in earlier batches, so they weigh what they would in this one.

Another query whose positive has the same id, and that positive, are not negatives in any direction. A filter of false
negatives compares all similarities of row i, in every direction, with the limit that its pair gives.

Sources: Guenther et al., "Jina Embeddings 2", 2023 ("per_direction"); Li et al., "Towards General Text Embeddings",
2023 ("joint"); Lan et al., "LLaVE", 2025, equation 5 (hardness); Schechter Vera et al., "EmbeddingGemma", 2025 (of hard
negatives); Solatorio, "GISTEmbed", 2024 (the filter in every direction).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from negcache_fn._cache.ids import named
from negcache_fn._loss.batch_classes import batch_classes, batch_scores, positive_scores
from negcache_fn._options import StepOptions
from negcache_fn._ranks.group import Ranks, positives_first
from negcache_fn._scores.definition import Similarity, full_precision
from negcache_fn._scores.exclude import FalseNegatives
from negcache_fn.integrations.sentence_transformers.settings import Settings

__all__ = ["BatchFacts", "Terms"]

_INFINITY = float("inf")


class BatchFacts(NamedTuple):
    """Facts about the documents of a batch."""

    ids: Tensor | None  # [N]
    log_weights: Tensor | None  # [N]
    cacheable: Tensor | None  # [N]
    false_negatives: FalseNegatives
    guides: tuple[Tensor, Tensor] | None = None  # [B, G] and [N, G] a guide's embeddings of queries and documents

    def without_own(self, queries: int) -> "BatchFacts":
        """The same, with each query's own hard negatives excluded from its draws, as they are classes already."""
        known = self.false_negatives
        if self.ids is None or self.ids.shape[0] == queries:
            return self
        own = self.ids[queries:].view(-1, queries).t()
        listed = own if known.ids is None else torch.cat([own, known.ids], 1)
        return self._replace(false_negatives=FalseNegatives(listed, known.max_score))


class Terms:
    """The batch's part of the loss, from embeddings of all or of the first dimensions.

    Args:
        queries: [B, D] of this rank.
        documents: [N, D], the positives first, then the hard negatives, column after column.
        facts: of the documents.
        scale: of the inner products.
        settings: of the loss.
        options: of the step, with the batch as classes.
        ranks: that share batches.
    """

    def __init__(
        self,
        queries: Tensor,
        documents: Tensor,
        facts: BatchFacts,
        scale: float | Tensor,
        settings: Settings,
        options: StepOptions,
        ranks: Ranks,
    ) -> None:
        dtype = torch.promote_types(queries.dtype, torch.float32)
        self.queries: Tensor = queries.to(dtype)
        self.documents: Tensor = documents.to(dtype)
        self.facts = facts
        self.settings = settings
        self.ranks = ranks
        self.similarity: Similarity = Similarity.of(options, scale, dtype)
        rows = queries.shape[0]
        self._classes = batch_classes(rows, self.documents, facts.ids, facts.log_weights, options, ranks)
        self._own = torch.arange(rows, device=queries.device)[:, None] + self._classes.first
        with full_precision(queries):
            scores = batch_scores(self.similarity, self.queries, self._classes, options, facts.false_negatives)
        self.logits: Tensor = scores.logits
        self.positive: Tensor = scores.positive
        if scores.is_target is not None:  # then it is not one of the logits
            self.logits = scores.logits.scatter(1, self._own, scores.positive)
            self.positive = scores.positive[:, 0]

    def complete(self, cache_logit: Tensor | None = None) -> Tensor:
        """[]: the loss with the cache as a class of logit [B], or without one."""
        with full_precision(self.queries):
            classes = [self._documents()]
            if cache_logit is not None:
                classes.append(cache_logit[:, None])
            further = [self._scores_of(name) for name in dict.fromkeys(self.settings.directions)]
            further = [scores for scores in further if scores is not None]
            if self.settings.partition_mode == "joint":
                return (torch.cat([*classes, *further], 1).logsumexp(1) - self.positive).mean()
            positive = self.positive_similarity()
            each = [torch.cat(classes, 1).logsumexp(1) - self.positive]
            each += [scores.logsumexp(1) - positive for scores in further]
            return torch.stack(each).mean()

    def positive_similarity(self) -> Tensor:
        """[B] the scores of the positives, without log-weights."""
        return positive_scores(self.similarity, self.queries, self.documents)

    def _documents(self) -> Tensor:
        """[B, n] the logits of the batch's documents, with their hardness."""
        logits, settings = self.logits, self.settings
        if settings.hardness_mode is not None:
            similarities = self.queries.detach() @ self._classes.documents.detach().T
            logits = logits + settings.hardness_strength * similarities.masked_fill(~self._weighted(), 0.0)
        if settings.negatives == "own":
            return logits.gather(1, torch.cat([self._own, self._own_hard_negatives()], 1))
        return logits

    def _weighted(self) -> Tensor:
        """[B, n] bool: the documents of the batch that the mode of hardness weights."""
        positive = torch.zeros_like(self.logits, dtype=torch.bool).scatter(1, self._own, True)
        hard = torch.zeros_like(positive).scatter(1, self._own_hard_negatives(), True)
        mode = self.settings.hardness_mode
        return hard if mode == "hard_negatives" else ~(positive | hard) if mode == "in_batch_negatives" else ~positive

    def _own_hard_negatives(self) -> Tensor:
        """[B, n] the columns of a query's own hard negatives."""
        rows, ranks = self.queries.shape[0], self.ranks
        count = self.documents.shape[0] // rows - 1
        # Among the classes, after the positives of all ranks and the hard negatives of the ranks before.
        first = rows
        if self.logits.shape[1] > self.documents.shape[0]:
            first = ranks.size * rows + ranks.rank * rows * count
        place = torch.arange(rows, device=self.logits.device)[:, None] + first
        return place + torch.arange(count, device=self.logits.device) * rows

    def _scores_of(self, direction: str) -> Tensor | None:
        """[B, n] of one of the further directions; None: it is that of the queries to the documents."""
        if direction == "query_to_doc":
            return None
        rows, ranks = self.queries.shape[0], self.ranks
        positives = self.documents[:rows]
        own = torch.arange(rows, device=positives.device)[:, None] + ranks.rank * rows
        number = torch.arange(rows * ranks.size, device=positives.device)
        ids = None if self.facts.ids is None else self.facts.ids[:rows]
        if direction != "doc_to_doc":
            others = ranks.gather(self.queries)
            of_others = None if ids is None else ranks.gather_all(ids)[0]
            scores = self.similarity.pairwise(positives if direction == "doc_to_query" else self.queries, others)
            pair = number == own
            excluded = self._false_negatives(direction, scores)
            if ids is not None and of_others is not None:
                excluded = excluded | _same(ids, of_others)
            excluded = excluded & ~pair if direction == "doc_to_query" else excluded | pair
        else:
            others = positives_first(ranks.gather(self.documents), rows, ranks)
            scores = self.similarity.pairwise(positives, others)
            excluded = self._documents_of_the_query(number, own) | self._false_negatives(direction, scores)
            known = self.facts.ids
            if ids is not None and known is not None:
                excluded = excluded | _same(ids, positives_first(ranks.gather_all(known)[0], rows, ranks))
        return scores.masked_fill(excluded, -_INFINITY)

    def _false_negatives(self, direction: str, scores: Tensor) -> Tensor:
        """[B, n] bool: the pairs of a direction, with these scores, that the filter finds too similar."""
        chosen = self.settings.false_negatives
        if chosen is None:
            return torch.zeros_like(scores, dtype=torch.bool)
        scores = scores.detach()
        if self.facts.guides is None:
            limit = chosen.by_score(self.similarity.scale).max_score
            assert callable(limit)
            return scores > limit(self.positive_similarity().detach())[:, None]
        queries, documents = self.facts.guides
        positives = documents[: queries.shape[0]]
        left = queries if direction == "query_to_query" else positives
        right = documents if direction == "doc_to_doc" else queries
        return left @ right.T > chosen.limit((queries * positives).sum(-1))[:, None]

    def _documents_of_the_query(self, number: Tensor, own: Tensor) -> Tensor:
        """[B, all documents] bool: its positive and its hard negatives."""
        rows, ranks = self.queries.shape[0], self.ranks
        count = self.documents.shape[0] // rows - 1
        of_rank = torch.arange(rows, device=number.device).repeat(count)
        hard = torch.cat([of_rank + rank * rows for rank in range(ranks.size)])
        return torch.cat([number, hard]) == own


def _same(ids: Tensor, others: Tensor) -> Tensor:
    """[B, n] bool: equal ids, of documents that have one."""
    return (ids[:, None] == others) & named(others)
