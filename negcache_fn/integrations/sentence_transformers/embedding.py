"""How the loss embeds: columns as they come, and rows of documents, all at once or some at a time."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from negcache_fn._encoders.chunked import chunked
from negcache_fn.integrations.sentence_transformers.layout import Layout, Rows

__all__ = ["Embedder"]


class Embedder(NamedTuple):
    """A model and how many documents it may embed at a time."""

    model: nn.Module
    size: int | None

    def column(self, column: Mapping[str, Any], layout: Layout | None) -> Tensor:
        """[rows, D] from the features of a column, which stay as they are; in mini-batches only with its layout."""
        if layout is None:
            return cast(Tensor, self.model(dict(column))["sentence_embedding"])
        return self.rows(layout, layout.rows([column]))

    def rows(self, layout: Layout, rows: Rows) -> Tensor:
        """[N, D], in mini-batches of documents of similar length."""
        size, count = self.size, next(iter(rows.values())).shape[0]
        if size is None or count <= size:
            return _embedded(self.model, layout, rows)
        lengths = layout.lengths(rows)
        order = torch.arange(count) if lengths is None else lengths.argsort(stable=True)
        rows = {key: values[order] for key, values in rows.items()}
        model, parts = self.model, list[Tensor]()
        if isinstance(model, DistributedDataParallel):
            # Computing again in the backward pass must not go through the wrapper, but it has to be called once, which
            # prepares it for gradients: with the shortest texts.
            parts.append(_embedded(model, layout, {key: values[:size] for key, values in rows.items()}))
            rows = {key: values[size:] for key, values in rows.items()}
            model = cast(nn.Module, model.module)
        parts.append(chunked(partial(_embedded, model, layout), size)(rows))
        return torch.cat(parts)[order.argsort()]


def _embedded(model: nn.Module, layout: Layout, rows: Rows) -> Tensor:
    return cast(Tensor, model(layout.batch(rows))["sentence_embedding"])
