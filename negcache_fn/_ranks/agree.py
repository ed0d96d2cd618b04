"""Agreement of the ranks before anything is sent, and errors of one rank raised on all of them.

Every function with a `group` checks its arguments inside `checking_arguments` and then calls `check_ranks_agree`. So an
argument that is invalid on one rank, or that differs between the ranks, is an error on every rank: no rank waits for a
message that never comes, or mistakes another message for it.
"""

import math
import zlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from negcache_fn._operators import operator
from negcache_fn._options import StepOptions
from negcache_fn._ranks.group import SHARD_MULTIPLE, Ranks, Shards, unsharded
from negcache_fn._ranks.operators import gather_into, group_named

__all__ = ["check_ranks_agree", "checking_arguments", "device_of", "raise_for_others"]

_PROBES = (-100.0, -30.0, -1.0, -0.1, 0.0, 0.1, 1.0, 30.0, 100.0)  # scores at which transforms are compared
_TOLERANCE = 1e-3  # of the transformed: GPUs of different kinds may round differently
_HEAD = ("failed", "digest", "capacity", "seed", "step")
_ROW = len(_HEAD) + 1 + len(_PROBES)  # numbers that each rank sends, followed by the scale and the transformed scores


def checking_arguments(ranks: Ranks) -> AbstractContextManager[None]:
    """A context for the checks of arguments: an error on one rank is raised on every rank, and no rank waits."""
    if ranks.name is None or torch.compiler.is_compiling():
        return nullcontext()
    return _Announcing(ranks)


def check_ranks_agree(
    ranks: Ranks,
    tensor: Tensor,
    capacity: int,
    *,
    function: str,
    name: str = "queries",
    options: StepOptions | None = None,
    scale: float | Tensor = 1.0,
    seed_and_step: tuple[Tensor, Tensor] | None = None,
    rows: Mapping[str, Tensor | None] | Iterable[tuple[str, Tensor | None]] = (),
    numbers: dict[str, int] | None = None,
    choices: dict[str, Any] | None = None,
) -> tuple[Tensor, Shards]:
    """Makes sure, before anything else is sent, that all ranks are about to do the same.

    Args:
        ranks: the ranks of the group.
        tensor: [rows, D]. All later messages derive from it, so that the check cannot be reordered behind them.
        capacity: slots of this rank.
        function: the called function.
        name: name of `tensor`, for messages.
        options: must be equal; the cache is sharded unless they make it replicated.
        scale: must be equal.
        seed_and_step: of the cache, if there is one.
        rows: further tensors whose rows are sent, by name: dtypes and row shapes must be equal, and whether there is a
            gradient to send back.
        numbers: further integers that must be equal, by name.
        choices: further constants that must be equal, by name.

    Returns:
        `tensor`, and the place of the slots.

    Raises:
        ValueError: on every rank, if anything differs, or the shards cannot form one cache.
    """
    if ranks.name is None:
        return tensor, unsharded(capacity)
    options = StepOptions() if options is None else options
    counted = {"embedding_dim": tensor.shape[-1], **options.named_numbers(), **(numbers or {})}
    chosen = {"function": function, **options.named_choices(), **(choices or {}), **_of_rows(name, tensor)}
    if isinstance(scale, Tensor) and torch.is_grad_enabled() and scale.requires_grad:
        chosen["scale.requires_grad"] = True
    for its_name, sent in dict(rows).items():
        if sent is not None:
            counted |= {f"{its_name}.shape[{place}]": size for place, size in enumerate(sent.shape[1:], start=1)}
            chosen |= _of_rows(its_name, sent)
    with checking_arguments(ranks):
        transformed = _transformed(options, scale, tensor.device)
    marks = tensor.new_zeros(2, dtype=torch.int64) if seed_and_step is None else torch.stack(seed_and_step)
    tensor, capacities = _agree_op(
        tensor,
        marks,
        transformed,
        capacity,
        "\n".join(counted),  # an operator takes no lists of strings
        list(counted.values()),
        "\n".join(f"{name}\t{value}" for name, value in chosen.items()),
        options.replicated,
        ranks.name,
    )
    if options.replicated:
        return tensor, unsharded(capacity)
    return tensor, Shards(ranks, capacities[0] * ranks.rank, capacities[0], capacities.sum())


def _of_rows(name: str, tensor: Tensor) -> dict[str, Any]:
    """The kind of a tensor whose rows are sent."""
    kind = {f"{name}.dtype": tensor.dtype}
    return kind | {f"{name}.requires_grad": True} if torch.is_grad_enabled() and tensor.requires_grad else kind


def _transformed(options: StepOptions, scale: float | Tensor, device: torch.device) -> Tensor:
    """[1 + probes] float64: the scale, and the transform of some scores."""
    probes = torch.tensor(_PROBES, device=device)
    with torch.no_grad():  # compared, not trained
        made: Any = options.transformed(probes)  # any result of a user's function
        if not isinstance(made, Tensor) or made.shape != probes.shape:
            found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(f"score_transform gave {found} for {tuple(probes.shape)}; expected one number for each")
        scale = scale.double() if isinstance(scale, Tensor) else torch.full_like(probes[0], scale, dtype=torch.float64)
        return torch.cat([scale.view(1), made.double()])


class _Announcing:
    """Reports an error of this rank to the others, which receive it in `check_ranks_agree`."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            group = group_named(cast(str, self.ranks.name))
            _gather_rows(torch.tensor([1] + [0] * (_ROW - 1), device=device_of(group)), group)
            raise_for_others(group, error)


def _fake_agreement(*arguments: Any) -> tuple[Tensor, Tensor]:
    tensor, marks, *_, name = arguments
    return torch.empty_like(tensor), marks.new_empty(dist.get_world_size(group_named(name)))


def _identity_gradient(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return gradient, None, None, None, None, None, None, None, None


@operator("agree", fake=_fake_agreement, gradient=_identity_gradient)
def _agree_op(
    tensor: Tensor,
    marks: Tensor,
    transformed: Tensor,
    capacity: int,
    names: str,
    numbers: list[int],
    texts: str,
    replicated: bool,
    name: str,
) -> tuple[Tensor, Tensor]:
    group = group_named(name)
    digest = zlib.crc32(repr((names, numbers, texts)).encode())
    head = torch.tensor([0, digest, capacity], device=marks.device)
    rows = _gather_rows(torch.cat([head, marks, transformed.view(torch.int64)]), group)
    failed, digests, capacities, seeds, steps, *_ = cast("list[list[int]]", rows.t().tolist())
    if any(failed):
        raise_for_others(group, None)
    if len(set(digests)) > 1:
        mine = dict(zip(names.split("\n"), map(str, numbers), strict=True))
        mine |= {text.split("\t")[0]: text.split("\t")[1] for text in texts.split("\n")}
        _raise_if_different(_gather_objects(mine, group))
    _raise_if_different([{"seed": str(seed), "step": str(step)} for seed, step in zip(seeds, steps, strict=True)])
    _check_transformed(cast("list[list[float]]", rows[:, len(_HEAD) :].contiguous().view(torch.float64).tolist()))
    _check_capacities(capacities, replicated)
    return tensor.clone(), rows[:, _HEAD.index("capacity")].clone()


def _raise_if_different(of_ranks: list[dict[str, str]]) -> None:
    """ValueError with everything that differs between the ranks."""
    names = list(dict.fromkeys(name for known in of_ranks for name in known))
    values = {name: [known.get(name, "nothing") for known in of_ranks] for name in names}
    different = [name for name in names if len(set(values[name])) > 1]
    told = [
        f"{name} differs between the ranks of the group: [{', '.join(values[name])}]{_remedy(name, different)}"
        for name in different
    ]
    if told:
        raise ValueError(f"{'; '.join(told)}; expected the same on every rank")


def _remedy(name: str, different: list[str]) -> str:
    if name == "loss":
        return (
            " (numbers in the order in which losses were made; the batches of the ranks are of data sets with other "
            "losses: give these one loss, or losses without gather_across_devices and learnable_scale)"
        )
    if name == "queries":
        return " (drop_last=True, or pad the last batch)"
    if name == "documents" and "queries" not in different:
        return " (the batch of each rank needs equally many further documents, such as hard negatives)"
    if name.startswith("features") and ".shape" in name:
        return " (give init_cache an example of one width on every rank)"
    return ""


def _check_transformed(of_ranks: list[list[float]]) -> None:
    scales = [values[0] for values in of_ranks]
    if len({repr(scale) for scale in scales}) > 1:
        raise ValueError(
            f"scale differs between the ranks of the group: {scales}; expected the same on every rank (of a learnable "
            f"one, average the gradient: negcache_fn.distributed.average_gradients)"
        )
    for probe, *values in zip(_PROBES, *(values[1:] for values in of_ranks), strict=True):
        if not all(_close(value, values[0]) for value in values):
            raise ValueError(
                f"the score transform gives {values} for {probe} on the ranks of the group; expected the same function "
                f"on every rank"
            )


def _close(value: float, other: float) -> bool:
    return math.isclose(value, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE) or (
        math.isnan(value) and math.isnan(other)
    )


def _check_capacities(capacities: list[int], replicated: bool) -> None:
    chunk, last = capacities[0], capacities[-1]
    if replicated:
        if len(set(capacities)) > 1:
            raise ValueError(f"the caches of the ranks have {capacities} slots; expected the same on every rank")
        return
    equal = all(part == chunk for part in capacities[:-1]) and last <= chunk
    if not equal or chunk % SHARD_MULTIPLE or last % SHARD_MULTIPLE:
        raise ValueError(
            f"the shards of the ranks have {capacities} slots; expected multiples of {SHARD_MULTIPLE}, the same on "
            f"every rank but the last, which may have fewer: negcache_fn.distributed.local_capacity(...) gives them"
        )


def device_of(group: dist.ProcessGroup) -> torch.device:
    """The device from which this process can send numbers."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _gather_rows(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n] -> [ranks, n]."""
    rows = row.new_empty(group.size() * row.shape[0])
    gather_into(rows, row, group=group)
    return rows.view(group.size(), row.shape[0])


def _gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def raise_for_others(
    group: dist.ProcessGroup, error: Exception | None, what: str = "an argument on another rank of the group is invalid"
) -> None:
    """Called by every rank, if one has an error: the ranks without one raise those of the others."""
    text = None if error is None else f"{type(error).__name__}: {error}"
    errors = cast("list[str | None]", _gather_objects(text, group))
    if error is None:
        told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None)
        raise ValueError(f"{what}. {told}")
