"""Padding a batch to the width of the slots, for features whose padding is not zero."""

from collections.abc import Mapping
from typing import TypeAlias, cast

from tensordict import TensorDictBase
from torch import Tensor

from negcache_fn._cache.state import check_state
from negcache_fn._features import (
    Features,
    FeaturesT,
    check_like,
    feature_items,
    leaves,
    map_features,
    pad_rows,
)

__all__ = ["Padding", "pad_features"]

Padding: TypeAlias = "float | Mapping[str, Padding]"


def pad_features(state: TensorDictBase, features: FeaturesT, *, values: Padding) -> FeaturesT:
    """A batch as wide as the slots of the cache, padded on the right with given values.

    Call it on a batch before `step` or `update`, which pad with zeros, if the padding of a feature is not 0, such as
    the token ids of a tokenizer with another `pad_token_id`. The cached features of a document then do not depend on
    the width of its batch.

    Args:
        state: the cache.
        features: a batch, nested as in the cache, each leaf [rows, ...]; no wider than the slots.
        values: nested like the features: the number to pad with, for each leaf whose padding is not 0.

    Returns:
        The features, each leaf [rows, *slot].

    Raises:
        ValueError: features unlike those of the cache, or wider; a key in `values` that the features do not have.
        TypeError: features of other kinds or dtypes; a value that is not a number.

    Examples:
        >>> documents = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "mask": torch.zeros(1, 4)}
        >>> state = init_cache(8, 2, documents)
        >>> batch = {"input_ids": torch.tensor([[5, 6]]), "mask": torch.ones(1, 2)}
        >>> pad_features(state, batch, values={"input_ids": 1})
        {'input_ids': tensor([[5, 6, 1, 1]]), 'mask': tensor([[1., 1., 0., 0.]])}
    """
    check_state(state)
    stored = cast("Tensor | TensorDictBase", state["items", "features"])
    name, leaf = next(leaves(features), ("features", None))
    if leaf is None or leaf.ndim == 0:
        raise ValueError(f"{name} holds no rows; expected a batch of documents, as in the cache")
    check_like(stored, features, leaf.shape[0], "features", cast(Tensor, state["items", "embedding"]).device)
    padding = iter(_padding(features, values, "values"))

    def pad_leaf(given: Tensor, slot: Tensor) -> Tensor:
        return pad_rows(given, slot, next(padding))

    return map_features(pad_leaf, features, stored)


def _padding(features: Features, values: Padding, name: str) -> list[float]:
    """The padding of each leaf, in the order of `leaves`."""
    if isinstance(features, Tensor):
        if not isinstance(values, (int, float)):
            raise TypeError(f"{name} is a {type(values).__name__}; expected a number to pad the tensor with")
        return [values]
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} is a {type(values).__name__}; expected a mapping from keys of the features to numbers")
    children = dict(feature_items(features))
    if not values.keys() <= children.keys():
        raise ValueError(f"{name} has keys {sorted(values)}; expected some of the features': {sorted(children)}")
    padding: list[float] = []
    for key, child in children.items():
        nothing: Padding = 0 if isinstance(child, Tensor) else {}
        padding.extend(_padding(child, values.get(key, nothing), f"{name}[{key!r}]"))
    return padding
