"""Operators: functions that a compiler calls without looking inside.

`torch.library.custom_op` makes the same ones with wrappers that take 5 microseconds of each call, of which a small step
makes ten.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

__all__ = ["operator"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_LIBRARIES: dict[str, torch.library.Library] = {}  # an operator lives as long as its library


def operator(
    name: str,
    *,
    fake: Callable[..., object],
    schema: str | None = None,
    gradient: Callable[..., object] | None = None,
    keep: Callable[..., None] | None = None,
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorates a function: it becomes the operator `negcache_fn::name`, which is called like it.

    The function changes no argument, unless the schema says so, and no result shares memory with one.

    Args:
        name: of the operator.
        fake: the function for tensors that have a shape and no numbers.
        schema: of arguments and results; by default from the function's annotations.
        gradient: of the arguments, from a context and the gradients of the results. Without it the operator must be
            called where no gradient is wanted.
        keep: saves what `gradient` needs, from a context, the arguments and the results.
    """

    def register(function: Callable[_P, _R]) -> Callable[_P, _R]:
        _LIBRARIES.pop(name, None)  # of a module that is loaded again
        library = _LIBRARIES[name] = torch.library.Library("negcache_fn", "FRAGMENT")
        signature = torch.library.infer_schema(function, mutates_args=()) if schema is None else schema
        library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        # A compiler must not look inside either where a call is not in a graph.
        library.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"negcache_fn::{name}", fake, lib=library)
        if gradient is not None:
            torch.library.register_autograd(f"negcache_fn::{name}", gradient, setup_context=keep, lib=library)
        return cast("Callable[_P, _R]", getattr(torch.ops.negcache_fn, name).default)

    return register
