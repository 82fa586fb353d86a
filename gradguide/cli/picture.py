"""The picture of ``gradguide inspect --adapter ... --plot``: drift by layer."""

from __future__ import annotations

import os
from typing import Any

from gradguide.recording.plotting import figure_for, save_figure

__all__ = ["draw_drift"]


def draw_drift(drift: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the drift of an adapter into an image file: one line per kind of layer, such as ``q_proj``, over the blocks.

    Args:
        drift: the result of ``modelled_drift`` in ``inspect_stored`` or ``inspect_structured``.
        path: image file; its suffix sets the format.

    Raises:
        ImportError: matplotlib is not installed (extra ``plot``).
        ValueError: the suffix is not an image format, or the source is of ``anchored()``.
    """
    structured = "modelled_kl" in drift
    key = "modelled_kl" if structured else "modelled_rise"
    if drift[key] is None:
        raise ValueError("a source of anchored() has no Fisher information to draw: give the file of its origin")
    lines: dict[str, list[tuple[int, float]]] = {}
    for place, layer in enumerate(drift["layers"]):
        parts = layer["layer"].split(".")
        number = next((int(part) for part in parts if part.isdecimal()), place)
        lines.setdefault(parts[-1], []).append((number, layer[key]))
    figure = figure_for(path, (10, 5), "gradguide inspect --plot")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
    if all(value > 0 for points in lines.values() for _, value in points):
        axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block")
    axes.set_ylabel("modelled drift, nats per token" if structured else "modelled rise of the loss, nats")
    axes.set_title(f"{os.path.basename(drift['path'])}: {drift[key]:.4g} in total", fontsize=10)  # noqa: PTH119
    figure.legend(loc="outside lower center", ncols=7, fontsize="small")
    save_figure(figure, path, dpi=120)
