"""Means over seeds and how sure they are."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

__all__ = ["Interval", "mean_of", "ratio_of"]


class Interval(NamedTuple):
    """A mean with half the width of its 95 % interval (Student's t; not a number for one value)."""

    mean: float
    margin: float


def mean_of(values: list[float]) -> Interval:
    """Of independent values. Of paired differences it is the paired interval."""
    count = len(values)
    margin = student.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count) if count > 1 else math.nan
    return Interval(float(np.mean(values)), float(margin))


def ratio_of(numerators: list[float], denominators: list[float]) -> Interval:
    """Mean of the numerators over mean of the denominators, paired; the interval by linearising the ratio."""
    below = float(np.mean(denominators))
    if below == 0:
        return Interval(math.nan, math.nan)
    ratio = float(np.mean(numerators)) / below
    residuals = [one - ratio * other for one, other in zip(numerators, denominators, strict=True)]
    return Interval(ratio, mean_of(residuals).margin / abs(below))
