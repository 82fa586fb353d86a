"""What the figures of recorded runs share: a figure for a path, and the curve of a metric."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

__all__ = ["curve", "figure_for"]


def figure_for(path: str | os.PathLike[str], size: tuple[float, float], user: str) -> Any:
    """An empty figure of ``size`` inches that can be saved at ``path``; ``user`` is who needs it, for the error.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the suffix is no image format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'{user} needs matplotlib: pip install "gradguide[plot]"') from error
    figure = Figure(figsize=size, layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in kinds:
        raise ValueError(f"a plot is saved as one of .{', .'.join(sorted(kinds))}, found {os.fspath(path)!r}")
    return figure


def curve(rows: Iterable[Mapping[str, float]], key: str) -> tuple[list[int], list[float]]:
    """Steps, counted from 1, and values of a metric where it was measured; conflicts are added up."""
    points = [(step, row[key]) for step, row in enumerate(rows, 1) if math.isfinite(row.get(key, math.nan))]
    values = [value for _, value in points]
    return [step for step, _ in points], list(accumulate(values)) if key == "conflict" else values
