"""Additions of `MultipleNegativesRankingLoss` to a query's softmax over documents: directions, weights of hardness.

With `Z_i` the normaliser of query i over documents, those of the cache included, and `s_i` the score of its positive, a
step gives `loss_i = log Z_i - s_i`. Everything here is a function of that:

    "joint"          log(Z_i + sum of the exponentials of the further directions) - s_i
    "per_direction"  the mean of `log Z - s_i` over the directions
    hardness         Z_i + sum_j exp(s_ij) (exp(penalty_ij) - 1), j being the query's own hard negatives

Another query whose positive has the same id, and that positive, are not negatives in any direction.

Sources: Guenther et al., "Jina Embeddings 2", 2023 ("per_direction"); Li et al., "Towards General Text Embeddings",
2023 ("joint"); Schechter Vera et al., "EmbeddingGemma", 2025 (hardness of hard negatives).
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
from negcache_fn._scores.stream import logsumexp
from negcache_fn.integrations.sentence_transformers.settings import Settings

__all__ = ["BatchFacts", "Terms"]

_INFINITY = float("inf")


class BatchFacts(NamedTuple):
    """Facts about the documents of a batch."""

    ids: Tensor | None  # [N]
    log_weights: Tensor | None  # [N]
    cacheable: Tensor | None  # [N]
    false_negatives: FalseNegatives

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
        classes = batch_classes(queries.shape[0], self.documents, facts.ids, facts.log_weights, options, ranks)
        with full_precision(queries):
            scores = batch_scores(self.similarity, self.queries, classes, options, facts.false_negatives)
        self.logits: Tensor = scores[0]
        self.positive: Tensor = scores[1]

    def without_cache(self) -> Tensor:
        """[B]: the cross entropy without a cache."""
        if self.settings.negatives == "own":
            return self.positive.new_zeros(self.positive.shape)
        return self.logits.logsumexp(1) - self.positive

    def complete(self, losses: Tensor) -> Tensor:
        """[]: of the cross entropies [B] over documents, with everything that the settings add to them."""
        with full_precision(losses):
            hard, penalty = self._own_hard_negatives()
            if self.settings.negatives == "own":
                losses = self._joined(losses, hard + penalty)
            elif hard.shape[1] and self.settings.hardness_mode is not None:
                # Each exponential relative to the normaliser, so that nothing overflows.
                shares = (hard - (losses + self.positive)[:, None]).exp()
                losses = losses + torch.log1p((shares * torch.expm1(penalty)).sum(1))
            further = [self._scores_of(name) for name in dict.fromkeys(self.settings.directions)]
            further = [scores for scores in further if scores is not None]
            if not further:
                return losses.mean()
            if self.settings.partition_mode == "joint":
                return self._joined(losses, torch.cat(further, 1)).mean()
            positive = self.positive_similarity()
            each = [losses, *(logsumexp(scores) - positive for scores in further)]
            return torch.stack(each).mean()

    def positive_similarity(self) -> Tensor:
        """[B] the scores of the positives, without log-weights."""
        return positive_scores(self.similarity, self.queries, self.documents)

    def _joined(self, losses: Tensor, scores: Tensor) -> Tensor:
        """The cross entropies with further classes [B, n]."""
        if not scores.shape[1]:
            return losses
        return torch.logaddexp(losses, logsumexp(scores) - self.positive)

    def _own_hard_negatives(self) -> tuple[Tensor, Tensor]:
        """[B, n] each: the scores of a query's own hard negatives, and the weights of their hardness."""
        rows = self.queries.shape[0]
        count = self.documents.shape[0] // rows - 1
        # Among the classes, after the positives of all ranks and the hard negatives of the ranks before.
        first = self.ranks.size * rows + self.ranks.rank * rows * count
        if self.logits.shape[1] == self.documents.shape[0]:
            first = rows
        place = torch.arange(rows, device=self.logits.device)[:, None] + first
        place = place + torch.arange(count, device=self.logits.device) * rows
        scores = self.logits.gather(1, place)
        if self.settings.hardness_mode is None or not count:
            return scores, torch.zeros_like(scores)
        own = self.documents[rows:].view(count, rows, -1).transpose(0, 1)
        similarity = (self.queries[:, None] * own).sum(-1).detach()
        return scores, self.settings.hardness_strength * similarity

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
            excluded = number == own
            same = _same(ids, of_others) & ~excluded if ids is not None and of_others is not None else None
            if direction == "doc_to_query":
                excluded = torch.zeros_like(excluded)
        else:
            others = positives_first(ranks.gather(self.documents), rows, ranks)
            scores = self.similarity.pairwise(positives, others)
            excluded = self._documents_of_the_query(number, own)
            known = self.facts.ids
            of_others = None if known is None else positives_first(ranks.gather_all(known)[0], rows, ranks)
            same = None if ids is None or of_others is None else _same(ids, of_others)
        excluded = excluded if same is None else excluded | same
        return scores.masked_fill(excluded, -_INFINITY)

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
