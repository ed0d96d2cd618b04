"""A small BERT with random weights and a WordPiece vocabulary of the collection: for trying things out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.utils import logging

from examples.whole_files import written_whole

__all__ = ["make_tiny_model"]

VOCABULARY_SIZE = 8192
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_TEXTS = 100_000
"""From so many texts, the first ones, the vocabulary is made."""


def make_tiny_model(folder: Path, texts: Iterable[str], *, seed: int = 0) -> None:
    """Writes tokenizer, configuration and weights, as `from_pretrained` reads them; nothing if they are there."""
    if folder.is_dir():
        return
    tokenizer = _tokenizer(islice(texts, _TEXTS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=128,
                max_position_embeddings=256,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    logging.disable_progress_bar()
    with written_whole(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def _tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    vocabulary = _vocabulary(words)
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    first, last = "[CLS]", "[SEP]"
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(token, vocabulary[token]) for token in (first, last)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _vocabulary(words: Counter[str]) -> dict[str, int]:
    """The most frequent words, and the characters to spell the others with.

    `tokenizers`' own trainer gives another vocabulary each time, and a run is to be a function of its data and options.
    """
    characters = sorted({character for word in words for character in word})
    pieces = [*_SPECIAL, *characters, *(f"##{character}" for character in characters)]
    frequent = sorted((-count, word) for word, count in words.items() if count > 1 and len(word) > 1)
    pieces += [word for _, word in frequent[: max(0, VOCABULARY_SIZE - len(pieces))]]
    return {piece: number for number, piece in enumerate(pieces)}
