"""How the results name what was asked: described in plain values, and by a key that is a hash of the description.

Results are found by their key, the published ones too. So a description is flat and under the names that it had when
they were made, whatever the fields of `Method` and `StepOptions` are called now.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from typing import Any

from examples.experiments.methods import Method
from negcache_fn import StepOptions

__all__ = ["described", "key_of"]

_PUBLISHED_OPTIONS = ("in_batch", "share_draws", "staleness_correction", "evict")
"""Described whatever they are; options that the published lines do not have are described where they are changed."""
_GONE = {"num_draws": None, "replacement": True}
"""Options of the published lines that the library has no more, with the values that it has now: another `num_draws` and
draws of each query without replacement."""


def described(asked: Any) -> Any:
    """What is asked, as plain values: of a dataclass its fields by name."""
    if isinstance(asked, Method):
        return _described_method(asked)
    if is_dataclass(asked):
        return _described_fields(asked)
    if isinstance(asked, dict):
        return {name: described(value) for name, value in asked.items()}
    return [described(value) for value in asked] if isinstance(asked, list | tuple) else asked


def key_of(asked: Any) -> str:
    """The same for what is the same under other names."""
    text = json.dumps(_without_names(described(asked)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _described_fields(asked: Any) -> dict[str, Any]:
    return {field.name: described(getattr(asked, field.name)) for field in fields(asked)}


def _described_method(method: Method) -> dict[str, Any]:
    written = _described_fields(method)
    options, defaults = written.pop("options"), _described_fields(StepOptions())
    samples, draws = options.pop("draws_per_query"), options.pop("num_draws")
    published = {
        "num_samples": samples or 1,
        **_GONE,
        "refresh_stalest": options.pop("refresh_stalest") or 0.0,
        **{name: options.pop(name) for name in _PUBLISHED_OPTIONS},
    }
    changed = {name: value for name, value in options.items() if value != defaults[name]}
    if method.loss == "cache" and method.options.for_batch:
        changed["drawn_for_batch"] = draws or method.options.draws_for(method.batch)
    return {**written, **published, **changed}


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_names(inner) for key, inner in value.items() if key not in ("name", "label")}
    return [_without_names(inner) for inner in value] if isinstance(value, list) else value
