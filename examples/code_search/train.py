"""The main job: one encoder trained with each method, compared on the test modules, drawn, and made searchable."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from examples.code_search import checkpoint
from examples.code_search.baselines import tfidf
from examples.code_search.corpus import SPLITS, load_or_harvest
from examples.code_search.data import Data
from examples.code_search.evaluate import evaluate
from examples.code_search.methods import METHODS
from examples.code_search.plots import draw
from examples.code_search.run import Options, Run
from examples.code_search.search import INDEX_FILE, build_index
from examples.code_search.workers import ALONE, Workers

__all__ = ["train"]


def train(
    roots: list[Path], out: Path, *, steps: int, mask_names: bool, options: Options, workers: Workers = ALONE
) -> None:
    """Harvests the roots, trains with every method, and leaves metrics, picture and search index in ``out``.

    Several workers train the run with the cache, each with its part of the same batches and of the same cache.

    Raises:
        InterruptedRunError: when stopped in training; the next call goes on.
        ValueError: when the roots hold too little to train on.
    """
    started = time.perf_counter()
    if not workers.leads:
        workers.wait()  # for the harvest
    data = Data(load_or_harvest(roots, out / "corpus.npz", mask_names=mask_names))
    if workers.leads:
        workers.wait()
    sizes = _sizes(data, options)
    if workers.group is not None:
        _train_together(data, out, steps, options, workers)
        return
    print(f"{sizes['functions']:,} functions, {sizes['queries']} queries in {time.perf_counter() - started:.0f} s")

    lexical = {split: _lexical(data, split) for split in ("validation", "test")}
    results: dict[str, dict[str, Any]] = {"tf-idf": lexical["test"]}
    histories: dict[str, list[dict[str, float]]] = {}
    for method in METHODS:
        run = Run(method, options, data, out / method.name)
        run.train(steps)
        histories[method.name] = run.history
        results[method.label] = _test(run)
        if method.cached:
            checkpoint.save(build_index(run.model, data), out / INDEX_FILE)

    gap = results["with the cache"]["mrr@10"] - results["in-batch"]["mrr@10"]
    summary = {"steps": steps, "mask_names": mask_names, **options.described(), **sizes, "test": results, "gap": gap}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    pictures = ", ".join(file.name for file in draw(histories, lexical["validation"]["mrr@10"], out))
    print(_table(results))
    print(f"the cache adds {gap:+.3f} MRR@10 to in-batch negatives at the same batch size and steps")
    print(f"{out}: {pictures}, summary.json, {INDEX_FILE}, and for each run metrics.jsonl and checkpoint.pt")


def _train_together(data: Data, out: Path, steps: int, options: Options, workers: Workers) -> None:
    method = next(method for method in METHODS if method.cached)
    run = Run(method, options, data, out / method.name, workers)
    run.train(steps)
    if workers.leads:
        results = {"tf-idf": _lexical(data, "test"), method.label: _test(run)}
        (out / "summary.json").write_text(
            json.dumps({"steps": steps, "workers": workers.count, "test": results}, indent=2)
        )
        print(_table(results))
        print(f"{out}: summary.json, and in {method.name}/ metrics.jsonl and checkpoints, a part from each process")


def _sizes(data: Data, options: Options) -> dict[str, Any]:
    corpus = data.corpus
    queries = {split: len(corpus.queries_of(split)) for split in SPLITS}
    most_random = max(method.random_documents(options.batch_size, options.draws_per_query) for method in METHODS)
    if queries["train"] < options.batch_size or len(data.train_documents) < most_random:
        raise ValueError(
            f"training modules have {len(data.train_documents)} functions and {queries['train']} queries; a step "
            f"takes {most_random} and {options.batch_size}: give more code (--root) or a smaller --batch-size"
        )
    if not queries["validation"] or not queries["test"]:
        raise ValueError(f"there are {queries} queries: give more code (--root), so that every split has some")
    return {"functions": len(corpus.documents), "queries": queries}


def _lexical(data: Data, split: str) -> dict[str, float]:
    corpus = data.corpus
    rows = corpus.queries_of(split)
    return tfidf(corpus.documents, corpus.queries, rows, corpus.query_document[rows, None])


def _test(run: Run) -> dict[str, float]:
    queries, positives = run.data.held_out("test")
    found = evaluate(run.model, queries, positives, run.data.documents)
    return {**found, "training_seconds": run.seconds}


def _table(results: dict[str, dict[str, float]]) -> str:
    lines = [f"{'test modules':<20}{'MRR@10':>9}{'Recall@10':>11}{'seconds':>9}"]
    for label, result in results.items():
        seconds = f"{result['training_seconds']:.0f}" if "training_seconds" in result else "-"
        lines.append(f"{label:<20}{result['mrr@10']:>9.3f}{result['recall@10']:>11.3f}{seconds:>9}")
    return "\n".join(lines)
