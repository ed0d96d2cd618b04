"""What is learnt: queries and the documents that answer them, as bags of words, in three splits.

Code search takes the standard library and the packages of one lock file, not what else is installed beside them, so
that two machines with the same lock and Python have the same corpus. A BEIR folder takes its own splits.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfTransformer
from torch import Tensor

from examples.code_search.baselines import matrix
from examples.code_search.corpus import SPLITS, Bags, load_or_harvest
from examples.code_search.features import DOCUMENT_WIDTH, QUERY_WIDTH, inverse_document_frequency, padded, rows_of
from examples.code_search.tokens import token_ids
from examples.msmarco.formats import Collection, read_judgements, read_texts

__all__ = ["Batch", "Pairs", "Source", "Task", "load_task"]

LOCK = Path("requirements/train.txt")
MINED = 20
"""How many of the documents most like a query by tf-idf its mined negatives are taken from."""

_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Source:
    """Where a task comes from, as the configuration says it."""

    name: str
    data: str
    """ "code", or a folder: in BEIR's format, or else of Python files."""
    train_documents: int | None = None
    """Of code: so many of the described functions of training modules, and no function without description; None: all
    functions."""


@dataclass(frozen=True)
class Pairs:
    """The n queries of a split, and what answers each."""

    queries: NDArray[np.int64]
    """[n] rows of the task's queries."""
    positives: NDArray[np.int64]
    """[n, P] rows of the task's documents, -1 where there are fewer."""


@dataclass(frozen=True)
class Batch:
    """B queries, and N >= B documents of which row i < B answers query i."""

    queries: dict[str, Tensor]
    documents: dict[str, Tensor]
    ids: Tensor
    """[N] int64, rows of the task's documents."""
    positives: Tensor
    """[B, P] int64: all documents that answer each query, -1 where there are fewer."""


@dataclass(frozen=True)
class Task:
    """All documents are searched; those of training, and no others, are seen by it."""

    key: str
    """Of its content."""
    document_bags: Bags
    query_bags: Bags
    documents: dict[str, Tensor]
    queries: dict[str, Tensor]
    train_documents: NDArray[np.int64]
    splits: dict[str, Pairs]

    def batch(self, seed: int, step: int, size: int, *, random: int = 0, mined: int = 0, others: int = 0) -> Batch:
        """Training queries and a document that answers each; then random training documents, and mined for each query.

        A function of its arguments: methods with the same batch size see the same queries in the same order. The
        number ``others`` changes the documents that come besides, and nothing else.
        """
        generator = np.random.default_rng((seed, step))
        train = self.splits["train"]
        rows = generator.choice(len(train.queries), size, replace=False)
        positives = train.positives[rows]
        parts = [positives[np.arange(size), generator.integers((positives >= 0).sum(1))]]
        generator = np.random.default_rng((seed, step, others))
        if random:
            parts.append(generator.choice(self.train_documents, random, replace=False))
        if mined:
            parts += [generator.choice(self.mined[row], mined, replace=False) for row in rows]
        documents = np.concatenate(parts)
        return Batch(
            queries=rows_of(self.queries, train.queries[rows]),
            documents=rows_of(self.documents, documents),
            ids=torch.from_numpy(documents),
            positives=torch.from_numpy(positives),
        )

    @cached_property
    def mined(self) -> NDArray[np.int64]:
        """[train queries, MINED]: the training documents most like each query by tf-idf that do not answer it."""
        transformer = TfidfTransformer(sublinear_tf=True)
        documents = transformer.fit_transform(matrix(self.document_bags)[self.train_documents]).T.tocsr()
        queries = transformer.transform(matrix(self.query_bags))
        train = self.splits["train"]
        found = np.empty((len(train.queries), MINED), np.int64)
        for start in range(0, len(train.queries), _QUERIES_AT_ONCE):
            part = slice(start, start + _QUERIES_AT_ONCE)
            scores = (queries[train.queries[part]] @ documents).toarray()
            answers = (train.positives[part, :, None] == self.train_documents).any(1)
            scores[answers] = -1
            found[part] = self.train_documents[np.argsort(-scores, axis=1, kind="stable")[:, :MINED]]
        return found


def load_task(source: Source, store: Path) -> Task:
    """The task of a source; what takes long to read is kept in ``store``.

    Raises:
        ValueError, FileNotFoundError: a split without pairs; a file of BEIR's that is missing or not in its format.
    """
    if source.data == "code":
        return _code_task(source, _locked_roots(), store)
    folder = Path(source.data)
    return _beir_task(folder) if (folder / "corpus.jsonl").is_file() else _code_task(source, [folder], store)


def _code_task(source: Source, roots: list[Path], store: Path) -> Task:
    corpus = load_or_harvest(roots, store / "code.npz")
    rows = {split: corpus.queries_of(split) for split in SPLITS}
    if source.train_documents is None:
        documents = np.arange(len(corpus.documents))
    else:
        generator = np.random.default_rng(0)
        count = min(source.train_documents, len(rows["train"]))
        rows["train"] = np.sort(generator.choice(rows["train"], count, replace=False))
        documents = np.concatenate([corpus.query_document[rows[split]] for split in SPLITS])
    place = np.full(len(corpus.documents), -1)
    place[documents] = np.arange(len(documents))
    splits = {split: Pairs(rows[split], place[corpus.query_document[rows[split]], None]) for split in SPLITS}
    in_training = np.flatnonzero(corpus.document_split[documents] == SPLITS.index("train"))
    return _task(_picked(corpus.documents, documents), corpus.queries, in_training, splits)


def _locked_roots() -> list[Path]:
    """The standard library, then the packages that the lock file names."""
    packages: set[Path] = set()
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        if locked := re.match(r"([\w.-]+)==", line):
            distribution = metadata.distribution(locked[1])
            files = distribution.files or []
            names = {file.parts[0] for file in files if file.suffix == ".py" and len(file.parts) > 1} - {".."}
            packages |= {Path(str(distribution.locate_file(name))) for name in names}
    return [Path(sysconfig.get_paths()["stdlib"]), *sorted(root for root in packages if root.is_dir())]


def _beir_task(folder: Path) -> Task:
    """Validation is BEIR's "dev", or else a tenth of the training queries."""
    collection = Collection.open(folder)
    documents = dict(read_texts(collection.passages))
    queries = dict(read_texts(collection.queries("train")))
    splits = {name: _pairs(collection, name, list(queries), list(documents)) for name in ("train", "test")}
    if (folder / "qrels/dev.tsv").is_file():
        splits["validation"] = _pairs(collection, "dev", list(queries), list(documents))
    else:
        held_out = np.arange(len(splits["train"].queries)) % 10 == 0
        train = splits["train"]
        splits["train"] = Pairs(train.queries[~held_out], train.positives[~held_out])
        splits["validation"] = Pairs(train.queries[held_out], train.positives[held_out])
    bags_of = {
        name: Bags.of(Counter(token_ids(text)) for text in texts.values())
        for name, texts in (("documents", documents), ("queries", queries))
    }
    return _task(bags_of["documents"], bags_of["queries"], np.arange(len(documents)), splits)


def _pairs(collection: Collection, split: str, queries: list[str], documents: list[str]) -> Pairs:
    query_rows = {name: row for row, name in enumerate(queries)}
    document_rows = {name: row for row, name in enumerate(documents)}
    answers: dict[int, list[int]] = {}
    file = collection.judgements(split)
    for judgement in read_judgements(file):
        if judgement.grade < 1:
            continue
        if judgement.query not in query_rows or judgement.passage not in document_rows:
            raise ValueError(f"{file}:{judgement.line}: there is no such query or passage")
        answers.setdefault(query_rows[judgement.query], []).append(document_rows[judgement.passage])
    if not answers:
        raise ValueError(f"{file} judges nothing relevant; expected pairs of a query and a passage")
    positives = np.full((len(answers), max(map(len, answers.values()))), -1)
    for row, found in enumerate(answers.values()):
        positives[row, : len(found)] = found
    return Pairs(np.array(list(answers)), positives)


def _task(documents: Bags, queries: Bags, train_documents: NDArray[np.int64], splits: dict[str, Pairs]) -> Task:
    for name, pairs in splits.items():
        if not len(pairs.queries):
            raise ValueError(f"the {name} split has no queries; expected some in each")
    idf = inverse_document_frequency(documents, train_documents)
    content = (documents.starts, documents.tokens, documents.counts, queries.tokens, queries.counts, train_documents)
    parts = [
        *content,
        *(values for name in sorted(splits) for values in (splits[name].queries, splits[name].positives)),
    ]
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes())
    return Task(
        key=digest.hexdigest(),
        document_bags=documents,
        query_bags=queries,
        documents=padded(documents, idf, DOCUMENT_WIDTH),
        queries=padded(queries, idf, QUERY_WIDTH),
        train_documents=train_documents,
        splits=splits,
    )


def _picked(bags: Bags, rows: NDArray[np.int64]) -> Bags:
    lengths = np.diff(bags.starts)[rows]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    taken = np.repeat(bags.starts[rows], lengths) + within
    return Bags(starts, bags.tokens[taken], bags.counts[taken])
