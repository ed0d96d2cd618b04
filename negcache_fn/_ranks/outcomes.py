"""Work outside a step that may fail on one rank: every rank learns of it at once, and none waits.

For files, which one rank may be unable to write or to see. Arguments of a step go through `agree`.
"""

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

__all__ = ["check_equal", "everywhere", "of_all_ranks", "raise_failures"]

Result = TypeVar("Result")


def of_all_ranks(group: dist.ProcessGroup | None, task: str, function: Callable[[], Result]) -> list[Result]:
    """The results of the function on each rank.

    Args:
        group: the ranks; None: this process alone.
        task: the task that fails with the function, for the message.
        function: returns a small result that can be pickled.

    Raises:
        OSError, ValueError, RuntimeError: on every rank, if the function raised on one of them; names the rank. In a
            single process, the function's own error.
    """
    if group is None:
        return [function()]
    error: Exception | None = None
    result: Any = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    outcomes: list[Any] = [None] * group.size()
    told = None if error is None else (_kind(error), f"{type(error).__name__}: {error}")
    dist.all_gather_object(outcomes, (told, result), group=group)
    failures = {rank: told for rank, (told, _) in enumerate(outcomes) if told is not None}
    if failures:
        _raise(task, failures, error)
    return [result for _, result in outcomes]


def everywhere(group: dist.ProcessGroup | None, task: str, function: Callable[[], Result]) -> Result:
    """The function's result on this rank, if it returns on every rank. Errors are those of `of_all_ranks`."""
    results: list[Result] = []
    of_all_ranks(group, task, lambda: results.append(function()))
    return results[0]


def check_equal(group: dist.ProcessGroup | None, task: str, facts: dict[str, Any]) -> None:
    """Raises ValueError on every rank if one of the facts, which are named, differs between the ranks."""
    of_ranks = of_all_ranks(group, task, lambda: facts)
    for name in facts:
        values = [known.get(name) for known in of_ranks]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"{task}: {name} differs between the ranks of the group: {values}; expected the same on every rank"
            )


def raise_failures(task: str, errors: dict[int, BaseException], alone: bool) -> NoReturn:
    """Raises errors that every rank knows already, by rank."""
    first = next(iter(errors.values()))
    if alone:
        raise first
    _raise(task, {rank: (_kind(error), f"{type(error).__name__}: {error}") for rank, error in errors.items()}, first)


def _raise(task: str, failures: dict[int, tuple[str, str]], cause: BaseException | None) -> NoReturn:
    told = "; ".join(f"rank {rank}: {text}" for rank, (_, text) in sorted(failures.items()))
    kinds = {kind for kind, _ in failures.values()}
    kind = kinds.pop() if len(kinds) == 1 else "RuntimeError"
    errors: dict[str, type[Exception]] = {"OSError": OSError, "ValueError": ValueError}
    raise errors.get(kind, RuntimeError)(f"{task}: {told}") from cause


def _kind(error: BaseException) -> str:
    """The type of the error as another rank raises it."""
    if isinstance(error, OSError):
        return "OSError"
    return "ValueError" if isinstance(error, (ValueError, TypeError)) else "RuntimeError"
