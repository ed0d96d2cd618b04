"""All methods, by name."""

from __future__ import annotations

import sys
from pathlib import Path

from examples.benchmarks.methods import OURS, PLAIN, Method
from examples.benchmarks.peers import PEERS

__all__ = ["METHODS", "select"]

METHODS: dict[str, Method] = {method.name: method for method in (*PLAIN, *OURS, *PEERS)}


def select(*, reference: Path | None, compiled: bool) -> list[Method]:
    """Those that were asked for; makes the port importable where its folder is given.

    Raises:
        FileNotFoundError: the folder does not hold the port.
    """
    if reference is not None:
        if not (reference / "negative_cache").is_dir():
            raise FileNotFoundError(f"--reference {reference} does not hold a folder negative_cache")
        if str(reference) not in sys.path:
            sys.path.append(str(reference))
    return [
        method
        for method in METHODS.values()
        if (compiled or not method.compiled) and (reference is not None or not method.name.startswith("port"))
    ]
