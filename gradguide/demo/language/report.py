"""The report of the demo on a language model: a table, a CSV file with one row per run, and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gradguide.demo.config import LanguageConfig
from gradguide.demo.data import Task
from gradguide.demo.report import by_method, comparison, settings_of, write_rows
from gradguide.recording.plotting import figure_for, save_figure

if TYPE_CHECKING:
    from gradguide.demo.language.run import Outcome

__all__ = ["print_table", "write_report"]


def write_report(
    config: LanguageConfig, task: Task, outcomes: Sequence[Outcome], before: float, device: torch.device
) -> tuple[Path, Path]:
    """Write ``results.csv`` and ``results.png`` to the output folder, which must exist; return their paths.

    Args:
        before: target accuracy before adaptation, in [0, 1].
    """
    csv_path, png_path = config.out / "results.csv", config.out / "results.png"
    shared = {
        "target_accuracy_before": before,
        "target": task.name,
        **settings_of(config, device),
    }
    measured = ("method", "seed", "target_accuracy", "drift", "seconds_per_step")
    write_rows(csv_path, [{**{name: getattr(o, name) for name in measured}, **shared} for o in outcomes])
    _draw(png_path, by_method(outcomes))
    return csv_path, png_path


def print_table(config: LanguageConfig, task: Task, outcomes: Sequence[Outcome], before: float) -> None:
    """Print means with standard deviations over seeds, and paired differences from the first method."""
    from rich.console import Console

    columns = {method: _columns(runs) for method, runs in by_method(outcomes).items()}
    title = f"target {task.name} ({len(task.labels)} labels, {config.shots} shots), rate {config.lr:g}"
    caption = f"Target accuracy before: {100 * before:.1f} %. Drift: KL from the base model on text that it wrote."
    # Names of domains may contain brackets, which are not markup.
    Console(markup=False).print(comparison(columns, ("target %", "drift in nats/token", "s/step"), title, caption))


def _columns(runs: Sequence[Outcome]) -> list[tuple[list[float], int]]:
    """Return the values of each table column, one per seed, with the number of decimals to print."""
    return [
        ([100 * run.target_accuracy for run in runs], 1),
        ([run.drift for run in runs], 3),
        ([run.seconds_per_step for run in runs], 3),
    ]


def _draw(path: Path, results: Mapping[str, Sequence[Outcome]]) -> None:
    """Draw target accuracy over drift, one point per run. The best place is the upper left corner."""
    figure = figure_for(path, (5, 4), "gradguide demo")
    axes = figure.subplots()
    for method, runs in results.items():
        axes.scatter([run.drift for run in runs], [100 * run.target_accuracy for run in runs], label=method)
    axes.set(xlabel="drift from the base model (nats/token)", ylabel="target accuracy (%)", xscale="log")
    axes.legend(frameon=False)
    save_figure(figure, path, dpi=100)
