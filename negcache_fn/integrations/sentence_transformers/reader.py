"""How a loss reads the columns of a batch: as rows for the cache, ids, embeddings of the model and of a guide."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from tensordict import TensorDictBase
from torch import Tensor, nn

from negcache_fn._checks import check_size
from negcache_fn.integrations.sentence_transformers.embedding import Embedder
from negcache_fn.integrations.sentence_transformers.facts import guided_columns, label_ids
from negcache_fn.integrations.sentence_transformers.filters import GUIDE
from negcache_fn.integrations.sentence_transformers.ids import content_ids
from negcache_fn.integrations.sentence_transformers.layout import Layout, Rows
from negcache_fn.integrations.sentence_transformers.model import excludes_prompts, sentence_transformer, tokenizing
from negcache_fn.integrations.sentence_transformers.pieces import row_count
from negcache_fn.integrations.sentence_transformers.settings import Settings
from negcache_fn.integrations.sentence_transformers.slots import widest_of_ranks, widths

__all__ = ["Column", "Documents", "Reader"]

_MOST_TOKENS = 1024  # of a slot by default

Column = Mapping[str, Any]


class Documents(NamedTuple):
    """The documents of a batch."""

    layout: Layout
    rows: Rows  # as the cache keeps them
    ids: Tensor  # [N]


class Reader(NamedTuple):
    """Reads columns with a model, wrapped or not, and the settings of the loss."""

    model: nn.Module
    settings: Settings

    def documents(
        self,
        columns: Sequence[Column],
        labels: Tensor | None,
        layout: Layout | None,
        state: TensorDictBase | None,
        group: dist.ProcessGroup | None,
    ) -> Documents:
        """The documents of some columns. A feature that a cache cannot keep is an error, before anything is written.

        Args:
            columns: one after the other.
            labels: of the batch, if they are ids.
            layout: of the documents before; None: these are the first.
            state: the cache, if there is one.
            group: of the ranks that share it.
        """
        settings = self.settings
        if layout is None:
            layout = self.layout(columns[0]).with_room(settings.max_length, _MOST_TOKENS)
        prompts = excludes_prompts(sentence_transformer(self.model))
        for column in columns:
            layout.check_constants(column, prompts=prompts)
        rows = layout.rows(columns, None if state is None else widths(layout, state["items", "features"]))
        ids = content_ids(layout, rows)
        if group is None and ids.shape[0] > settings.cache_size:
            raise ValueError(f"a batch has {ids.shape[0]} documents; expected at most cache_size={settings.cache_size}")
        if group is not None and state is None and (found := widths(layout, rows)):
            widest = widest_of_ranks(found, group, ids.device)
            least = int(min(layout.tokenizing.longest, _MOST_TOKENS))  # these slots cannot be widened
            tokens = {key for key in widest if layout.leaves[key].kind == "tokens"}
            rows = layout.rows(columns, {key: max(w, least if key in tokens else 0) for key, w in widest.items()})
        if settings.document_ids == "labels":
            ids = label_ids(labels, ids.shape[0], len(columns))
        if self.guide is not None:
            rows[GUIDE] = self.guided(columns)
        return Documents(layout, rows, ids)

    def ids(self, columns: Sequence[Column], labels: Tensor | None) -> Tensor | None:
        """[N] the ids of documents that need not fit into a cache; None if there are none."""
        if self.settings.document_ids == "tokens":
            layouts = [(self.layout(column), column) for column in columns]
            return torch.cat([content_ids(layout, layout.rows([column])) for layout, column in layouts])
        if labels is None:
            return None
        return label_ids(labels, len(columns) * row_count(columns[0]), len(columns))

    def batches(self, documents: Sequence[Any], size: int, prompt: str | None, task: str | None) -> Iterator[Column]:
        """Documents as the trainer's collator would return them, some at a time."""
        check_size("batch_size", size)
        model = sentence_transformer(self.model)
        for start in range(0, len(documents), size):
            column = dict(model.preprocess(list(documents[start : start + size]), prompt=prompt, task=task))
            if task is not None:
                column["task"] = task
            yield batch_to_device(column, model.device)

    def layout(self, column: Column) -> Layout:
        """Of the features of a column."""
        model = sentence_transformer(self.model)
        return Layout.of(column, tokenizing(model, column.get("task"), column.get("modality")))

    def embedded(self, column: Column) -> Tensor:
        """[rows, D] a column as it comes, in mini-batches if it is larger than one."""
        size = self.settings.mini_batch_size
        layout = None if size is None or row_count(column) <= size else self.layout(column)
        return Embedder(self.model, size).column(column, layout)

    def embedded_rows(self, layout: Layout, rows: Rows) -> Tensor:
        """[N, D] rows of a cache."""
        return Embedder(self.model, self.settings.mini_batch_size).rows(layout, rows)

    def guided(self, columns: Sequence[Column]) -> Tensor:
        """[N, G] by the guide."""
        return guided_columns(cast(SentenceTransformer, self.guide), sentence_transformer(self.model), columns)

    @property
    def guide(self) -> SentenceTransformer | None:
        """Of the filter of false negatives."""
        return None if self.settings.false_negatives is None else self.settings.false_negatives.guide
