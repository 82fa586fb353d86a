"""Paired differences and their t-interval; the few lines of statistics that the report needs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Interval", "paired_difference", "t_quantile"]


class Interval(NamedTuple):
    """A mean with the half width of its 95 % t-interval; nan for a single pair."""

    mean: float
    half_width: float


def paired_difference(ours: Sequence[float], base: Sequence[float]) -> Interval:
    """Mean of ours - base over pairs, with its 95 % interval."""
    differences = [a - b for a, b in zip(ours, base, strict=True)]
    count = len(differences)
    if count < 2:
        return Interval(statistics.fmean(differences), math.nan)
    error = statistics.stdev(differences) / math.sqrt(count)
    return Interval(statistics.fmean(differences), t_quantile(count - 1) * error)


def t_quantile(freedom: int, share: float = 0.95) -> float:
    """The t with ``share`` of Student's distribution in [-t, t]; ``freedom`` is a whole number, at least 1.

    By bisection on the closed form of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2  # angles, atan(t / sqrt(freedom))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, freedom) < share else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _central(angle: float, freedom: int) -> float:
    odd = freedom % 2 == 1
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= power / (power + 1) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
