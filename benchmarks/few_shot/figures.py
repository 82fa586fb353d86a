"""The figures of the report, each from the rows of results alone."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd

from benchmarks.few_shot.methods import BASE, HEAD_ONLY

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["by_rate", "by_shots"]

_SHOWN = (BASE, HEAD_ONLY, "L2-SP", "EWC", "A-GEM", "GG direction+magnitude", "GradGuide")
_COLORS = dict(zip(_SHOWN, ("C0", "C1", "C2", "C3", "C5", "C7", "black"), strict=True))
_WIDTH, _HEIGHT, _DPI = 9.0, 4.0, 120


def by_rate(rows: pd.DataFrame, path: Path) -> None:
    """Target and source accuracy over the learning rate, in the transfer scenario."""
    _panels(rows, "lr", "learning rate of the adapter", path, log=10)


def by_shots(rows: pd.DataFrame, path: Path) -> None:
    """Target and source accuracy over the shots, mean over the rates."""
    _panels(rows, "shots", "training rows per class", path, log=2)


def _panels(rows: pd.DataFrame, x: str, label: str, path: Path, log: int) -> None:
    """Means over (set, seed), with 95% intervals of what is left when the level of each set and seed is taken out."""
    figure, axes = plt.subplots(1, 2, figsize=(_WIDTH, _HEIGHT), sharex=True)
    rows = rows[rows["method"].isin(_SHOWN)]
    for axis, column, title in zip(
        axes, ("target_accuracy", "source_accuracy"), ("target accuracy, %", "source accuracy kept, %"), strict=True
    ):
        each = rows.groupby(["method", x, "target", "seed"])[column].mean()
        level = each.groupby(["target", "seed"]).transform("mean")
        for method in _SHOWN:
            if method not in each.index.get_level_values("method"):
                continue
            mean = each[method].groupby(level=0).mean()
            spread = (each - level)[method].groupby(level=0).agg(["std", "count"])
            half = 1.96 * spread["std"] / spread["count"] ** 0.5
            color = _COLORS[method]
            axis.plot(mean.index, mean, marker="o", markersize=3, label=method, color=color)
            axis.fill_between(mean.index, mean - half, mean + half, alpha=0.12, color=color, linewidth=0)
        axis.set_xscale("log", base=log)
        axis.set_xlabel(label)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
