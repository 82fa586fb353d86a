"""The file of results: one row per run, appended as runs end, so that a stopped grid can be resumed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.few_shot.grid import Run

__all__ = ["append", "done"]

_MEASURED = (
    "target_accuracy", "source_accuracy", "source_accuracy_before", "backward_transfer", "loss", "diverged",
    "coherence", "successive_cosine", "alignment", "steps_to_final", "seconds_per_step", "capture_seconds", "memory",
    "peak_memory", "seconds",
)  # fmt: skip
_ABOUT = ("commit", "gradguide", "torch", "python", "device", "threads")
_COLUMNS = [*(field.name for field in fields(Run)), *_MEASURED, *_ABOUT]


def append(path: Path, run: Run, measured: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Adds the row of ``run``. A row is written whole, by one call, so that a stop leaves no half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        row = {**asdict(run), **measured, **{name: about[name] for name in _ABOUT}}
        writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})


def done(path: Path) -> set[Run]:
    """The runs whose rows the file has; none where there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != _COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes: move it away, or name another --out")
        return {_run(row) for row in reader}


def _run(row: Mapping[str, str]) -> Run:
    return Run(
        scenario=row["scenario"],
        source=row["source"],
        target=row["target"],
        condition=row["condition"],
        shots=int(row["shots"]),
        method=row["method"],
        lr=float(row["lr"]),
        seed=int(row["seed"]),
    )
