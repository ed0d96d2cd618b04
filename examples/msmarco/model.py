"""The dual encoder: a transformer for each side, or one for both, and a learnt scale."""

from __future__ import annotations

import copy
import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from examples.msmarco.options import Shape

__all__ = ["DualEncoder", "Tower", "export", "load_tokenizer", "load_transformer"]


class Tower(nn.Module):
    """Token ids to unit vectors."""

    def __init__(self, transformer: PreTrainedModel, pooling: str, padding: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.pooling = pooling
        self.padding = padding

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """``input_ids`` [N, width] to [N, D] float32, also under autocast."""
        tokens = features["input_ids"]
        kept = tokens != self.padding
        width = max(1, int(kept.sum(1).max()))  # what is padding in all rows costs nothing
        tokens, kept = tokens[:, :width], kept[:, :width]
        states = self.transformer(input_ids=tokens.long(), attention_mask=kept.long()).last_hidden_state
        if self.pooling == "cls":
            pooled = states[:, 0].float()
        else:
            weights = kept.unsqueeze(-1).float()
            pooled = (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
        return F.normalize(pooled, dim=-1)


class DualEncoder(nn.Module):
    """Queries and passages to unit vectors of one space."""

    def __init__(self, transformer: PreTrainedModel, shape: Shape, padding: int) -> None:
        super().__init__()
        self.passage_tower = Tower(transformer, shape.pooling, padding)
        self.query_tower = self.passage_tower if shape.towers == "shared" else copy.deepcopy(self.passage_tower)
        self.log_scale = nn.Parameter(torch.tensor(math.log(shape.scale)))
        self.shape = shape
        self.dim: int = transformer.config.hidden_size

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with before the softmax: beta."""
        return self.log_scale.exp()

    def digest(self) -> str:
        """Hash of all weights."""
        value = hashlib.blake2b(digest_size=16)
        for name, weight in self.state_dict().items():
            value.update(name.encode())
            value.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return value.hexdigest()


def export(model: DualEncoder, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the transformers as `from_pretrained` reads them; ``encoder``, or one for each side."""
    towers = {"encoder": model.passage_tower}
    if model.shape.towers == "separate":
        towers = {"query_encoder": model.query_tower, "passage_encoder": model.passage_tower}
    for name, tower in towers.items():
        tower.transformer.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder in Hugging Face's format.

    Raises:
        FileNotFoundError, ValueError: a folder that is not there; a tokenizer without padding or not of the fast kind.
    """
    _check_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token_id is None or not tokenizer.is_fast:
        raise ValueError(f"the tokenizer in {folder} is {type(tokenizer).__name__}; expected a fast one with padding")
    return tokenizer


def load_transformer(folder: Path, *, weights: bool = True) -> PreTrainedModel:
    """The transformer of a folder, in float32; without its weights, if they come from elsewhere."""
    _check_folder(folder)
    logging.disable_progress_bar()
    if weights:
        transformer = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    else:
        transformer = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    if getattr(transformer, "pooler", None) is not None:
        transformer.pooler = None  # it would never have a gradient
    return transformer


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; expected a local folder that `save_pretrained` wrote")
