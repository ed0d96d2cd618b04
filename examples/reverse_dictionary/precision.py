"""What precision a pass needs: ``python -m examples.reverse_dictionary.precision``, against float64.

A CPU with AMX multiplies tiles of bfloat16 numbers, so a float32 number becomes a sum of such parts. Three parts of
each side have the precision of float32 and take six products; two err by about 2^-17 and take three. Here the products
are made in float32 of the same parts, on any machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from examples.benchmarks.report import fill_page
from examples.command_line import CommandParser, positive, run
from examples.reverse_dictionary.corpus import Corpus
from examples.reverse_dictionary.encoder import Encoder
from examples.reverse_dictionary.inverted_lists import embedded

__all__ = ["errors", "main", "product"]

_KINDS = {"float32": None, "3 parts, 6 products": 3, "2 parts, 3 products": 2, "1 part, 1 product": 1}
_SCALES = (20.0, 50.0, 100.0)


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
    for kind, parts in _KINDS.items():
        for scale in _SCALES:
            found = errors(scale * queries, documents, parts)
            lines.append(f"| {' | '.join((kind, f'{scale:g}', *(f'{value:.0e}' for value in found)))} |")
    print("\n".join(lines))
    if options.page is not None:
        fill_page(options.page, {"precision": "\n".join(lines)})


def errors(queries: Tensor, documents: Tensor, parts: int | None) -> tuple[float, float, float]:
    """Largest over the queries: of the log-normalizer, in total variation of the softmax, of the mean document.

    The last is relative to the largest of a document's length, 1.
    """
    exact = queries.double() @ documents.double().T
    found = product(queries, documents, parts).double()
    softmax, approximate = exact.softmax(1), found.softmax(1)
    change = approximate - softmax
    return (
        float((found.logsumexp(1) - exact.logsumexp(1)).abs().max()),
        float(change.abs().sum(1).max() / 2),
        float((change @ documents.double()).norm(dim=1).max()),
    )


def product(queries: Tensor, documents: Tensor, parts: int | None) -> Tensor:
    """`queries @ documents.T` in float32, from so many bfloat16 parts of each side, or from none."""
    if parts is None:
        return queries @ documents.T
    left, right = _parts(queries, parts), _parts(documents, parts)
    pairs = [(i, j) for i in range(parts) for j in range(parts) if i + j < parts]
    return sum((left[i] @ right[j].T for i, j in reversed(pairs)), torch.zeros(len(queries), len(documents)))


def _parts(values: Tensor, count: int) -> list[Tensor]:
    """Each the rounded rest of those before it."""
    found: list[Tensor] = []
    for _ in range(count):
        found.append(values.to(torch.bfloat16).float())
        values = values - found[-1]
    return found


if __name__ == "__main__":
    sys.exit(main())
