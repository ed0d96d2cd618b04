"""The cache as a loss of sentence-transformers: `MultipleNegativesRankingLoss`, and the negatives of a cache."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim  # pyright: ignore[reportUnknownVariableType] - numpy's
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn.functional import normalize

from negcache_fn._cache.fill import reset, resize
from negcache_fn._checks import check_size
from negcache_fn._options import StepOptions
from negcache_fn.integrations.sentence_transformers.attributes import SETTINGS, Attributes
from negcache_fn.integrations.sentence_transformers.columns import own_features
from negcache_fn.integrations.sentence_transformers.facts import facts_of
from negcache_fn.integrations.sentence_transformers.filters import GUIDE, FalseNegativeFilter
from negcache_fn.integrations.sentence_transformers.layout import Layout
from negcache_fn.integrations.sentence_transformers.matryoshka import (
    Embedded,
    Sizes,
    in_batch_loss,
    is_decorated,
    train_step,
)
from negcache_fn.integrations.sentence_transformers.model import refuse_layers, sentence_transformer
from negcache_fn.integrations.sentence_transformers.pieces import row_count
from negcache_fn.integrations.sentence_transformers.reader import Column, Documents, Reader
from negcache_fn.integrations.sentence_transformers.same_loss import check_same_loss, next_number
from negcache_fn.integrations.sentence_transformers.settings import OfDocuments, Settings
from negcache_fn.integrations.sentence_transformers.slots import all_ranks, empty_cache, fill_cache, widened

__all__ = ["NegativeCacheLoss", "all_ranks"]

_ON_THE_CARD = (
    *("gather_across_devices", "directions", "partition_mode", "hardness_mode", "hardness_strength", "negatives"),
    *("cache_size", "mini_batch_size", "max_length", "document_ids"),
)


class NegativeCacheLoss(Attributes):
    """Cross entropy of each anchor's positive against the batch and a cache of earlier documents.

    Use `NegativeCacheLoss(model)` in place of `MultipleNegativesRankingLoss(model)`; it takes the same arguments. The
    first column is the anchor, the second its positive, further ones are hard negatives. Documents of all columns
    except the first enter the cache, with all features that the model takes. With an empty cache the loss equals
    `MultipleNegativesRankingLoss`, and also in evaluation, where gradients are off.

    All arguments are attributes, too. The first batch fixes those that define the cache; the others can be set during
    training, the scale in every step.

    The cache is not in the trainer's checkpoints: `NegativeCacheCallback` saves it beside them. The cache belongs to
    the model: with another model, as `model_init` makes for each trial, the loss starts with an empty cache.

    Args:
        model: the trained model, which preprocesses all columns of documents alike.
        cache_size: slots of each rank's cache; with `gather_across_devices`, of the cache of all ranks together
            (rounded up to a multiple of 1024 for each).
        scale: scale of the similarities, 1 / temperature.
        similarity_fct: `cos_sim` or `dot_score` of `sentence_transformers.util`.
        gather_across_devices: whether the ranks share batches, draws and one cache, which is spread over them.
            Otherwise each has its own.
        directions: as in `MultipleNegativesRankingLoss`; the cache is in "query_to_doc".
        partition_mode: "joint" or "per_direction", as there.
        hardness_mode: as there; "in_batch_negatives" and "all_negatives" weight the cached documents, too.
        hardness_strength: as there.
        negatives: the negatives in addition to the cache: "batch", all documents of the batch; "own", the query's hard
            negatives.
        false_negatives: a filter of documents that may be positives.
        log_weights: a function from the documents' ids [N] to numbers [N] that are added to their scores, such as minus
            the logarithm of their frequency.
        cacheable: a function from the documents' ids [N] to bool [N], False for documents not to be cached.
        learnable_scale: whether the scale is trained; its gradient is averaged over the ranks.
        mini_batch_size: documents that are embedded at a time, with activations computed again in the backward pass;
            None: all at once.
        max_length: number of tokens that a slot of the cache can hold; longer texts are cut, as the tokenizer would
            have cut them. The model's `max_seq_length` by default, up to 1024.
        document_ids: "tokens": documents with equal features are one. "labels": the label column has the ids, an
            integer for each positive, or [B, n] for all n documents of each row.
        embedding_dtype: dtype of the cached embeddings.
        seed: seed of the draws.
        options: options of `negcache_fn.step`, except for `in_batch`, `reduction` and `placement`, which the loss sets.

    Raises:
        ValueError, TypeError: an invalid argument, or attribute, which the message names.

    Reference: Lindgren et al., NeurIPS 2021.
    """

    # Read by MatryoshkaLoss: it then leaves `model.forward` alone, as drawn documents differ between its dimensions,
    # and passes its dimensions by decorating `calculate_loss`.
    uses_gradient_cache = True

    metrics: dict[str, Tensor]
    """0-d tensors of the last training step, see `negcache_fn.step`; also `batch_loss` and `cache_loss`.

    These two are parts of the loss. The metrics of the step are of the softmax over documents alone; in them the
    hardness weights all negatives with "in_batch_negatives" and "all_negatives", and none with "hard_negatives".
    """

    model: nn.Module  # the trainer replaces it by its wrapper

    def __init__(
        self,
        model: SentenceTransformer,
        cache_size: int = 16384,
        scale: float = 20.0,
        similarity_fct: Callable[..., Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        negatives: str = "batch",
        false_negatives: FalseNegativeFilter | None = None,
        log_weights: OfDocuments | None = None,
        cacheable: OfDocuments | None = None,
        learnable_scale: bool = False,
        mini_batch_size: int | None = None,
        max_length: int | None = None,
        document_ids: str = "tokens",
        embedding_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        options: StepOptions = StepOptions(),
    ) -> None:
        given = {name: value for name, value in locals().items() if name in SETTINGS}
        super().__init__(model, Settings(**given), scale, learnable_scale=learnable_scale)
        self.metrics = {}
        self._number = next_number()
        self._layout: Layout | None = None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks over which the cache is spread."""
        return all_ranks() if self._settings.gather_across_devices else None

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss, []. Where gradients are off, it is that of the batch alone, and nothing is written."""
        self._forget_other_models()
        anchors, *columns = own_features(list(sentence_features))
        if not columns:
            raise ValueError("sentence_features has 1 column; expected at least 2, an anchor and its positive")
        counts = [row_count(column) for column in (anchors, *columns)]
        if len(set(counts)) > 1:
            raise ValueError(f"the columns have {counts} rows; expected as many in each")
        refuse_layers(sentence_transformer(self.model))
        if torch.is_grad_enabled():
            return self._trained(anchors, columns, labels)
        return self._evaluated(anchors, columns, labels)

    def calculate_loss(self) -> Tensor:
        """The function that MatryoshkaLoss decorates with its dimensions."""
        raise NotImplementedError("calculate_loss is not called; expected a call of the loss itself")

    def prefill(
        self,
        documents: Sequence[Any],
        *,
        batch_size: int = 64,
        ids: Tensor | None = None,
        prompt: str | None = None,
        task: str | None = None,
    ) -> None:
        """Puts documents into the cache before or during training, embedded in evaluation mode.

        Args:
            documents: inputs of the model's `preprocess`, such as texts. With `gather_across_devices` each rank passes
                its own, as many as the others.
            batch_size: documents at a time.
            ids: [len(documents)] int64, as the labels will give them, with `document_ids="labels"`.
            prompt: of the documents in training.
            task: of the documents in training, for a model with a `Router`.

        Raises:
            ValueError, TypeError: documents unlike those in the cache; ids that are missing, or too few.
        """
        labelled = self._settings.document_ids == "labels"
        if labelled != (ids is not None) or (ids is not None and ids.shape != (len(documents),)):
            found = "None" if ids is None else f"of shape {tuple(ids.shape)}"
            expected = f"[{len(documents)}]" if labelled else "None"
            raise ValueError(f"ids is {found} with document_ids={self._settings.document_ids!r}; expected {expected}")
        model = sentence_transformer(self.model)
        training, reader = model.training, Reader(model, self._settings)
        model.eval()
        try:
            with torch.no_grad():  # cached embeddings are constants
                for number, column in enumerate(reader.batches(documents, batch_size, prompt, task)):
                    labels = None if ids is None else ids[number * batch_size :][:batch_size].to(model.device)
                    read = reader.documents([column], labels, self._layout, self.state, self.group)
                    embedded = reader.embedded_rows(read.layout, read.rows)
                    self._make_room(read, embedded.shape[1])
                    facts = facts_of(self._settings, read.ids, 1.0, None, None)
                    if self._normal:
                        embedded = normalize(embedded, dim=-1)
                    fill_cache(cast(TensorDictBase, self.state), read.rows, embedded, facts, self._settings, self.group)
        finally:
            model.train(training)

    def reset(self) -> None:
        """Empties the cache."""
        if self.state is not None:
            self.state = reset(self.state)

    def resize(self, cache_size: int) -> None:
        """Gives the cache another size; the freshest documents stay. Not with `gather_across_devices`."""
        check_size("cache_size", cache_size)
        if self.group is not None:
            raise ValueError(
                "the cache is spread over ranks, so that it cannot be resized; expected a loss of one rank"
            )
        if self.state is not None:
            self.state = resize(self.state, cache_size)
        self._settings = replace(self._settings, cache_size=cache_size)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        settings = self._settings
        return {
            "scale": float(torch.as_tensor(self.scale).detach()),
            "similarity_fct": settings.similarity_fct.__name__,
            **{name: getattr(settings, name) for name in _ON_THE_CARD},
            **asdict(settings.options),
        }

    @property
    def citation(self) -> str:
        """BibTeX, for the model card."""
        return """
@inproceedings{lindgren2021negativecache,
    title={Efficient Training of Retrieval Models using Negative Cache},
    author={Erik Lindgren and Sashank Reddi and Ruiqi Guo and Sanjiv Kumar},
    booktitle={Advances in Neural Information Processing Systems},
    volume={34},
    year={2021}
}
"""

    def _forget_other_models(self) -> None:
        """Starts with an empty cache and the first scale, if the model is another one, as with `model_init`."""
        if sentence_transformer(self.model) is not self.made_by:
            self.begin_anew()
            self._layout = None

    def _trained(self, anchors: Column, columns: Sequence[Column], labels: Tensor | None) -> Tensor:
        check_same_loss(self._number, self.scaling, sharing=self.group, everyone=all_ranks())
        reader, group = Reader(self.model, self._settings), self.group
        read = reader.documents(columns, labels, self._layout, self.state, group)
        queries = reader.embedded(anchors)
        self._make_room(read, queries.shape[1])
        state = cast(TensorDictBase, self.state)
        documents = reader.embedded_rows(read.layout, read.rows)
        guides = None if reader.guide is None else (reader.guided([anchors]), read.rows[GUIDE])
        batch = self._batch(queries, documents, read.ids, guides, state)
        embed = partial(reader.embedded_rows, read.layout)
        total, self.metrics = train_step(state, batch, read.rows, embed, self._settings, group)
        return total

    def _evaluated(self, anchors: Column, columns: Sequence[Column], labels: Tensor | None) -> Tensor:
        reader = Reader(self.model, self._settings)
        queries, documents = reader.embedded(anchors), torch.cat([reader.embedded(column) for column in columns])
        guides = None if reader.guide is None else (reader.guided([anchors]), reader.guided(columns))
        batch = self._batch(queries, documents, reader.ids(columns, labels), guides, None)
        return in_batch_loss(batch, self._settings, self.group)

    def _batch(
        self,
        queries: Tensor,
        documents: Tensor,
        ids: Tensor | None,
        guides: tuple[Tensor, Tensor] | None,
        state: TensorDictBase | None,
    ) -> Embedded:
        scale = self.scaling(all_ranks())
        facts = facts_of(self._settings, ids, scale, guides, state)
        sizes = Sizes.of(self.calculate_loss, queries.shape[1])
        return Embedded(queries, documents, facts, sizes, self._normal, scale)

    @property
    def _normal(self) -> bool:
        return is_decorated(self.calculate_loss) or self._settings.similarity_fct is cos_sim

    def _make_room(self, read: Documents, dimensions: int) -> None:
        """A cache that has room for these documents."""
        if self.state is None:
            self.state = empty_cache(self._settings, dimensions, read.rows, self.group)
        elif (wider := widened(self.state, read.layout, read.rows, self.group)) is not self.state:
            self.state = wider
        self._layout = read.layout
