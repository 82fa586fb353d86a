"""The figures of the report, each from the rows of results alone."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd

from benchmarks.few_shot.methods import BASE, HEAD_ONLY

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["by_rate", "by_shots"]

_SHOWN = (BASE, HEAD_ONLY, "L2-SP", "EWC", "A-GEM", "GG direction+magnitude", "GG projected", "GradGuide")
_WIDTH, _HEIGHT, _DPI = 9.0, 3.6, 120


def by_rate(rows: pd.DataFrame, path: Path) -> None:
    """Target and source accuracy over the learning rate, in the transfer scenario; bands: 95% intervals of means."""
    _panels(rows, "lr", "learning rate of the adapter", path, log=10)


def by_shots(rows: pd.DataFrame, path: Path) -> None:
    """Target and source accuracy over the shots, mean over the grid of rates."""
    _panels(rows, "shots", "training rows per class", path, log=2)


def _panels(rows: pd.DataFrame, x: str, label: str, path: Path, log: int) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(_WIDTH, _HEIGHT), sharex=True)
    for axis, column, title in zip(
        axes, ("target_accuracy", "source_accuracy"), ("target accuracy, %", "source accuracy kept, %"), strict=True
    ):
        for method in _SHOWN:
            each = rows[rows["method"] == method].groupby([x, "target", "seed"])[column].mean()
            if each.empty:
                continue
            grouped = each.groupby(level=0)
            mean, half = grouped.mean(), 1.96 * grouped.std() / grouped.count() ** 0.5
            axis.plot(mean.index, mean, marker="o", markersize=3, label=method)
            axis.fill_between(mean.index, mean - half, mean + half, alpha=0.15)
        axis.set_xscale("log", base=log)
        axis.set_xlabel(label)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
