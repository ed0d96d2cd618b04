"""Keywords of a step, flat, as tests vary them: one dictionary for constant options and facts of a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import negcache_fn

_NAMES = {field.name for field in dataclasses.fields(negcache_fn.StepOptions)}


def step_keywords(**keywords: Any) -> dict[str, Any]:
    """The same keywords with those that are options gathered into `options`."""
    options = {name: value for name, value in keywords.items() if name in _NAMES}
    facts = {name: value for name, value in keywords.items() if name not in _NAMES}
    return facts | {"options": negcache_fn.StepOptions(**options)}
