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

from negcache_fn._cache.state import check_state, lock, stored
from negcache_fn._cache.update import copy_state

__all__ = ["Cache"]


class Cache(nn.Module):
    """Holds a state as a module holds buffers, except that `buffers()` does not list it.

    `to`, `cuda` and the like move it; features that are on another device than the embeddings stay there. `half`,
    `double` and the like change the dtype of the embeddings alone. Its entries in a `state_dict` are named as in the
    schema of a state: `items/embedding`, `items/features/input_ids`, ..., `step`, `seed`.

    Args:
        state: the cache, which is the module's from now on.

    Raises:
        ValueError, TypeError: a `state` that is not a cache.
    """

    def __init__(self, state: TensorDictBase) -> None:
        super().__init__()
        check_state(state)
        self.state: TensorDictBase = state

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cache":
        return Cache(copy_state(self.state))  # that of a TensorDict is unlocked

    def __getattr__(self, name: str) -> Any:
        # torch.distributed.checkpoint's helpers look up what a `state_dict` names.
        if "state" in self.__dict__:
            for leaf_name, leaf in _named(self.state):
                if leaf_name == name:
                    return leaf
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What the function does is asked of nothing, so that numbers never pass through another dtype.
        embedding = stored(self.state, "embedding")
        like = fn(embedding.new_empty(0))

        def apply(leaf: Tensor) -> Tensor:
            dtype = like.dtype if leaf is embedding else leaf.dtype
            return leaf.to(like.device if leaf.device == embedding.device else leaf.device, dtype)

        if like.device != embedding.device or like.dtype != embedding.dtype:
            if told := _not_finite(embedding, stored(self.state, "embedded_at"), like.dtype):
                raise ValueError(f"the embeddings of the cache {told}; expected a dtype that holds them")
            self.state = lock(cast(TensorDict, cast(TensorDictBase, self.state.apply(apply)).clear_device_()))
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, leaf in _named(self.state):
            destination[prefix + name] = leaf

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
        rest = {key: value for key, value in state_dict.items() if key not in leaves}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys.extend(leaves.keys() - state_dict.keys())
        fitting: list[tuple[Tensor, Tensor]] = []
        for key, leaf in leaves.items():
            given = state_dict.get(key, leaf)
            if given.dtype != leaf.dtype and not (given.is_floating_point() and leaf.is_floating_point()):
                error_msgs.append(
                    f"{key} has dtype {given.dtype}; expected {leaf.dtype}: a cache is not averaged or cast, so leave "
                    f"it out"
                )
            elif given.shape == leaf.shape:
                fitting.append((leaf, given))
            else:
                error_msgs.append(
                    f"{key} has shape {tuple(given.shape)}; expected {tuple(leaf.shape)}, that of this cache: make it "
                    f"of the same capacity and features, and negcache_fn.resize it then"
                )
        embedded = {name: state_dict.get(f"{prefix}items/{name}") for name in ("embedding", "embedded_at")}
        if len(fitting) == len(leaves) and None not in embedded.values():
            dtype = stored(self.state, "embedding").dtype
            if told := _not_finite(embedded["embedding"], embedded["embedded_at"], dtype):
                error_msgs.append(f"{prefix}items/embedding {told}; expected finite numbers, as the slot is live")
                return
        if len(fitting) == len(leaves):  # a cache is loaded as a whole or not at all
            with torch.no_grad():
                for leaf, given in fitting:
                    leaf.copy_(given)


def _not_finite(embedding: Any, embedded_at: Any, dtype: torch.dtype) -> str | None:
    """The first live slot whose embedding is not finite in a dtype, in words."""
    if embedding.is_meta or embedded_at.is_meta:
        return None
    wrong = ~embedding.to(dtype).isfinite().all(-1) & (embedded_at.to(embedding.device) >= 0)
    return f"are not finite as {dtype} at slot {int(wrong.nonzero()[0])}" if bool(wrong.any()) else None


def _named(state: TensorDictBase) -> Iterator[tuple[str, Tensor]]:
    """The leaves by their names in a `state_dict`."""
    for key, leaf in cast(Any, state.items(include_nested=True, leaves_only=True)):
        yield "/".join((key,) if isinstance(key, str) else key), leaf
