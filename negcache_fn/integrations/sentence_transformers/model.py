"""Facts about a model: the module inside its wrappers, its tokenizer, and unsupported kinds."""

from typing import Any, NamedTuple, cast

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model import BaseModel
from sentence_transformers.sentence_transformer.losses.adaptive_layer import TransformerDecorator
from torch import nn

__all__ = ["Tokenizing", "excludes_prompts", "refuse_layers", "sentence_transformer", "tokenizing"]


class Tokenizing(NamedTuple):
    """How texts become rows of tokens."""

    longest: float  # tokens to which the tokenizer truncates
    left: bool  # whether padding comes first
    padding: int  # token id
    head: int  # special tokens in front of a text
    tail: int  # special tokens behind it
    cuts_left: bool  # whether truncation takes from the beginning of a text


def sentence_transformer(model: Any) -> SentenceTransformer:
    """The model inside its compiled or distributed wrapper; TypeError if it is not a `SentenceTransformer`."""
    inner = model
    while not isinstance(inner, BaseModel) and isinstance(inner, nn.Module):
        wrapped = [getattr(inner, name) for name in ("_orig_mod", "module") if hasattr(inner, name)]
        if not wrapped:
            break
        inner = wrapped[0]
    if not isinstance(inner, SentenceTransformer):
        raise TypeError(
            f"model is a {type(inner).__name__}; expected a SentenceTransformer, which embeds a document as one dense "
            f"vector"
        )
    return inner


def refuse_layers(model: SentenceTransformer) -> None:
    """Raises inside an `AdaptiveLayerLoss`, which would fill one cache from all layers."""
    if isinstance(getattr(model[0], "forward", None), TransformerDecorator):
        raise ValueError(
            "the loss is in an AdaptiveLayerLoss or a Matryoshka2dLoss; expected the loss itself or a MatryoshkaLoss "
            "around it, as embeddings of other layers must not be in one cache"
        )


def excludes_prompts(model: SentenceTransformer) -> bool:
    """Whether a pooling leaves out the prompt's tokens, so that the length of the prompt matters."""
    return any(getattr(module, "include_prompt", True) is False for module in model.modules())


def tokenizing(model: SentenceTransformer, task: Any, modality: Any) -> Tokenizing:
    """The tokenizing of the module that takes inputs of this task and modality."""
    first = cast(Any, model[0])
    if hasattr(first, "sub_modules"):
        first = first.sub_modules[first._resolve_route(task=task, modality=modality)][0]
    longest = getattr(first, "max_seq_length", None)
    tokenizer = getattr(first, "tokenizer", None)
    of_calls: Any = getattr(first, "processing_kwargs", None) or {}
    asked: Any = of_calls.get("text", {})
    head, tail = _special_tokens(tokenizer) if modality in (None, "text") else (0, 0)
    return Tokenizing(
        float("inf") if longest is None else longest,
        asked.get("padding_side", getattr(tokenizer, "padding_side", "right")) == "left",
        getattr(tokenizer, "pad_token_id", None) or 0,
        head,
        tail,
        getattr(tokenizer, "truncation_side", "right") == "left",
    )


def _special_tokens(tokenizer: Any) -> tuple[int, int]:
    """How many special tokens a tokenizer of transformers puts in front of a text and behind it."""
    if not hasattr(tokenizer, "truncation_side"):
        return 0, 0
    whole, text = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    for head in range(len(whole) - len(text) + 1):
        if whole[head : head + len(text)] == text:
            return head, len(whole) - head - len(text)
    return 0, 0
