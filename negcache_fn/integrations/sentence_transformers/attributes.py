"""The arguments of the loss as its attributes, checked when they are set as when the loss is made."""

from dataclasses import fields, replace
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from negcache_fn._cache.state import live
from negcache_fn.integrations.sentence_transformers.model import sentence_transformer
from negcache_fn.integrations.sentence_transformers.settings import (
    FIXED_WITH_DOCUMENTS,
    FIXED_WITH_THE_CACHE,
    Settings,
    check_scale,
)
from negcache_fn.nn import Cache, Scale

__all__ = ["SETTINGS", "Attributes"]

SETTINGS = frozenset(field.name for field in fields(Settings))


class Attributes(nn.Module):
    """A module with the attributes of `Settings`, a scale and, from its first batch on, a cache.

    Args:
        model: whose texts are embedded.
        settings: the arguments.
        scale: of the similarities.
        learnable_scale: whether it is trained.
    """

    def __init__(self, model: Any, settings: Settings, scale: float, *, learnable_scale: bool) -> None:
        super().__init__()
        self._made_by = (sentence_transformer(model),)  # a tuple: not a child
        self.model: nn.Module = model  # the trainer replaces it by its wrapper
        self._settings = settings
        self.scaling: Scale = Scale(check_scale(scale), learnable=learnable_scale)
        self._cache: Cache | None = None

    def __getattr__(self, name: str) -> Any:
        if name in SETTINGS and "_settings" in self.__dict__:
            return getattr(self.__dict__["_settings"], name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in SETTINGS:
            super().__setattr__(name, value)
            return
        old, new = self._settings, replace(self._settings, **{name: value})
        guides = [settings.false_negatives and settings.false_negatives.guide for settings in (old, new)]
        changed = value != getattr(old, name)
        state = self.state
        fixed = state is not None and (name in FIXED_WITH_THE_CACHE or guides[0] is not guides[1])
        if state is not None and name in FIXED_WITH_DOCUMENTS:
            fixed = bool(live(state).any())
        if changed and fixed:
            raise ValueError(
                f"{name} is set to {value!r} when there is a cache already; expected {getattr(old, name)!r}, with "
                f"which it was made (resize changes its size, reset empties it)"
            )
        self._settings = new

    @property
    def scale(self) -> float | Tensor:
        """Scale of the similarities: a number, or a 0-d tensor if it is learnable."""
        return self.scaling()

    @scale.setter
    def scale(self, scale: float) -> None:
        number = check_scale(scale)
        if self.scaling.logarithm is None:
            self.scaling = Scale(number)
        else:
            with torch.no_grad():
                self.scaling.logarithm.fill_(torch.tensor(number, dtype=torch.float64).log())

    @property
    def temperature(self) -> float | Tensor:
        """1 / scale."""
        return 1 / self.scale

    @property
    def state(self) -> TensorDictBase | None:
        """The cache, or this rank's part; None before the first batch, which shows the features of a document."""
        return None if self._cache is None else self._cache.state

    @state.setter
    def state(self, state: TensorDictBase) -> None:
        self._cache = Cache(state)
        self._made_by = (sentence_transformer(self.model),)

    @property
    def made_by(self) -> nn.Module:
        """The model whose embeddings are cached, or will be."""
        return self._made_by[0]

    def begin_anew(self) -> None:
        """Without a cache and, if it is learnable, with the first scale, for the model that there is now."""
        self._made_by = (sentence_transformer(self.model),)
        self._cache = None
        if self.scaling.logarithm is not None:
            self.scaling.load_state_dict(Scale(self.scaling.fixed, learnable=True).state_dict())
