"""Tiny randomly initialised models of sentence-transformers, and pairs of texts that they can learn."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = [f"w{number}" for number in range(60)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
DIM = 32


def transformer(folder: Path, *, dropout: float = 0.1, left: bool = False) -> SentenceTransformer:
    """One layer, tokens by word, from files in the folder, which are made if there are none."""
    if not folder.exists():
        _write(folder, dropout, left=left)
    first = Transformer(str(folder))
    first.max_seq_length = 24
    pooling = Pooling(DIM, pooling_mode="lasttoken" if left else "mean")
    return SentenceTransformer(modules=[first, pooling], device="cpu")


def _write(folder: Path, dropout: float, *, left: bool) -> None:
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt"), padding_side="left" if left else "right").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=DIM,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)


def static() -> SentenceTransformer:
    """A bag of words, whose features are one long row of tokens."""
    words = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=DIM)], device="cpu")


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Some of the first thirty words, and the words thirty further on in another order."""
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[str, str]] = []
    for _ in range(count):
        chosen = torch.randperm(30, generator=generator)[: int(torch.randint(3, 7, (), generator=generator))].tolist()
        found.append((" ".join(WORDS[word] for word in chosen), " ".join(WORDS[word + 30] for word in sorted(chosen))))
    return found


def texts(count: int, seed: int) -> list[str]:
    """Of any words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [" ".join(WORDS[word] for word in torch.randint(60, (n,), generator=generator).tolist()) for n in lengths]


def dataset(count: int, seed: int) -> Dataset:
    found = pairs(count, seed)
    return Dataset.from_dict({"anchor": [anchor for anchor, _ in found], "positive": [text for _, text in found]})


def reciprocal_rank(model: SentenceTransformer, held_out: list[tuple[str, str]]) -> float:
    """Mean over the anchors, of their texts among those of all."""
    training = model.training
    anchors, documents = (
        model.encode(list(side), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        for side in zip(*held_out, strict=True)
    )
    model.train(training)
    scores = anchors @ documents.T
    return float((1 / ((scores > scores.diag()[:, None]).sum(1) + 1)).mean())
