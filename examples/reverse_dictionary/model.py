"""The pretrained encoder as a model of sentence-transformers."""

from __future__ import annotations

import timeit
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import nn

__all__ = ["LONGEST_TEXT", "fast_in_bfloat16", "load_model"]

LONGEST_TEXT = 32
"""Tokens. Definitions have 14 on average, the words of an entry 8."""


def load_model(
    name: str | Path, *, layers: int | None, device: str, longest_text: int = LONGEST_TEXT, dropout: float = 0.0
) -> SentenceTransformer:
    """A model whose word table is not trained, cut to its first layers.

    Args:
        name: as sentence-transformers takes it, or a folder.
        layers: how many to keep; None: all.
        device: "cpu" or "cuda".
        longest_text: tokens after which a text is cut.
        dropout: probability, in all of its layers.

    Raises:
        ValueError: `layers` of a model that has fewer, or whose layers are not found.
    """
    model = SentenceTransformer(str(name), device=device)
    model.max_seq_length = longest_text
    transformer = model[0].auto_model
    if layers is not None:
        _cut(transformer, layers)
    transformer.get_input_embeddings().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def fast_in_bfloat16(device: str) -> bool:
    """Whether products in bfloat16 are clearly faster; some CPUs have instructions for them that are slow."""
    if device == "cuda":
        return True

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(1024, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
        return min(timeit.repeat(lambda: left @ right, number=1, repeat=10))

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def _cut(transformer: nn.Module, layers: int) -> None:
    encoder = getattr(transformer, "encoder", None)
    found = getattr(encoder, "layer", None)
    if not isinstance(found, nn.ModuleList) or not hasattr(transformer.config, "num_hidden_layers"):
        raise ValueError(
            f"--layers is {layers}; a {type(transformer).__name__} has no encoder.layer to cut: leave it out"
        )
    if layers > len(found):
        raise ValueError(f"--layers is {layers}; expected at most {len(found)}, as the model has so many")
    encoder.layer = found[:layers]
    transformer.config.num_hidden_layers = layers
