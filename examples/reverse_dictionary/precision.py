"""What precision a pass needs: ``python -m examples.reverse_dictionary.precision``, against float64.

A CPU with AMX multiplies tiles of bfloat16 numbers, so a float32 number becomes a sum of such parts. Three parts of
each side have the precision of float32 and take six products; two err by about 2^-17 and take three. A CPU with VNNI
multiplies 16-bit integers, and each row has a factor. Here the products are made of the same numbers, on any machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from examples.benchmarks.report import fill_page
from examples.command_line import CommandParser, positive, run
from examples.reverse_dictionary.corpus import Corpus
from examples.reverse_dictionary.encoder import Encoder
from examples.reverse_dictionary.inverted_lists import embedded

__all__ = ["PRODUCTS", "Product", "errors", "main"]

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_SCALES = (20.0, 50.0, 100.0)
# As in `_kernels/cpu/by_vectors.h`.
_MOST_OF_DOCUMENT, _MOST_OF_QUERY, _TOGETHER = 11585, 32767, 64
_MOST_OF_BYTE = 127


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, and fills a page; returns the exit status."""
    parser = CommandParser("reverse_dictionary.precision", description=__doc__)
    data = Path("runs/reverse_dictionary/prepared")
    parser.add_argument("--data", type=Path, default=data, metavar="DIR", help="what `prepare` wrote")
    parser.add_argument("--queries", type=positive, default=256, help="validation queries")
    parser.add_argument("--page", type=Path, metavar="FILE", help="fill this page")
    return run(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    corpus = Corpus.load(options.data, torch.device("cpu"))
    documents = embedded(options.data, corpus)
    with torch.no_grad():
        queries = Encoder.load(options.data)(corpus.queries[corpus.rows_of("validation", at_most=options.queries)])
    lines = [
        f"{len(queries)} queries, {len(documents):,} documents, D={documents.shape[1]}.",
        "",
        "| | scale | log-normalizer, largest error | distribution of a draw, largest | gradient, largest |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, product in PRODUCTS.items():
        for scale in _SCALES:
            found = errors(scale * queries, documents, product)
            lines.append(f"| {' | '.join((kind, f'{scale:g}', *(f'{value:.0e}' for value in found)))} |")
    print("\n".join(lines))
    if options.page is not None:
        fill_page(options.page, {"precision": "\n".join(lines)})


def errors(queries: Tensor, documents: Tensor, product: Product) -> tuple[float, float, float]:
    """Largest over the queries: of the log-normalizer, in total variation of the softmax, of the mean document.

    The last is relative to the largest of a document's length, 1.
    """
    exact = queries.double() @ documents.double().T
    found = product(queries, documents).double()
    softmax, approximate = exact.softmax(1), found.softmax(1)
    change = approximate - softmax
    return (
        float((found.logsumexp(1) - exact.logsumexp(1)).abs().max()),
        float(change.abs().sum(1).max() / 2),
        float((change @ documents.double()).norm(dim=1).max()),
    )


def _in_float32(queries: Tensor, documents: Tensor) -> Tensor:
    return queries @ documents.T


def _of_parts(count: int) -> Product:
    """In float32, of so many bfloat16 parts of each side."""
    pairs = [(i, j) for i in reversed(range(count)) for j in reversed(range(count)) if i + j < count]

    def product(queries: Tensor, documents: Tensor) -> Tensor:
        left, right = _parts(queries, count), _parts(documents, count)
        return sum((left[i] @ right[j].T for i, j in pairs), torch.zeros(len(queries), len(documents)))

    return product


def _parts(values: Tensor, count: int) -> list[Tensor]:
    """Each the rounded rest of those before it."""
    found: list[Tensor] = []
    for _ in range(count):
        found.append(values.to(torch.bfloat16).float())
        values = values - found[-1]
    return found


def _of_bytes(queries: Tensor, documents: Tensor) -> Tensor:
    """Of 8-bit integers."""
    (left, left_factor), (right, right_factor) = (_integers(rows, _MOST_OF_BYTE) for rows in (queries, documents))
    return left @ right.T * left_factor * right_factor.T


def _of_integers(queries: Tensor, documents: Tensor) -> Tensor:
    """Of 16-bit integers, so small that sums over some dimensions fit into 32 bits."""
    largest = queries.abs().amax(1, keepdim=True)
    steps = pad((queries / largest).abs(), (0, -queries.shape[1] % _TOGETHER)).unflatten(1, (-1, _TOGETHER))
    together = steps.sum(2).amax(1, keepdim=True)
    most = ((2**31 - 1) / _MOST_OF_DOCUMENT - _TOGETHER) / together
    left, left_factor = _integers(queries, most.clamp(max=_MOST_OF_QUERY).floor())
    right, right_factor = _integers(documents, _MOST_OF_DOCUMENT)
    return left @ right.T * left_factor * right_factor.T


def _integers(rows: Tensor, most: Tensor | int) -> tuple[Tensor, Tensor]:
    """The integers and the factors of the rows, in float64, which holds their products exactly."""
    factor = rows.double().abs().amax(1, keepdim=True) / most
    return (rows / factor).round(), factor


def _in_bfloat16(product: Product) -> Product:
    """The same of documents stored in bfloat16."""
    return lambda queries, documents: product(queries, documents.to(torch.bfloat16).float())


def _in_int8(queries: Tensor, documents: Tensor) -> Tensor:
    """In full precision, of documents stored in int8. Queries of 16 bits change nothing that the table shows."""
    integers, factor = _integers(documents, _MOST_OF_BYTE)
    return queries.double() @ (integers * factor).T


PRODUCTS: dict[str, Product] = {
    "float32": _in_float32,
    "3 parts, 6 products": _of_parts(3),
    "2 parts, 3 products": _of_parts(2),
    "16-bit integers": _of_integers,
    "1 part, 1 product": _of_parts(1),
    "bfloat16 storage, float32": _in_bfloat16(_in_float32),
    "bfloat16 storage, 16-bit integers": _in_bfloat16(_of_integers),
    "int8 storage": _in_int8,
    "int8 storage, queries of 8 bits": _of_bytes,
}


if __name__ == "__main__":
    sys.exit(main())
