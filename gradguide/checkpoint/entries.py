"""The entries that GradGuide adds to a parameter's state: their keys, and the numbers of a counters tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradguide.rules.decide import STATISTICS

__all__ = [
    "COUNTERS",
    "DIRECTION",
    "FORMAT",
    "HEAD",
    "PREFIX",
    "convert_counters",
    "make_counters",
    "own_names",
    "passed_through_base",
    "statistics_of",
]

PREFIX = "gradguide."
DIRECTION = "gradguide.direction"
COUNTERS = "gradguide.counters"

FORMAT = 2
"""Increase this with each change of ``STATISTICS``, and add the names of the format before to ``_OLDER``."""

HEAD = 3
"""A counters tensor is [format, steps, skipped, *STATISTICS of the parameter's scope]."""

_OLDER: dict[int, tuple[str, ...]] = {1: ("mass", "square", "unused", "unused", "unused")}
"""The names of the statistics in older formats. Those that are not in ``STATISTICS`` are not read any more."""


def own_names(entry: object) -> set[str]:
    """Return GradGuide's keys in the entry of a parameter, or in anything else that a base keeps."""
    names = entry if isinstance(entry, Mapping) else ()
    return {name for name in names if isinstance(name, str) and name.startswith(PREFIX)}


def passed_through_base(entry: Mapping[Any, Any]) -> bool:
    """Return whether a base loaded an own entry, and then went on alone: its loader casts to the parameter's dtype."""
    counters = entry.get(COUNTERS)
    if type(counters) is not Tensor or not counters.is_floating_point() or counters.dtype == torch.float64:
        return False
    # Anything else is damaged, and refused where it is read.
    if counters.dim() != 1 or len(counters) == 0 or not bool(counters[0].isfinite()):
        return False
    return len(counters) == HEAD + len(statistics_of(int(counters[0])))


def statistics_of(version: int) -> tuple[str, ...]:
    """Return the names of the statistics in a counters tensor of a format."""
    return _OLDER.get(version, STATISTICS)


def make_counters(totals: Tensor, statistics: Tensor) -> Tensor:
    """Return a counters tensor on the host from totals [2] and the statistics of a scope [len(STATISTICS)]."""
    return torch.cat([torch.tensor([FORMAT], dtype=torch.float64), totals.cpu(), statistics.cpu()])


def convert_counters(counters: Tensor) -> Tensor:
    """Return a counters tensor [HEAD + len(STATISTICS)] from one of any format. A statistic that it lacks is 0."""
    saved = dict(zip(statistics_of(int(counters[0])), counters[HEAD:], strict=True))
    return torch.stack([*counters[:HEAD], *(saved.get(name, torch.zeros_like(counters[0])) for name in STATISTICS)])
