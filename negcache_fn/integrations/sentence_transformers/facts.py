"""Facts about the documents of a batch: ids, log-weights, whether to cache them, and false negatives."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES
from negcache_fn.integrations.sentence_transformers.filters import guided, guided_negatives
from negcache_fn.integrations.sentence_transformers.pieces import is_flat
from negcache_fn.integrations.sentence_transformers.settings import OfDocuments, Settings
from negcache_fn.integrations.sentence_transformers.terms import BatchFacts

__all__ = ["facts_of", "guided_columns", "label_ids"]


def label_ids(labels: Tensor | None, documents: int, columns: int) -> Tensor:
    """[N] the ids in the label column; -1 for documents that it has none for."""
    batch = documents // columns
    shape = None if labels is None else tuple(labels.shape)
    if labels is None or labels.is_floating_point() or shape not in ((batch,), (batch, columns)):
        found = "None" if labels is None else f"{shape} {labels.dtype}"
        raise ValueError(
            f"labels are {found}; expected integers [{batch}] or [{batch}, {columns}], the ids of the documents, as "
            f'document_ids="labels"'
        )
    given = labels.long()
    if given.ndim == 2:
        return given.t().flatten()
    return torch.cat([given, given.new_full((documents - batch,), -1)])


def facts_of(
    settings: Settings,
    ids: Tensor | None,
    scale: float | Tensor,
    guides: tuple[Tensor, Tensor] | None,
    state: TensorDictBase | None,
) -> BatchFacts:
    """Of documents with these ids [N]; `guides`: the guide's embeddings of the queries and of the documents."""
    chosen, false_negatives = settings.false_negatives, NO_FALSE_NEGATIVES
    if chosen is not None and chosen.guide is None:
        false_negatives = chosen.by_score(scale)
    elif chosen is not None and guides is not None:
        if ids is None or bool((ids == -1).any()):
            raise ValueError(
                "a document of the batch has no id; expected one for each, as labels [B, n] or by "
                'document_ids="tokens", as the documents that a guide excludes are named by id'
            )
        false_negatives = guided_negatives(chosen, *guides, ids, state)
    with torch.no_grad():  # facts are constants
        weights, cacheable = (
            None if function is None or ids is None else _of_documents(name, function, ids)
            for name, function in (("log_weights", settings.log_weights), ("cacheable", settings.cacheable))
        )
    return BatchFacts(ids, weights, cacheable, false_negatives, None if chosen is None else guides)


def guided_columns(
    guide: SentenceTransformer, model: SentenceTransformer, columns: Sequence[Mapping[str, Any]]
) -> Tensor:
    """[N, G] the guide's embeddings of the documents of some columns."""
    tokenizer, other = model.tokenizer, guide.tokenizer
    same = _vocabulary(tokenizer) == _vocabulary(other) and not _shorter(guide, model)
    if not same and any("input_ids" not in column or is_flat(column) for column in columns):
        raise ValueError(
            "the guide has another tokenizer than the model; expected documents in rows of input_ids then, from which "
            "the texts can be read for the guide"
        )
    return torch.cat([guided(guide, column, None if same else tokenizer) for column in columns])


def _vocabulary(tokenizer: Any) -> Any:
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None


def _shorter(guide: SentenceTransformer, model: SentenceTransformer) -> bool:
    lengths: tuple[Any, Any] = guide.max_seq_length, model.max_seq_length
    return None not in lengths and bool(lengths[0] < lengths[1])


def _of_documents(name: str, function: OfDocuments, ids: Tensor) -> Tensor:
    given: Any = function(ids)  # any result of a user's function
    if not isinstance(given, Tensor) or given.shape != ids.shape:
        found = tuple(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise ValueError(f"{name} gave {found} for the ids [{ids.shape[0]}] of documents; expected [{ids.shape[0]}]")
    return given.to(ids.device)
