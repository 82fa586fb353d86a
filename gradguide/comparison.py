"""Several recorded runs in one figure: ``gradguide plot``."""

from __future__ import annotations

import os
from collections.abc import Mapping

from gradguide.drawing import curve, figure_for
from gradguide.recording.history import History
from gradguide.utils.atomic import replacing

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
    figure = figure_for(path, (12, 6), "gradguide plot")
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
        for name, history in runs.items():
            steps, values = curve(history, key)
            if values:
                axes.plot(steps, values, label=name, linewidth=1.2)
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
