"""Trains a model of sentence-transformers with the loss named, and says how well it finds held-out documents."""

from __future__ import annotations

import argparse
import logging
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from examples.command_line import CommandParser, positive, run
from examples.sentence_transformers.data import split
from negcache_fn import StepOptions
from negcache_fn.integrations.sentence_transformers import NegativeCacheCallback, NegativeCacheLoss

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status."""
    return run(_run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    train, queries, corpus, relevant = split(options.root or [Path(sysconfig.get_path("stdlib"))])
    torch.manual_seed(options.seed)
    model = SentenceTransformer(options.model) if options.model else _bag_of_words(corpus.values(), options.dim)
    evaluator = InformationRetrievalEvaluator(
        queries, corpus, relevant, mrr_at_k=[10], precision_recall_at_k=[10], show_progress_bar=False
    )
    print(f"{len(train)} pairs; {len(queries)} queries search {len(corpus)} documents")

    if options.loss == "cache":
        loss: torch.nn.Module = NegativeCacheLoss(
            model,
            options.cache_size,
            max_length=options.max_length,
            options=StepOptions(draws_per_query=options.draws_per_query),
        )
    else:
        loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(options.out / options.loss),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=0.1,
            save_steps=200,
            save_total_limit=2,
            logging_steps=50,
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=options.seed,
        ),
        train_dataset=train,
        loss=loss,
    )
    if options.loss == "cache":
        NegativeCacheCallback.attach(trainer)
    before = _quality(evaluator, model)
    trainer.train(resume_from_checkpoint=options.resume)
    print(f"{options.loss}: MRR@10 {before:.3f} untrained, {_quality(evaluator, model):.3f} trained")


def _bag_of_words(texts: object, dim: int) -> SentenceTransformer:
    """An untrained model, small enough for a minute on two cores."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    trainer = WordPieceTrainer(vocab_size=8000, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=dim)])


def _quality(evaluator: InformationRetrievalEvaluator, model: SentenceTransformer) -> float:
    return float(evaluator(model)["cosine_mrr@10"])


def _parser() -> CommandParser:
    parser = CommandParser("sentence_transformers", description=__doc__)
    parser.add_argument(
        "--loss", choices=["cache", "ranking"], default="cache", help="with the cache, or in-batch only"
    )
    parser.add_argument("--root", type=Path, action="append", help="folder of Python files (default: standard library)")
    parser.add_argument("--model", help="folder of a model of yours; a bag of words without training by default")
    parser.add_argument("--out", type=Path, default=Path("runs/sentence_transformers"))
    parser.add_argument("--resume", action="store_true", help="go on at the last checkpoint in --out")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--cache-size", type=positive, default=4096)
    parser.add_argument("--draws-per-query", type=positive, default=4)
    parser.add_argument("--max-length", type=positive, default=256)
    parser.add_argument("--dim", type=positive, default=128)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
