"""The step as a module: a shell that owns a cache, for code that is made of modules."""

import math
from collections.abc import Callable
from typing import Any, TypedDict, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from typing_extensions import Unpack

from negcache_fn.cache_module import Cache
from negcache_fn.checks import check_state
from negcache_fn.classes import InBatch
from negcache_fn.collectives import Ranks, distribute
from negcache_fn.eviction import Evict
from negcache_fn.false_negatives import NO_FALSE_NEGATIVES, FalseNegatives
from negcache_fn.features import Features
from negcache_fn.state import stored
from negcache_fn.streaming import ScoreTransform
from negcache_fn.training import step_

__all__ = ["NegativeCacheLoss", "Scale", "StepOptions", "check_options"]


class StepOptions(TypedDict, total=False):
    """The options of `step` that stay the same from one step to the next."""

    score_transform: ScoreTransform | None
    num_samples: int | None
    replacement: bool
    num_draws: int | None
    top_k: int | None
    in_batch: InBatch
    share_draws: bool
    staleness_correction: str
    reduction: str
    refresh_stalest: float
    evict: Evict
    group: torch.distributed.ProcessGroup | None
    placement: str


class NegativeCacheLoss(nn.Module):
    """`step_` on a cache that the module owns.

    The cache is in the module's `state_dict`, and moves and is copied with it, but is not in `buffers()`, see `Cache`.

    Equivalent to `step_(state, queries, documents, encode, scale=scale, **options).loss`, with the rest of what that
    gives in `state` and `metrics`. Where gradients are off, nothing is written.

    Args:
        state: the cache, from `init_cache`, which is the module's from now on: it is written in place.
        scale: of the inner products, above 0.
        learnable_scale: whether the scale is a parameter, its logarithm, `scaling.logarithm` []. With a `group` its
            gradient is averaged over the ranks, for DistributedDataParallel does not know of it.
        **options: those of `step` that stay the same: `num_samples`, `replacement`, `num_draws`, `score_transform`,
            `top_k`, `in_batch`, `share_draws`, `staleness_correction`, `reduction`, `refresh_stalest`, `evict`,
            `group`, `placement`.

    Raises:
        ValueError, TypeError: a state that is none, a scale not above 0, an option that `step` does not have.

    Examples:
        >>> encoder = torch.nn.Linear(3, 4)
        >>> criterion = NegativeCacheLoss(init_cache(8, 4, features=torch.zeros(1, 3)), scale=20.0, num_samples=2)
        >>> for _ in range(2):
        ...     loss = criterion(torch.randn(2, 4), torch.randn(2, 3), encoder)
        ...     loss.backward()
        >>> criterion.metrics["occupancy"]
        tensor(0.2500)
    """

    metrics: dict[str, Tensor]  # 0-d, of the last forward pass, see `step`

    def __init__(
        self,
        state: TensorDictBase,
        *,
        scale: float = 20.0,
        learnable_scale: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__()
        check_options(options)
        self.cache: Cache = Cache(state)
        self.scaling: Scale = Scale(scale, learnable=learnable_scale).to(stored(state, "embedding").device)
        self.options: _Options = _Options(options)
        self.metrics = {}

    @property
    def state(self) -> TensorDictBase:
        """The cache. What is assigned must be a state too: a resized or a prefilled one, say."""
        return self.cache.state

    @state.setter
    def state(self, state: TensorDictBase) -> None:
        check_state(state)
        self.cache.state = state

    @property
    def scale(self) -> float | Tensor:
        """Of the inner products: a number, or a 0-d tensor if it is learnable."""
        return self.scaling()

    def forward(
        self,
        queries: Tensor,
        documents: Features,
        encode: Callable[[Any], Tensor],
        *,
        ids: Tensor | None = None,
        log_weights: Tensor | None = None,
        mask: Tensor | None = None,
        false_negatives: FalseNegatives = NO_FALSE_NEGATIVES,
    ) -> Tensor:
        """The loss: [] or, with reduction "none", [B]. Arguments and errors as those of `step`.

        Args:
            queries: [B, D] embeddings, with gradient.
            documents: features of N documents; row i < B is the positive of query i.
            encode: the document encoder.
            ids: [N] int64 ids of the documents, -1 where anonymous.
            log_weights: [N] floating, added to the documents' scores.
            mask: [N] bool, False for documents not to be cached.
            false_negatives: what else is no negative of a query.
        """
        out = step_(
            self.cache.state,
            queries,
            documents,
            encode,
            scale=self.scaling(self.options.values.get("group")),
            ids=ids,
            log_weights=log_weights,
            mask=mask,
            false_negatives=false_negatives,
            **self.options.values,
        )
        self.metrics = out.metrics
        return out.loss

    def extra_repr(self) -> str:
        """Capacity, dimensions and options, for `print`."""
        capacity, dimensions = stored(self.state, "embedding").shape
        options = "".join(f", {name}={value}" for name, value in self.options.values.items())
        return f"capacity={capacity}, embedding_dim={dimensions}{options}"


class Scale(nn.Module):
    """The scale of inner products, a number or learnable.

    Args:
        scale: above 0.
        learnable: whether its logarithm is a parameter.

    Raises:
        ValueError: a scale that is not above 0.

    Examples:
        >>> Scale(20.0)()
        20.0
        >>> Scale(20.0, learnable=True)().requires_grad
        True
    """

    logarithm: nn.Parameter | None

    def __init__(self, scale: float, *, learnable: bool = False) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}; expected a number above 0")
        self.fixed = scale
        self.logarithm = nn.Parameter(torch.tensor(math.log(scale))) if learnable else None

    def forward(self, group: torch.distributed.ProcessGroup | None = None) -> float | Tensor:
        """The number or, if learnable, a 0-d tensor, whose gradient is averaged over the ranks of the group."""
        if self.logarithm is None:
            return self.fixed
        scale = self.logarithm.exp()
        return scale if group is None else cast(Tensor, _AverageGradient.apply(scale, distribute(group)))

    def extra_repr(self) -> str:
        """The scale, for `print`."""
        return f"{self.fixed}" if self.logarithm is None else f"{float(self.logarithm.detach().exp()):.4g}, learnable"


def check_options(options: StepOptions) -> None:
    """Raises unless all of them are options of `step`."""
    unknown = options.keys() - StepOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"options are {sorted(unknown)}; expected some of {sorted(StepOptions.__annotations__)}")


class _Options:
    """Options that are shared by copies of a module: a process group cannot be copied."""

    def __init__(self, values: StepOptions) -> None:
        self.values = values

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Options":
        return self


class _AverageGradient(torch.autograd.Function):
    """The identity, whose gradient is averaged over the ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ranks = ctx.ranks.afresh()  # what came in the forward pass is no concern here
        return ranks.total(gradients[0]) / ranks.size, None
