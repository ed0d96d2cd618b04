"""The step as a module that owns a cache."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from negcache_fn._cache.state import check_state, stored
from negcache_fn._checks import check_flag
from negcache_fn._features import Features
from negcache_fn._options import StepOptions, check_options
from negcache_fn._ranks.group import ranks_of
from negcache_fn._scores.exclude import NO_FALSE_NEGATIVES, FalseNegatives
from negcache_fn._step import step_
from negcache_fn.nn.cache import Cache
from negcache_fn.nn.scale import Scale

__all__ = ["NegativeCacheLoss"]


class NegativeCacheLoss(nn.Module):
    """`step_` on a cache that the module owns.

    The cache is in the module's `state_dict`, and moves and is copied with it, but is not in `buffers()`, see `Cache`.

    Equivalent to `step_(state, queries, features, encode, options=options, scale=scale).loss`; the state and the
    metrics of the step are in `state` and `metrics`. With gradients off, nothing is written.

    Args:
        state: the cache, from `init_cache`. The module owns it from now on and writes it in place.
        scale: scale of the inner products, above 0.
        learnable_scale: whether the scale is a parameter, of at most 100, see `Scale`. With a `group` its gradient is
            averaged over the ranks, since DistributedDataParallel does not know the parameter.
        options: options of the step.
        group: ranks that train together, see `step`.

    Raises:
        ValueError, TypeError: a `state` that is not a cache, or on the meta device (put the module into a model after
            `from_pretrained`); a `scale` not above 0; `options` that are not `StepOptions`; an invalid `group`.

    Examples:
        >>> encoder = torch.nn.Linear(3, 4)
        >>> criterion = NegativeCacheLoss(init_cache(8, 4, features=torch.zeros(1, 3)), scale=20.0)
        >>> for _ in range(2):
        ...     loss = criterion(torch.randn(2, 4), torch.randn(2, 3), encoder)
        ...     loss.backward()
        >>> criterion.metrics["occupancy"]
        tensor(0.2500)
    """

    options: StepOptions
    """The options of the step."""

    def __init__(
        self,
        state: TensorDictBase,
        *,
        scale: float = 20.0,
        learnable_scale: bool = False,
        options: StepOptions = StepOptions(),
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_options(options)
        check_flag("learnable_scale", learnable_scale)
        ranks_of(group)  # raises if it is not a group
        self.cache: Cache = Cache(state)
        self.scaling: Scale = Scale(scale, learnable=learnable_scale).to(stored(state, "embedding").device)
        options.check_group(group is None)
        self.options = options
        self._group = _Group(group)
        self.metrics: dict[str, Tensor] = {}
        """0-d tensors of the last forward pass, see `step`."""

    @property
    def state(self) -> TensorDictBase:
        """The cache. You may assign another state, such as a resized or prefilled one."""
        return self.cache.state

    @state.setter
    def state(self, state: TensorDictBase) -> None:
        check_state(state)
        self.cache.state = state

    @property
    def scale(self) -> float | Tensor:
        """Scale of the inner products: a number, or a 0-d tensor if it is learnable."""
        return self.scaling()

    @property
    def group(self) -> torch.distributed.ProcessGroup | None:
        """The ranks that train together."""
        return self._group.value

    def forward(
        self,
        queries: Tensor,
        features: Features,
        encode: Callable[[Any], Tensor],
        *,
        ids: Tensor | None = None,
        log_weights: Tensor | None = None,
        cacheable: Tensor | None = None,
        false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
        priorities: Tensor | None = None,
        positive_rows: Tensor | None = None,
    ) -> Tensor:
        """The loss: [] or, with reduction "none", [B]. It has the arguments and errors of `step`.

        Args:
            queries: [B, D] embeddings, with gradient.
            features: of N documents; row i < B is the positive of query i.
            encode: the document encoder.
            ids: [N] int64 ids of the documents, -1 where anonymous.
            log_weights: [N] floating, added to the documents' scores.
            cacheable: [N] bool, False for documents not to be cached.
            false_negatives: further documents to exclude from a query's negatives.
            priorities: [C] instead of `options.evict`, see `update`.
            positive_rows: [B, P] int64, the rows of `features` that are positives of each query, -1: none.
        """
        out = step_(
            self.cache.state,
            queries,
            features,
            encode,
            options=self.options,
            scale=self.scaling(self.group),
            ids=ids,
            log_weights=log_weights,
            cacheable=cacheable,
            false_negatives=false_negatives,
            priorities=priorities,
            positive_rows=positive_rows,
            group=self.group,
        )
        self.metrics = out.metrics
        return out.loss

    def extra_repr(self) -> str:
        """Capacity, dimensions and options, for `print`."""
        capacity, dimensions = stored(self.state, "embedding").shape
        changed = [
            f", {field.name}={value}"
            for field in dataclasses.fields(self.options)
            if (value := getattr(self.options, field.name)) != field.default
        ]
        return f"capacity={capacity}, embedding_dim={dimensions}{''.join(changed)}"


class _Group:
    """A process group, shared by copies of a module: it cannot be copied."""

    def __init__(self, value: torch.distributed.ProcessGroup | None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Group":
        return self
