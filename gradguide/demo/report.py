"""The report: a table for the terminal, a CSV file with one row per run, and a figure."""

from __future__ import annotations

import csv
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from gradguide.demo.compare import Outcome, Prepared
from gradguide.demo.config import DemoConfig, LanguageConfig
from gradguide.recording.plotting import figure_for, save_figure
from gradguide.utils.atomic import atomic_write
from gradguide.utils.versions import installed_version

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "by_method",
    "comparison",
    "paired_difference",
    "print_table",
    "settings_of",
    "write_report",
    "write_rows",
]


class _Run(Protocol):
    @property
    def method(self) -> str: ...

    @property
    def seed(self) -> int: ...


Run = TypeVar("Run", bound=_Run)
"""The outcome of a run, of either demo."""

_PACKAGES = ("gradguide", "torch", "transformers", "peft")


def write_report(folder: Path, prepared: Prepared, outcomes: Sequence[Outcome]) -> tuple[Path, Path]:
    """Write ``results.csv`` and ``results.png`` to ``folder``, which must exist; return their paths."""
    csv_path, png_path = folder / "results.csv", folder / "results.png"
    _write_csv(csv_path, prepared, outcomes)
    _draw(png_path, by_method(outcomes), prepared.source_accuracy)
    return csv_path, png_path


def print_table(prepared: Prepared, outcomes: Sequence[Outcome]) -> None:
    """Print means with standard deviations over seeds, and paired differences from the first method."""
    from rich.console import Console

    # Names of labels and domains may contain brackets, which are not markup.
    columns = {method: _columns(runs) for method, runs in by_method(outcomes).items()}
    headings = ("target %", "source kept %", "coherence", "s/step")
    Console(markup=False).print(comparison(columns, headings, _title(prepared), _caption(prepared)))


def paired_difference(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Return the mean of ``values - base`` over pairs and half of its 95 % t-interval, which is nan for one pair."""
    from scipy.stats import t

    differences = [value - other for value, other in zip(values, base, strict=True)]
    count = len(differences)
    mean = statistics.fmean(differences)
    if count < 2:
        return mean, math.nan
    error = statistics.stdev(differences) / math.sqrt(count)
    return mean, float(t.ppf(0.975, count - 1)) * error


def by_method(outcomes: Sequence[Run]) -> dict[str, list[Run]]:
    """Group outcomes by method, in order of first appearance; sort each group by seed."""
    results: dict[str, list[Run]] = {outcome.method: [] for outcome in outcomes}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.seed):
        results[outcome.method].append(outcome)
    return results


def _write_csv(path: Path, prepared: Prepared, outcomes: Sequence[Outcome]) -> None:
    """Write one row per run: results, options and package versions. Accuracies are in [0, 1]."""
    shared = {
        "source_accuracy_before": prepared.source_accuracy,
        "source_test_rows": len(prepared.source_test),
        "target_test_rows": len(prepared.target_test),
        "source": prepared.transfer.source.name,
        "target": prepared.transfer.target.name,
        **settings_of(prepared.config, prepared.target_test.device),
    }
    rows = [
        {
            "method": outcome.method,
            "seed": outcome.seed,
            "target_accuracy": outcome.target_accuracy,
            "source_accuracy": outcome.source_accuracy,
            "coherence": outcome.mean_coherence,
            "seconds_per_step": outcome.seconds_per_step,
            **shared,
        }
        for outcome in outcomes
    ]
    write_rows(path, rows)


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the same keys as a CSV file, atomically."""
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def settings_of(config: DemoConfig | LanguageConfig, device: torch.device) -> dict[str, object]:
    """Return what the results of every run depend on: options, device, versions of Python and of packages."""
    return {
        **{name: getattr(config, name) for name in ("model", "shots", "steps", "batch", "lr")},
        "device": device.type,
        "python": platform.python_version(),
        **{name: installed_version(name) or "unknown" for name in _PACKAGES},
    }


def comparison(
    results: Mapping[str, Sequence[tuple[Sequence[float], int]]], headings: Sequence[str], title: str, caption: str
) -> Table:
    """Return a table of means, and of paired differences from the first method.

    Args:
        results: by method, for each heading the values of all seeds and the number of decimals to print.
    """
    from rich.table import Table

    # Without outer edges the two default methods fit into 80 columns.
    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", show_edge=False, pad_edge=False
    )
    table.add_column("method", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for method, columns in results.items():
        table.add_row(method, *(_mean_text(values, digits) for values, digits in columns))
    table.add_section()
    first, *others = results
    for method in others:
        pairs = zip(results[method], results[first], strict=True)
        cells = (_difference_text(values, base, digits) for (values, digits), (base, _) in pairs)
        table.add_row(f"{method} - {first}", *cells)
    return table


def _columns(runs: Sequence[Outcome]) -> list[tuple[list[float], int]]:
    """Return the values of each table column, one per seed, with the number of decimals to print."""
    return [
        ([100 * run.target_accuracy for run in runs], 1),
        ([100 * run.source_accuracy for run in runs], 1),
        ([run.mean_coherence for run in runs], 2),
        ([run.seconds_per_step for run in runs], 3),
    ]


def _mean_text(values: Sequence[float], digits: int) -> str:
    """Return the mean, and the standard deviation of several values."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _difference_text(values: Sequence[float], base: Sequence[float], digits: int) -> str:
    """Return the mean of paired differences, and half of its 95 % t-interval for several pairs."""
    mean, half = paired_difference(values, base)
    return f"{mean:+.{digits}f}" if math.isnan(half) else f"{mean:+.{digits}f} ± {half:.{digits}f}"


def _title(prepared: Prepared) -> str:
    source, target = prepared.transfer.source, prepared.transfer.target
    return (
        f"target {target.name} ({len(target.labels)} labels, {prepared.config.shots} shots), "
        f"source {source.name} ({len(source.labels)} labels)"
    )


def _caption(prepared: Prepared) -> str:
    seeds, tested, total = prepared.config.seeds, len(prepared.source_test), len(prepared.transfer.source.test)
    parts = [
        f"Accuracy after adaptation. Source accuracy before: {100 * prepared.source_accuracy:.1f} %. "
        f"Split {prepared.transfer.split}.",
        f"Rows: mean ± standard deviation over {seeds} seeds. "
        "Difference: mean of paired differences ± half of its 95 % t-interval."
        if seeds > 1
        else "One seed: no standard deviation and no interval.",
        "Coherence: of the gradients before guidance, mean over steps.",
    ]
    if tested < total:
        parts.append(f"Source accuracy is measured on {tested} of {total} test rows, the same for all runs.")
    return " ".join(parts)


def _draw(path: Path, results: Mapping[str, Sequence[Outcome]], source_accuracy: float) -> None:
    """Draw accuracies by method, with a line through the runs of each seed, and coherence over steps.

    Args:
        results: outcomes by method, sorted by seed.
        source_accuracy: before adaptation, in [0, 1]; drawn as a dashed line.
    """
    figure = figure_for(path, (12, 4), "gradguide demo")
    target, source, steps = figure.subplots(1, 3)
    _draw_accuracies(target, "target accuracy (%)", results, "target_accuracy")
    _draw_accuracies(source, "source accuracy kept (%)", results, "source_accuracy")
    source.axhline(100 * source_accuracy, color="grey", linestyle="--", linewidth=1, label="before adaptation")
    source.legend(frameon=False)
    for place, (method, outcomes) in enumerate(results.items()):
        runs = [outcome.coherence for outcome in outcomes]
        axis = range(1, len(runs[0]) + 1)
        for run in runs:
            steps.plot(axis, run, color=f"C{place}", alpha=0.25, linewidth=0.8)
        mean = [statistics.fmean(values) for values in zip(*runs, strict=True)]
        steps.plot(axis, mean, color=f"C{place}", linewidth=2, label=method)
    steps.set(title="gradient coherence", xlabel="step", ylim=(0, 1.02))
    steps.legend(frameon=False)
    save_figure(figure, path, dpi=100)


def _draw_accuracies(axes: Any, title: str, results: Mapping[str, Sequence[Outcome]], field: str) -> None:
    by_method = [[100 * getattr(outcome, field) for outcome in outcomes] for outcomes in results.values()]
    for values in zip(*by_method, strict=True):
        axes.plot(range(len(values)), values, color="lightgrey", linewidth=1, zorder=1)
    for place, column in enumerate(by_method):
        axes.scatter([place] * len(column), column, color=f"C{place}", zorder=2)
    axes.set(title=title, xlim=(-0.5, len(by_method) - 0.5))
    axes.set_xticks(range(len(by_method)), list(results), rotation=0 if len(by_method) < 5 else 45)
