"""Store, save and plot the metrics of every step of a run."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradguide.recording.plotting import draw_curve, figure_for, save_figure
from gradguide.utils.atomic import atomic_write

__all__ = ["History"]

_PANELS = {
    "cosines": ("direction_cosine", "source_cosine"),
    "coherence": ("coherence",),
    "norms": ("grad_norm", "guided_norm", "clipped_norm", "update_norm"),
    "update kept by the bound": ("update_factor",),
    "modelled drift, nats per token": ("source_drift",),
    "conflicts (cumulative)": ("conflict",),
}


class History:
    """One row of metrics per step, filled by ``optimizer.record(history)``."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def append(self, metrics: Mapping[str, float]) -> None:
        """Append a step. Add ``clipped_norm`` to the row: the norm of the gradient that the base received."""
        row = dict(metrics)
        if "guided_norm" in row and "clip_factor" in row:
            row["clipped_norm"] = row["guided_norm"] * row["clip_factor"]
        self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, float]]:
        return iter(self.rows)

    def columns(self) -> list[str]:
        """Return the names of all metrics, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows to a .csv or .jsonl file atomically.

        A value that is not finite is written as an empty cell or null.

        Raises:
            OSError: the file cannot be written.
            ValueError: the suffix is neither .csv nor .jsonl.
        """
        suffix = Path(path).suffix.lower()
        if suffix not in (".csv", ".jsonl"):
            raise ValueError(f"a history is saved as .csv or .jsonl, found {os.fspath(path)!r}")
        columns = self.columns()
        rows = [{key: _plain(row.get(key, math.nan)) for key in columns} for row in self.rows]
        with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            if suffix == ".csv":
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read a file written by :meth:`save`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a .csv or .jsonl file of numbers.
        """
        history = cls()
        suffix = Path(path).suffix.lower()
        try:
            with Path(path).open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
                if suffix == ".csv":
                    found: list[Mapping[str, Any]] = list(csv.DictReader(file))
                elif suffix == ".jsonl":
                    found = [json.loads(line) for line in file if line.strip()]
                else:
                    raise ValueError("the suffix is neither .csv nor .jsonl")
            history.rows = [{key: _number(value) for key, value in row.items()} for row in found]
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error) as error:
            raise ValueError(f"{os.fspath(path)!r} is no saved history: {error}") from error
        return history

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot the metrics over the steps to an image file. Needs the extra ``plot``.

        The panels show cosines (smoothed), coherence, norms, the bound on the update, the modelled drift of the sources
        and conflicts. With several sources, each has a line.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the history is empty, or the suffix is not an image format.
        """
        if not self.rows:
            raise ValueError("the history is empty: record(history) before training, and plot after it")
        figure = figure_for(path, (13, 6), "History.plot")
        columns = self.columns()
        for axes, (title, keys) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
            # The worst value of all sources comes first: drawn last, it would cover the line of the source that has it.
            each = [column for key in keys for column in (key, *(c for c in columns if c.startswith(f"{key}/")))]
            for key in each:
                # Dashed, because it is the guided norm wherever nothing is clipped.
                style = {"label": key.replace("_", " "), "linestyle": "--" if key == "clipped_norm" else "-"}
                draw_curve(axes, self.rows, key, logarithmic=title == "norms", **style)
            axes.set_title(title)
            axes.set_xlabel("step")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small")
        save_figure(figure, path, dpi=120)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: object) -> float:
    if value is None or value == "":
        return math.nan
    if isinstance(value, (str, int, float)):
        return float(value)
    raise TypeError(f"expected a number, found {value!r}")
