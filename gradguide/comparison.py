"""Several recorded runs in one figure: ``gradguide plot``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

from gradguide.atomic import replacing
from gradguide.history import History

__all__ = ["draw"]

_PANELS = {
    "direction_cosine": "cosine with the direction",
    "source_cosine": "cosine with the source",
    "coherence": "coherence",
    "grad_norm": "gradient norm, as received",
    "update_norm": "update norm",
    "conflict": "conflicts (cumulative)",
}
_LOGARITHMIC = ("grad_norm", "update_norm")


def draw(runs: Mapping[str, History], path: str | os.PathLike[str]) -> None:
    """One panel per metric, one line per run, to an image file (needs the extra ``plot``).

    Args:
        runs: histories by the name that the legend gives them.
        path: an image file; its suffix says which kind.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no run has a row, or the suffix is no image format.
    """
    if not any(len(history) for history in runs.values()):
        raise ValueError("the histories are empty: nothing was recorded")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('gradguide plot needs matplotlib: pip install "gradguide[plot]"') from error
    figure = Figure(figsize=(12, 6), layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in kinds:
        raise ValueError(f"a plot is saved as one of .{', .'.join(sorted(kinds))}, found {os.fspath(path)!r}")
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
        for name, history in runs.items():
            points = [(step, row.get(key, math.nan)) for step, row in enumerate(history, 1)]
            steps = [step for step, value in points if math.isfinite(value)]
            values = [value for _, value in points if math.isfinite(value)]
            if values:
                axes.plot(steps, list(accumulate(values)) if key == "conflict" else values, label=name, linewidth=1.2)
            if values and key in _LOGARITHMIC and min(values) > 0:
                axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
    handles, labels = next(iter(figure.axes)).get_legend_handles_labels()
    for axes in figure.axes:  # the first panel may be one that no run has
        handles, labels = max((handles, labels), axes.get_legend_handles_labels(), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
