"""Figures of recorded runs. matplotlib is imported only here, and only when a figure is drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradguide.utils.atomic import atomic_write

if TYPE_CHECKING:
    from gradguide.recording.history import History

__all__ = ["curve", "draw", "draw_curve", "figure_for", "save_figure", "smoothed"]

_PANELS = {
    "direction_cosine": "cosine with the direction",
    "source_cosine": "cosine with the source",
    "coherence": "coherence",
    "conflict": "conflicts (cumulative)",
    "source_drift": "modelled drift, nats per token",
    "grad_norm": "gradient norm, as received",
    "guided_norm": "gradient norm, guided",
    "clipped_norm": "gradient norm, clipped",
    "update_norm": "update norm",
    "update_factor": "update kept by the bound",
}
_LOGARITHMIC = ("grad_norm", "guided_norm", "clipped_norm", "update_norm")
_NOISY = ("direction_cosine", "source_cosine")
"""Metrics whose line is smoothed, over their own values in a paler colour."""
_WINDOWS = 40
"""Windows of the smoothing in a run. Shorter runs are not smoothed."""


def draw(runs: Mapping[str, History], path: str | os.PathLike[str]) -> None:
    """Draw several runs into one image file: one panel per metric, one line per run. Cosines are smoothed.

    Args:
        runs: histories, by the name shown in the legend.
        path: image file; its suffix sets the format.

    Raises:
        ImportError: matplotlib is not installed (extra ``plot``).
        ValueError: all histories are empty, or the suffix is not an image format.
    """
    if not any(len(history) for history in runs.values()):
        raise ValueError("the histories are empty: nothing was recorded")
    figure = figure_for(path, (18, 6), "gradguide plot")
    lines = {}
    for axes, (key, title) in zip(figure.subplots(2, 5).flat, _PANELS.items(), strict=True):
        for number, (name, history) in enumerate(runs.items()):
            # Fixed colours: a panel may lack an earlier run.
            line = draw_curve(axes, history, key, logarithmic=key in _LOGARITHMIC, label=name, color=f"C{number}")
            if line is not None:
                lines[name] = line
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
    shown = [name for name in runs if name in lines]
    figure.legend([lines[name] for name in shown], shown, loc="outside lower center", ncols=4, fontsize="small")
    save_figure(figure, path, dpi=120)


def figure_for(path: str | os.PathLike[str], size: tuple[float, float], user: str) -> Any:
    """Return an empty ``matplotlib.figure.Figure`` of ``size`` inches that can be saved at ``path``.

    Args:
        user: what needs matplotlib, for the error message.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the suffix is not an image format.
    """
    try:
        # pyplot would choose a backend for the whole process.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'{user} needs matplotlib: pip install "gradguide[plot]"') from error
    figure = Figure(figsize=size, layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise ValueError(f"a plot is saved as one of .{', .'.join(sorted(formats))}, found {os.fspath(path)!r}")
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str], *, dpi: int) -> None:
    """Write a figure to an image file atomically."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def draw_curve(axes: Any, rows: Iterable[Mapping[str, float]], key: str, *, logarithmic: bool, **style: Any) -> Any:
    """Draw a metric and return its line; None if it has no finite value.

    A cosine is smoothed; its values are drawn in a paler colour too. A metric of one source, such as
    ``source_cosine/NAME``, is drawn as that of all.

    Args:
        logarithmic: whether the axis is logarithmic, if all values are positive.
        style: keyword arguments of ``Axes.plot``.
    """
    steps, values = curve(rows, key)
    if not values:
        return None
    means = smoothed(values) if key.partition("/")[0] in _NOISY else values
    (line,) = axes.plot(steps, means, linewidth=1.2, **style)
    if means != values:
        axes.plot(steps, values, linewidth=0.6, alpha=0.3, color=line.get_color(), zorder=line.get_zorder() - 1)
    if key == "update_factor":
        axes.set_ylim(0.0, 1.05)
    if logarithmic and min(values) > 0:
        axes.set_yscale("log")
    return line


def curve(rows: Iterable[Mapping[str, float]], key: str) -> tuple[list[int], list[float]]:
    """Return steps, counted from 1, and values of a metric. Values that are not finite are left out.

    Conflicts are cumulative.
    """
    points = [(step, row[key]) for step, row in enumerate(rows, 1) if math.isfinite(row.get(key, math.nan))]
    values = [value for _, value in points]
    return [step for step, _ in points], list(accumulate(values)) if key.partition("/")[0] == "conflict" else values


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours on both sides, a 40th of the run in all."""
    half, count = len(values) // (2 * _WINDOWS), len(values)
    if half == 0:
        return list(values)
    sums = list(accumulate(values, initial=0.0))  # a window is a difference of two, so long runs take linear time
    bounds = [(max(0, index - half), min(count, index + half + 1)) for index in range(count)]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in bounds]
