"""The figure of the report: accuracies of each seed, and coherence over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradguide.utils.atomic import replacing

from .adapt import Outcome

__all__ = ["draw_figure"]


def draw_figure(path: Path, results: Mapping[str, Sequence[Outcome]], source_accuracy: float) -> None:
    """Writes a PNG. A seed's dots are joined by a line; each method's coherence is a mean with thin lines per seed.

    Args:
        path: ends in ``.png``.
        results: outcomes by method, in the order of the seeds.
        source_accuracy: before adaptation, in [0, 1]; drawn as a dashed line.
    """
    # Not pyplot: it would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    target, source, steps = figure.subplots(1, 3)
    _dots(target, "target accuracy (%)", results, "target_accuracy")
    _dots(source, "source accuracy kept (%)", results, "source_accuracy")
    source.axhline(100 * source_accuracy, color="grey", linestyle="--", linewidth=1, label="before adaptation")
    source.legend(frameon=False)
    for place, (method, outcomes) in enumerate(results.items()):
        runs = [outcome.coherence for outcome in outcomes]
        axis = range(1, len(runs[0]) + 1)
        for run in runs:
            steps.plot(axis, run, color=f"C{place}", alpha=0.25, linewidth=0.8)
        mean = [sum(values) / len(values) for values in zip(*runs, strict=True)]
        steps.plot(axis, mean, color=f"C{place}", linewidth=2, label=method)
    steps.set(title="gradient coherence", xlabel="step", ylim=(0, 1.02))
    steps.legend(frameon=False)
    with replacing(path) as partial:
        canvas.print_png(str(partial))


def _dots(axes: Any, title: str, results: Mapping[str, Sequence[Outcome]], field: str) -> None:
    by_method = [[100 * getattr(outcome, field) for outcome in outcomes] for outcomes in results.values()]
    for values in zip(*by_method, strict=True):
        axes.plot(range(len(values)), values, color="lightgrey", linewidth=1, zorder=1)
    for place, column in enumerate(by_method):
        axes.scatter([place] * len(column), column, color=f"C{place}", zorder=2)
    axes.set(title=title, xlim=(-0.5, len(by_method) - 0.5))
    axes.set_xticks(range(len(by_method)), list(results), rotation=0 if len(by_method) < 5 else 45)
