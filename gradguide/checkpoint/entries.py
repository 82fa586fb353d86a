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
    "SCOPE",
    "SOURCES",
    "convert_counters",
    "make_counters",
    "numbers_of",
    "own_names",
    "passed_through_base",
    "statistics_of",
]

PREFIX = "gradguide."
DIRECTION = "gradguide.direction"
COUNTERS = "gradguide.counters"

FORMAT = 2
"""Increase this with each change of the numbers, and add the names of the format before to ``_OLDER``."""

HEAD = 3
"""A counters tensor is [format, steps, skipped, *STATISTICS of the parameter's scope, sources, scope]."""

SOURCES = -2
"""Place of the number of sources that the optimizer had; 0 if it is not known."""

SCOPE = -1
"""Place of the number of the parameter's scope, from 1; 0 if it is not known."""

_OLDER: dict[int, tuple[str, ...]] = {1: ("mass", "square", "unused", "unused", "unused")}
"""The names of the numbers in older formats. Those that the present format lacks are not read any more."""


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
    return len(counters) == HEAD + len(numbers_of(int(counters[0])))


def numbers_of(version: int) -> tuple[str, ...]:
    """Return the names of the numbers behind the head in a counters tensor of a format."""
    return _OLDER.get(version, (*STATISTICS, "sources", "scope"))


def statistics_of(counters: Tensor) -> Tensor:
    """Return the part of a counters tensor that holds the statistics, as a view: Tensor [len(STATISTICS)]."""
    return counters[HEAD : HEAD + len(STATISTICS)]


def make_counters(totals: Tensor, statistics: Tensor, sources: int, scope: int) -> Tensor:
    """Return a counters tensor on the host.

    Args:
        totals: steps and skipped steps: Tensor [2].
        statistics: those of the parameter's scope: Tensor [len(STATISTICS)].
        sources: number of sources.
        scope: number of the parameter's scope.
    """
    version, numbers = (torch.tensor(values, dtype=torch.float64) for values in ([FORMAT], [sources, scope]))
    return torch.cat([version, totals.cpu(), statistics.cpu(), numbers])


def convert_counters(counters: Tensor) -> Tensor:
    """Return a counters tensor of the present format from one of any format. A number that it lacks is 0."""
    saved = dict(zip(numbers_of(int(counters[0])), counters[HEAD:], strict=True))
    zero = torch.zeros_like(counters[0])
    return torch.stack([*counters[:HEAD], *(saved.get(name, zero) for name in numbers_of(FORMAT))])
