"""From the cache to a data set: mined documents, chosen by rank, score, id and text, as rows that trainers read.

Arguments with the meaning of `mine_hard_negatives` in sentence-transformers have its names. Its `range_max` is the `n`
of `top_negatives`; its `max_score`, `absolute_margin` and `relative_margin` are the `max_score` of `FalseNegatives`,
which excludes documents before they take one of the `n` places.

Ids are the keys: `positives` [B, P] is the argument of `FalseNegatives(ids=...)`, and `texts[id]` is a document's text.
Rows with fewer entries are padded with -1.
"""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from negcache_fn._checks import check_choice, check_scale, check_size

__all__ = ["OUTPUT_FORMATS", "Texts", "hard_negatives", "training_rows"]

OUTPUT_FORMATS = ("triplet", "n-tuple", "passages")


class Texts(Protocol):
    """The text of a document by its id: a list, a dict, a column of a `datasets.Dataset`."""

    def __getitem__(self, key: int, /) -> str:
        """The text of document `key`."""
        ...


def hard_negatives(
    scores: Tensor,
    ids: Tensor,
    *,
    positives: Tensor | None = None,
    texts: Texts | None = None,
    num_negatives: int = 3,
    range_min: int = 0,
    min_score: float | None = None,
) -> Tensor:
    """The ids of each query's hard negatives: the best mined documents after filtering, without the first `range_min`.

    Filtered out: empty places (score -inf), anonymous documents (id -1), scores below `min_score`, positives by id or
    text, and all but the best document of one id or one text. A loop on the host: not for a training step.

    Args:
        scores: [B, n] floating, in any order: from `top_negatives`, from several calls of it, or from a cross-encoder.
        ids: [B, n] int64 ids of these documents: `state["items", "id"][slots]`.
        positives: [B, P] int64 ids of each query's positives, -1 where there are fewer.
        texts: the documents' texts by id, to compare them; None: by id alone.
        num_negatives: how many to keep.
        range_min: how many of the best remaining documents to skip: they are the likeliest unlabelled positives.
        min_score: documents with a lower score are too easy.

    Returns:
        [B, num_negatives] int64 ids in descending order of score, ties in the order given; -1 where there are fewer.

    Raises:
        ValueError, TypeError: invalid shapes, dtypes or numbers; an id that `texts` does not have.

    Examples:
        >>> state = init_cache(8, 4, torch.zeros(1, 3))
        >>> state = update(state, torch.ones(4, 3), torch.eye(4), ids=torch.tensor([10, 11, 12, 13]))
        >>> scores, slots = top_negatives(state, torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 8)
        >>> ids = state["items", "id"][slots]
        >>> hard_negatives(scores, ids, positives=torch.tensor([[10]]), range_min=1)
        tensor([[12, 13, -1]])

    Reference: `mine_hard_negatives` of sentence-transformers, whose ranks also count the remaining documents.
    """
    _check_mined(scores, ids)
    if texts is not None:
        _check_texts(texts)
    check_size("num_negatives", num_negatives)
    check_size("range_min", range_min, least=0)
    if min_score is not None:
        check_scale(min_score, scores.device, name="min_score")
    if positives is not None:
        _check_padded_ids("positives", positives, ids.shape[0])
    least = float("-inf") if min_score is None else float(min_score)
    known = [list[int]()] * ids.shape[0] if positives is None else _present(positives)
    values = cast("list[list[float]]", scores.tolist())
    chosen: list[list[int]] = []
    for row_scores, row_ids, row_known in zip(values, _lists(ids), known, strict=True):
        found = zip(row_scores, row_ids, strict=True)
        there = [pair for pair in found if pair[0] > float("-inf") and pair[0] >= least and pair[1] != -1]
        ranked = [document for _, document in sorted(there, key=_descending)]
        kept = _distinct(ranked, row_known, texts)[range_min : range_min + num_negatives]
        chosen.append(kept + [-1] * (num_negatives - len(kept)))
    return torch.tensor(chosen, dtype=torch.int64, device=ids.device).view(ids.shape[0], num_negatives)


def training_rows(
    queries: Sequence[str], positives: Tensor, negatives: Tensor, texts: Texts, *, output_format: str = "triplet"
) -> list[dict[str, Any]]:
    """Rows of a training set, for `datasets.Dataset.from_list(rows)` or one JSON object per line.

    | `output_format` | a row                                                 | there is one for                    |
    | --------------- | ----------------------------------------------------- | ----------------------------------- |
    | "triplet"       | `anchor`, `positive`, `negative`                      | each positive and negative          |
    | "n-tuple"       | `anchor`, `positive`, `negative_1`, ..., `negative_M` | each positive, if M negatives exist |
    | "passages"      | `query`, `positive_passages`, `negative_passages`     | each query                          |

    The first two are sentence-transformers'; the third is Tevatron's, with `{"docid", "text"}` for each document.

    Args:
        queries: B texts.
        positives: [B, P] int64 ids, -1 where there are fewer.
        negatives: [B, M] int64 ids, -1 where there are fewer, as `hard_negatives` gives them.
        texts: the documents' texts by id.
        output_format: "triplet", "n-tuple" or "passages".

    Returns:
        The rows, in the order of the queries. A query without a positive or without a negative has no row.

    Raises:
        ValueError, TypeError: invalid shapes or dtypes, an unknown `output_format`, an id that `texts` does not have.

    Examples:
        >>> texts = {3: "a cat", 5: "a dog", 8: "a car"}
        >>> positives, negatives = torch.tensor([[3]]), torch.tensor([[5, 8]])
        >>> training_rows(["what purrs?"], positives, negatives, texts, output_format="n-tuple")
        [{'anchor': 'what purrs?', 'positive': 'a cat', 'negative_1': 'a dog', 'negative_2': 'a car'}]
        >>> training_rows(["what purrs?"], positives, negatives, texts)[1]
        {'anchor': 'what purrs?', 'positive': 'a cat', 'negative': 'a car'}

    Reference: docs/datasets.md of Tevatron, "Relevance-judged dataset".
    """
    check_choice("output_format", output_format, OUTPUT_FORMATS)
    if not isinstance(queries, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not check types
        raise TypeError(f"queries is a {type(queries).__name__}; expected a list of texts")
    _check_texts(texts)
    _check_padded_ids("positives", positives, len(queries))
    _check_padded_ids("negatives", negatives, len(queries))
    rows: list[dict[str, Any]] = []
    for query, right, wrong in zip(queries, _present(positives), _present(negatives), strict=True):
        if not right or not wrong:
            continue
        if output_format == "passages":
            passages = {"positive_passages": _passages(right, texts), "negative_passages": _passages(wrong, texts)}
            rows.append({"query": query} | passages)
            continue
        pairs = [{"anchor": query, "positive": _text(document, texts)} for document in right]
        against = [_text(document, texts) for document in wrong]
        if output_format == "triplet":
            rows += [pair | {"negative": text} for pair in pairs for text in against]
        elif len(against) == negatives.shape[1]:
            rows += [pair | {f"negative_{n}": text for n, text in enumerate(against, 1)} for pair in pairs]
    return rows


def _descending(candidate: tuple[float, int]) -> float:
    return -candidate[0]


def _distinct(ranked: list[int], known: list[int], texts: Texts | None) -> list[int]:
    """The first document of each id and, with texts, of each text, without the known ones."""
    seen = set(known)
    seen_texts: set[str] = set() if texts is None else {_text(document, texts) for document in known}
    kept: list[int] = []
    for document in ranked:
        if document in seen:
            continue
        seen.add(document)
        if texts is not None:
            text = _text(document, texts)
            if text in seen_texts:
                continue
            seen_texts.add(text)
        kept.append(document)
    return kept


def _passages(documents: list[int], texts: Texts) -> list[dict[str, str]]:
    return [{"docid": str(document), "text": _text(document, texts)} for document in documents]


def _text(document: int, texts: Texts) -> str:
    try:
        return texts[document]
    except (KeyError, IndexError) as error:
        raise ValueError(f"texts has no document {document}; expected the text of every id") from error


def _lists(ids: Tensor) -> list[list[int]]:
    return cast("list[list[int]]", ids.tolist())


def _present(ids: Tensor) -> list[list[int]]:
    """The ids of each row, without the padding."""
    return [[document for document in row if document != -1] for row in _lists(ids)]


def _check_texts(texts: Any) -> None:
    if not hasattr(texts, "__getitem__"):
        raise TypeError(f"texts is a {type(texts).__name__}; expected texts by id, such as a list or a dict")


def _check_mined(scores: Any, ids: Any) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores is a {type(scores).__name__}; expected a tensor")
    if scores.ndim != 2:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; expected [B, n]")
    if not scores.dtype.is_floating_point:
        raise TypeError(f"scores has dtype {scores.dtype}; expected a floating dtype")
    _check_padded_ids("ids", ids, scores.shape[0])
    if ids.shape != scores.shape:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; expected {list(scores.shape)}, as the scores")
    if ids.device != scores.device:
        raise ValueError(f"ids is on {ids.device}; expected {scores.device}, the device of the scores")


def _check_padded_ids(name: str, value: Any, rows: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor")
    if value.ndim != 2 or value.shape[0] != rows:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected two dimensions and {rows} rows")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {value.dtype}; expected torch.int64")
