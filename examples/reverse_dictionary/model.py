"""The pretrained encoder as a model of sentence-transformers."""

from __future__ import annotations

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
    """Whether the device has instructions for products in bfloat16."""
    if device == "cuda":
        return True
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


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
