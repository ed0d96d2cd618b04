"""For `torch.compile`: compiled steps that are called sooner."""

import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["skip_library_guards"]

_OF_LIBRARIES = re.compile(r"G\['__import_(negcache_fn|tensordict|torch)(_dot_|')")


def skip_library_guards(guards: Sequence[Any]) -> list[bool]:
    """Leaves out checks that a function, class or module of negcache_fn, tensordict or torch is still the same.

    At every call `torch.compile` checks all that its graph was compiled from. For a step these are some thousand
    checks, of which four in ten are of code that nothing replaces. Without them a small step takes about a tenth less
    time, see `docs/performance.md`. The checks of your own code, of all inputs, options and settings stay.

    Use it as `torch.compile(train_step, options={"guard_filter_fn": skip_library_guards})`.

    Args:
        guards: of a graph, as torch passes them to a `guard_filter_fn`.

    Returns:
        For each, whether it stays.
    """
    return [not (_OF_LIBRARIES.search(guard.name) and _is_code(guard)) for guard in guards]


def _is_code(guard: Any) -> bool:
    return guard.has_value and (callable(guard.value) or isinstance(guard.value, ModuleType))
