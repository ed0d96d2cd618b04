"""A module that holds a state, as modules hold buffers.

The cache moves with the module, is in its `state_dict` and is copied with it, as buffers would be. It is not in
`buffers()`, because DistributedDataParallel sends rank 0's buffers to all ranks at every forward pass, which would
replace the other ranks' caches.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from typing_extensions import Self

from negcache_fn._cache.state import check_state, live, lock, stored
from negcache_fn._cache.update import copy_state
from negcache_fn._codec import storable

__all__ = ["FINGERPRINT", "Cache", "fingerprint_of", "is_one_cache"]

FINGERPRINT = "fingerprint"
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685, 6364136223846793005)  # from splitmix64, PCG
_CAST = "expected embeddings that fit: normalise them, or keep the cache in a wider dtype"


class Cache(nn.Module):
    """Holds a state as a module holds buffers, except that `buffers()` does not list it.

    `to`, `cuda` and the like move it; features that are on another device than the embeddings stay there. `half`,
    `double` and the like change the dtype of the embeddings alone. Its entries in a `state_dict` are named as in the
    schema of a state: `items/embedding`, `items/features/input_ids`, ..., `step`, `seed`. One more, `fingerprint`, is
    made of the ids but floating, so that the average of several caches is an error when it is loaded.

    The `state_dict` of a deep copy holds clones of the cache. So an average of weights (EMA) that writes into the
    `state_dict` of a copy leaves its cache as it is: the mean of two ids is the id of another document, and a slot's
    mean embedding would be that of two documents.

    It cannot be made on the meta device, where `from_pretrained` makes a model before it loads the weights, because
    the weights have no cache. Put it into the model afterwards.

    Args:
        state: the cache; the module owns it from now on.

    Raises:
        ValueError, TypeError: a `state` that is not a cache, or on the meta device.
    """

    _is_copy = False  # a deep copy

    def __init__(self, state: TensorDictBase) -> None:
        super().__init__()
        check_state(state)
        if "meta" in (stored(state, "embedding").device.type, torch.get_default_device().type):
            raise ValueError(
                "state would be on the meta device, as under from_pretrained(...) or torch.device('meta'), and have no "
                "values; expected a cache that is put into the model after the model is loaded"
            )
        self.state: TensorDictBase = state

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cache":
        copy = Cache.__new__(Cache)
        nn.Module.__init__(copy)
        copy.state = copy_state(self.state)  # that of a TensorDict is unlocked
        copy._is_copy = True
        return copy

    def __getattr__(self, name: str) -> Any:
        # torch.distributed.checkpoint's helpers look up the names in a `state_dict`.
        if "state" in self.__dict__:
            if name == FINGERPRINT:
                return fingerprint_of(stored(self.state, "id"), stored(self.state, "embedded_at"))
            for leaf_name, leaf in _named(self.state):
                if leaf_name == name:
                    return leaf
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The function is applied to an empty tensor, so that numbers never pass through another dtype.
        embedding = stored(self.state, "embedding")
        like = fn(embedding.new_empty(0))
        if embedding.is_meta and not like.is_meta:
            raise ValueError(
                "the cache is on the meta device and has no values to move; expected a state that is assigned first, "
                "as in module.state = negcache_fn.init_cache(...), or load_state_dict(..., assign=True)"
            )
        if (slot := _first_not_storable(embedding, live(self.state), like.dtype)) is not None:
            raise ValueError(f"state['items', 'embedding'] at slot {slot} is not finite in {like.dtype}; {_CAST}")

        def apply(leaf: Tensor) -> Tensor:
            dtype = like.dtype if leaf is embedding else leaf.dtype
            return leaf.to(like.device if leaf.device == embedding.device else leaf.device, dtype)

        if like.device != embedding.device or like.dtype != embedding.dtype:
            self.state = lock(cast(TensorDict, cast(TensorDictBase, self.state.apply(apply)).clear_device_()))
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, leaf in _named(self.state):
            destination[prefix + name] = leaf.clone() if self._is_copy else leaf
        destination[prefix + FINGERPRINT] = getattr(self, FINGERPRINT)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        leaves = {prefix + name: leaf for name, leaf in _named(self.state)}
        wanted = {*leaves, prefix + FINGERPRINT}
        rest = {key: value for key, value in state_dict.items() if key not in wanted}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys.extend(wanted - state_dict.keys())
        if not wanted <= state_dict.keys():  # a cache is loaded as a whole or not at all
            return
        given: dict[str, Tensor] = {key: state_dict[key] for key in leaves}
        assign = local_metadata.get("assign_to_params_buffers", False)
        errors = [
            f"{key} has shape {tuple(given[key].shape)}; expected {tuple(leaf.shape)}, that of this cache: make it of "
            f"the same capacity and features, and negcache_fn.resize it then"
            for key, leaf in leaves.items()
            if given[key].shape != leaf.shape
        ]
        errors += [
            f"{key} has dtype {given[key].dtype}; expected {leaf.dtype}: a cache is not averaged or cast: leave it out"
            for key, leaf in leaves.items()
            if given[key].dtype != leaf.dtype and not (given[key].is_floating_point() and leaf.is_floating_point())
        ]
        if not errors and not is_one_cache(state_dict, prefix):
            errors = [
                f"{prefix}items is an average of several caches; expected one: a cache is not averaged, leave it out"
            ]
        if not errors and not assign:
            errors = self._losses(given, prefix)
        error_msgs.extend(errors)
        if errors:
            return
        if assign:
            self._assign(given, prefix)
            return
        with torch.no_grad():
            for key, leaf in leaves.items():
                leaf.copy_(given[key])

    def _losses(self, given: dict[str, Tensor], prefix: str) -> list[str]:
        """The values that would be lost if they were copied into this state."""
        embedding = stored(self.state, "embedding")
        if embedding.is_meta and not given[f"{prefix}items/embedding"].is_meta:
            return [f"{prefix}items/embedding is on the meta device and takes no values: load with assign=True"]
        alive = given[f"{prefix}items/embedded_at"] >= 0
        slot = _first_not_storable(given[f"{prefix}items/embedding"], alive, embedding.dtype)
        lost = f"{prefix}items/embedding at slot {slot} is not finite in {embedding.dtype}; {_CAST}"
        return [] if slot is None else [lost]

    def _assign(self, given: dict[str, Tensor], prefix: str) -> None:
        """The given tensors themselves, as with `load_state_dict(assign=True)`."""
        new = self.state.clone(recurse=False).unlock_()
        for key, _ in cast(Any, list(self.state.items(include_nested=True, leaves_only=True))):
            new[key] = given[prefix + _name(key)].detach()
        check_state(new)
        self.state = lock(new.clear_device_())


def fingerprint_of(ids: Tensor, embedded_at: Tensor) -> Tensor:
    """[8] float32 in [0, 1): pseudo-random numbers, made of which documents are in the slots, and since when."""
    slot = torch.arange(ids.shape[0], device=ids.device)
    mixed = (ids * _ODD[0]) ^ (embedded_at * _ODD[1] + slot * _ODD[2])
    total = ((mixed ^ (mixed >> 29)) * _ODD[3]).sum()
    numbers = total * torch.arange(1, 16, 2, device=ids.device) * _ODD[0]
    return ((numbers >> 40) & 0xFFFFFF).to(torch.float32) / 2**24


def is_one_cache(state_dict: dict[str, Any], prefix: str) -> bool:
    """Whether the fingerprint is that of the ids, however it may have been rounded."""
    found = state_dict[prefix + FINGERPRINT]
    ids, embedded_at = (state_dict[f"{prefix}items/{name}"] for name in ("id", "embedded_at"))
    if found.is_meta or ids.is_meta:
        return True
    expected = fingerprint_of(ids, embedded_at).to(found.device)
    return found.shape == expected.shape and bool(((found.to(torch.float32) - expected).abs() < 2**-7).all())


def _first_not_storable(embedding: Tensor, alive: Tensor, dtype: torch.dtype) -> int | None:
    """The first live slot whose embedding is not finite in that dtype, if casting can make it so."""
    if embedding.is_meta or dtype == embedding.dtype or torch.finfo(dtype).max >= torch.finfo(embedding.dtype).max:
        return None
    wrong = (alive & ~storable(embedding, dtype)).nonzero()
    return int(wrong[0]) if wrong.shape[0] > 0 else None


def _name(key: str | tuple[str, ...]) -> str:
    return "/".join((key,) if isinstance(key, str) else key)


def _named(state: TensorDictBase) -> Iterator[tuple[str, Tensor]]:
    """The leaves by their names in a `state_dict`."""
    for key, leaf in cast(Any, state.items(include_nested=True, leaves_only=True)):
        yield _name(key), leaf
