"""The pretrained encoder, for a loop of one's own: BERT, the mean of its tokens, unit length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

__all__ = ["Encoder", "write_trimmed"]

_WORDS = "embeddings.word_embeddings.weight"


class Encoder(nn.Module):
    """Tokens [N, L], 0 where padded, to unit embeddings [N, D] in float32, computed in bfloat16."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """The weights in a folder, in float32, without dropout."""
        bert = BertModel.from_pretrained(
            folder, add_pooling_layer=False, dtype=torch.float32, attn_implementation="sdpa"
        )
        return cls(bert.eval())

    @classmethod
    def random(cls, vocabulary: int) -> Encoder:
        """One small layer without training, to try a program."""
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
        return cls(BertModel(config, add_pooling_layer=False).eval())

    @property
    def dim(self) -> int:
        """D."""
        return int(self.bert.config.hidden_size)

    def compile_layers(self) -> None:
        """Compiles the layers, which share their code, for any number of texts."""
        for layer in self.bert.encoder.layer:
            layer.compile(dynamic=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """The embeddings."""
        tokens, present = tokens.long(), tokens != 0
        # A mask of four dimensions is used as it is; for one of two, transformers would wait for its values.
        with torch.autocast(tokens.device.type, torch.bfloat16):
            hidden = self.bert(input_ids=tokens, attention_mask=present[:, None, None, :]).last_hidden_state
        weights = present.float()[..., None]
        return F.normalize((hidden.float() * weights).sum(1) / weights.sum(1), dim=-1)


def write_trimmed(model: Path, tokens: list[NDArray[np.int64]], folder: Path) -> list[NDArray[np.int16]]:
    """Writes the model as float16 with the rows of its word table that the tokens use; returns the tokens renumbered.

    Padding must be token 0, and stays so.
    """
    used = np.unique(np.concatenate([np.zeros(1, np.int64), *(texts.ravel() for texts in tokens)]))
    weights = {
        name.removeprefix("bert."): values
        for name, values in load((model / "model.safetensors").read_bytes()).items()
        if values.is_floating_point() and "pooler" not in name
    }
    weights[_WORDS] = weights[_WORDS][torch.from_numpy(used)]
    folder.mkdir(parents=True, exist_ok=True)
    halved = {name: cast(Tensor, values).half().contiguous() for name, values in weights.items()}
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"vocab_size": len(used)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [np.searchsorted(used, texts).astype(np.int16) for texts in tokens]
