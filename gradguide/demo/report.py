"""The report: a table for people, a CSV with one row per run, and a figure."""

from __future__ import annotations

import csv
import math
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from gradguide.utils.atomic import replacing

from .adapt import Outcome
from .figure import draw_figure
from .prepare import Prepared
from .stats import paired_difference

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["by_method", "table", "write_csv", "write_report"]

_VERSIONED = ("gradguide", "torch", "transformers", "peft")


def by_method(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes of each method in the order of the seeds; methods in the order of their first outcome."""
    results: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.seed):
        results.setdefault(outcome.method, []).append(outcome)
    return {method: results[method] for method in dict.fromkeys(outcome.method for outcome in outcomes)}


def write_report(folder: Path, prepared: Prepared, outcomes: Sequence[Outcome]) -> tuple[Path, Path]:
    """Writes ``results.csv`` and ``results.png`` to ``folder``, which must exist; returns their paths."""
    csv_path, png_path = folder / "results.csv", folder / "results.png"
    write_csv(csv_path, prepared, outcomes)
    draw_figure(png_path, by_method(outcomes), prepared.source_accuracy)
    return csv_path, png_path


def write_csv(path: Path, prepared: Prepared, outcomes: Sequence[Outcome]) -> None:
    """One row per method and seed: what came out, what went in, and the versions at work. Accuracies are in [0, 1]."""
    config = prepared.config
    shared = {
        "source_accuracy_before": prepared.source_accuracy,
        "source_test_rows": len(prepared.source_test),
        "target_test_rows": len(prepared.target_test),
        "source": prepared.transfer.source.name,
        "target": prepared.transfer.target.name,
        "model": config.model,
        "shots": config.shots,
        "steps": config.steps,
        "batch": config.batch,
        "lr": config.lr,
        "device": prepared.target_test.device.type,
        "python": platform.python_version(),
        **{name: _version(name) for name in _VERSIONED},
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
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table(prepared: Prepared, outcomes: Sequence[Outcome]) -> Table:
    """Means with standard deviations over the seeds, and each method's paired difference from the first method."""
    from rich.table import Table

    results = by_method(outcomes)
    first, *others = results
    # Without an outer edge the usual two methods fit a terminal of 80 columns.
    view = Table(
        title=_title(prepared),
        caption=_caption(prepared),
        title_justify="left",
        caption_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    view.add_column("method", no_wrap=True)
    for heading in ("target %", "source kept %", "coherence", "s/step"):
        view.add_column(heading, justify="right")
    for method, runs in results.items():
        columns = _columns(runs)
        view.add_row(
            method, *(_spread(values, digits) for values, digits in columns), end_section=method == [*results][-1]
        )
    for method in others:
        pairs = zip(_columns(results[method]), _columns(results[first]), strict=True)
        view.add_row(f"{method} - {first}", *(_difference(ours, base, digits) for (ours, digits), (base, _) in pairs))
    return view


def _columns(runs: Sequence[Outcome]) -> list[tuple[list[float], int]]:
    """Values of each column, one per seed, with the number of decimals to show."""
    return [
        ([100 * run.target_accuracy for run in runs], 1),
        ([100 * run.source_accuracy for run in runs], 1),
        ([run.mean_coherence for run in runs], 2),
        ([run.seconds_per_step for run in runs], 3),
    ]


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _difference(ours: Sequence[float], base: Sequence[float], digits: int) -> str:
    mean, half = paired_difference(ours, base)
    if math.isnan(half):
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def _title(prepared: Prepared) -> str:
    config, transfer = prepared.config, prepared.transfer
    return (
        f"target {transfer.target.name} ({len(transfer.target.labels)} labels, {config.shots} shots), "
        f"source {transfer.source.name} ({len(transfer.source.labels)} labels)"
    )


def _caption(prepared: Prepared) -> str:
    seeds = prepared.config.seeds
    parts = [
        f"Accuracy after adaptation; of the source before it: {100 * prepared.source_accuracy:.1f} %. "
        f"Split {prepared.transfer.split}.",
        f"Rows: mean ± standard deviation over {seeds} seeds. "
        "Difference: mean over pairs of one seed ± half of its 95 % t-interval."
        if seeds > 1
        else "One seed: no spread, no interval.",
        "Coherence is that of the gradients as received, mean over the steps.",
    ]
    if prepared.source_test_is_sampled:
        rows, whole = len(prepared.source_test), len(prepared.transfer.source.test)
        parts.append(f"Source accuracy is measured on {rows} of {whole} test rows, the same for all runs.")
    return " ".join(parts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is on the path and not installed
        return "unknown"
