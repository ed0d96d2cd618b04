"""Checks at the public boundary. They read metadata only, so they cost nothing and compile away.

Each message names the argument, the given value and the expected one.
"""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "check_choice",
    "check_embeddings",
    "check_encoder",
    "check_flag",
    "check_hardness",
    "check_ids",
    "check_positive_rows",
    "check_rows",
    "check_scale",
    "check_size",
    "check_slots",
    "check_transforms",
    "device_named",
    "transforms_around",
]


def check_size(name: str, value: Any, *, least: int = 1, most: int | None = None) -> None:
    """Raises unless `value` is an integer in `least ... most`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected an integer")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"in {least} ... {most}"
        raise ValueError(f"{name} is {value}; expected {bounds}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_flag(name: str, value: Any) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected True or False")


def check_hardness(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number of at least 0")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value}; expected a number of at least 0")


def check_embeddings(
    name: str, value: Any, like: Tensor, *, of: str = "", rows: int | None = None, at_least: int = 1
) -> None:
    """Raises unless `value` is a floating [rows, D] tensor with the D and device of `like` [C, D]; `of` names it."""
    _check_tensor(name, value)
    dim = like.shape[-1]
    if value.ndim != 2 or value.shape[1] != dim or (rows is not None and value.shape[0] != rows):
        count = "rows" if rows is None else rows
        whose = f", where {dim} is the D of {of}" if of else ""
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected [{count}, {dim}]{whose}")
    if value.shape[0] < at_least:
        raise ValueError(f"{name} has {value.shape[0]} rows; expected at least {at_least}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}; expected a floating dtype")
    _check_device(name, value, like.device)


def check_encoder(encode: Any) -> None:
    """Raises unless `encode` can be called."""
    if not callable(encode):
        raise TypeError(f"encode is a {type(encode).__name__}; expected a function of features, such as a module")


def check_rows(name: str, value: Any, dtype: torch.dtype | None, rows: int, device: torch.device) -> None:
    """Raises unless `value` is a [rows] tensor of `dtype` (of any floating dtype where that is None)."""
    _check_tensor(name, value)
    if value.shape != (rows,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected [{rows}], one per document")
    if dtype is None and not value.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}; expected a floating dtype")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; expected {dtype}")
    _check_device(name, value, device)


def check_ids(name: str, value: Any, queries: Tensor) -> None:
    """Raises unless `value` is int64, [P] for all queries or [B, P] for each."""
    _check_tensor(name, value)
    rows = queries.shape[0]
    if value.ndim not in (1, 2) or (value.ndim == 2 and value.shape[0] != rows):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected [P] for all queries or [{rows}, P] for each")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {value.dtype}; expected torch.int64")
    _check_device(name, value, queries.device)


def check_positive_rows(value: Any, queries: Tensor, documents: int) -> None:
    """Raises unless `value` is int64 [B, P], of so many rows.

    Values are read where that is free, on the CPU and outside a graph: a rank that fails later leaves others waiting.
    """
    _check_tensor("positive_rows", value)
    rows = queries.shape[0]
    if value.ndim != 2 or value.shape[0] != rows or value.shape[1] == 0:
        raise ValueError(f"positive_rows has shape {tuple(value.shape)}; expected [{rows}, P], rows of the documents")
    if value.dtype != torch.int64:
        raise TypeError(f"positive_rows has dtype {value.dtype}; expected torch.int64")
    _check_device("positive_rows", value, queries.device)
    free = value.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms_around()
    if free and value.numel() > 0 and int(value.max()) >= documents:
        raise ValueError(f"positive_rows has the row {int(value.max())}; expected rows below {documents}, -1 for none")


def check_slots(name: str, value: Any, device: torch.device) -> None:
    """Raises unless `value` is an int64 tensor."""
    _check_tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {value.dtype}; expected torch.int64")
    _check_device(name, value, device)


def check_scale(scale: Any, device: torch.device, *, name: str = "scale") -> None:
    """Raises unless `scale` is a number or a 0-d floating tensor."""
    if isinstance(scale, Tensor):
        if scale.ndim != 0:
            raise ValueError(f"{name} has shape {tuple(scale.shape)}; expected a number or a 0-d tensor")
        if not scale.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {scale.dtype}; expected a number or a 0-d floating tensor")
        _check_device(name, scale, device)
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} is a {type(scale).__name__}; expected a number or a 0-d tensor")


def device_named(name: str, value: Any) -> torch.device:
    """The device that `value` names."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name} is {value!r}; expected a torch.device, or its name such as 'cuda:0'") from error


def check_transforms(function: str, *differentiated: Any, vmap: bool = False) -> None:
    """Raises under a transform of torch.func that the function does not take, see `transforms_around`.

    That is forward mode, vmap unless it is allowed, and grad if it differentiates one of these arguments.
    """
    refused = ["jvp"] if vmap else ["jvp", "vmap"]
    if any(isinstance(value, Tensor) and value.requires_grad and _is_wrapped(value) for value in differentiated):
        refused.append("grad")
    for transform in transforms_around():
        if transform in refused:
            around = (
                "forward-mode differentiation (torch.func.jvp)" if transform == "jvp" else f"torch.func.{transform}"
            )
            raise ValueError(
                f"{function} is called under {around}, which does not get its derivatives; expected plain reverse "
                f"mode: loss.backward() or torch.autograd.grad(...). exact_loss takes it, if there is no group"
            )


def transforms_around() -> list[str]:
    """The transforms of torch.func around this call: of "grad", "vmap" and "jvp", which is all forward-mode AD."""
    # There is no public way to ask. In a graph this sees forward mode only; unsupported code raises there anyway.
    found = ["jvp"] if forward_ad._current_level >= 0 else []  # pyright: ignore[reportPrivateUsage] - no public way
    if not torch.compiler.is_compiling():
        stack = cast(Any, torch._C)._functorch.get_interpreter_stack()  # pyright: ignore[reportPrivateUsage] - no public way
        names = [interpreter.key().name.lower() for interpreter in stack or ()]
        found += [name for name in names if name in ("grad", "vmap")]
    return found


def _is_wrapped(value: Tensor) -> bool:
    """Whether a transform of torch.func holds the tensor."""
    if torch.compiler.is_compiling():
        return False
    return cast(Any, torch._C)._functorch.is_functorch_wrapped_tensor(value)  # pyright: ignore[reportPrivateUsage] - no public way


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor")


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; expected {device}, the device of the rest")
