"""The file of results (one row per run), and statistics of its rows: paired differences, tuned and untuned views."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from benchmarks.few_shot.grid import CONFIRMING, MAIN, ONE_RATE, Run, full
from benchmarks.few_shot.methods import BASE, HEAD_ONLY
from benchmarks.harness import append_row, read_rows
from gradguide.demo.config import DEFAULT_MODEL

__all__ = [
    "Difference",
    "append",
    "cells",
    "confirming",
    "difference",
    "done",
    "load",
    "model_name",
    "outcomes",
    "share_above",
    "step_ratio",
    "tuned",
    "untuned",
    "worst",
]

_KEY = [field.name for field in fields(Run)]
_MEASURED = (
    "target_accuracy", "source_accuracy", "source_accuracy_before", "backward_transfer", "loss", "diverged",
    "coherence", "successive_cosine", "alignment", "steps_to_final", "seconds_per_step", "capture_seconds", "memory",
    "peak_memory", "seconds",
)  # fmt: skip
_ABOUT = ("model", "commit", "gradguide", "torch", "python", "device", "threads")
_COLUMNS = [*_KEY, *_MEASURED, *_ABOUT]
_EARLIER = [name for name in _COLUMNS if name != "model"]  # of files with runs of the default model alone
_PERCENT = ["target_accuracy", "source_accuracy", "source_accuracy_before", "backward_transfer"]

_RESAMPLES = 10_000
_PAIR = ["target", "seed"]
_CELL = ["scenario", "source", "target", "condition", "shots", "lr"]


def append(path: Path, run: Run, measured: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Add the row of ``run``. ``about["model"]`` is from :func:`model_name`."""
    columns = _columns_of(path)
    row = {**asdict(run), **{name: about[name] for name in _ABOUT if name in columns}}
    append_row(path, columns, {**row, **measured})


def done(path: Path, model: str) -> set[Run]:
    """Return the runs whose rows the file has; an empty set if there is no file.

    Args:
        path: the file.
        model: hub id or folder of the model. A file has the runs of one.

    Raises:
        ValueError: the file has other columns, or runs of another model.
    """
    numbers: dict[str, Callable[[str], Any]] = {"shots": int, "lr": float, "seed": int}
    found: set[Run] = set()
    for row in read_rows(path, _columns_of(path)):
        held = row.get("model", model_name(DEFAULT_MODEL))
        if held != model_name(model):
            raise ValueError(f"{path} has runs of the model {held!r}, found {model!r}; name another --out")
        found.add(Run(**{name: numbers.get(name, str)(row[name]) for name in _KEY}))
    return found


def model_name(model: str) -> str:
    """Return the name of a model, which is the same for its hub id and for its folder."""
    return Path(model).name.lower()


def _columns_of(path: Path) -> list[str]:
    """Return the columns of a file. Earlier versions did not write the model."""
    if not path.exists():
        return _COLUMNS
    with path.open(encoding="utf-8") as file:
        return _EARLIER if file.readline().strip() == ",".join(_EARLIER) else _COLUMNS


def load(path: Path, *, grid: bool = False) -> pd.DataFrame:
    """Return the rows of a file of results, with accuracies in percent.

    Runs of the head alone do not depend on the adapter's rate and were made at one rate only. Their rows are repeated
    for each rate of their scenario; the column "copied" marks the repeated ones.

    Args:
        path: the file.
        grid: keep only the runs of the full grid. The file also has runs of earlier grids.
    """
    rows = pd.read_csv(path)
    if grid:
        rows = rows.merge(pd.DataFrame(map(asdict, full())), on=_KEY)
    rows = _at_every_rate(rows)
    rows[_PERCENT] *= 100
    return rows


def _at_every_rate(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows.assign(copied=False)
    alone = (rows["method"] == HEAD_ONLY) & (rows["condition"] != ONE_RATE)
    others = rows[~alone]
    rates = others[["scenario", "lr"]].drop_duplicates()
    copies = rows[alone].rename(columns={"lr": "made_at"}).merge(rates, on="scenario")
    copies["copied"] = copies["lr"] != copies.pop("made_at")
    return pd.concat([others, copies], ignore_index=True)


def untuned(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the mean over the grid of rates: one value per (target, seed), by method. Incomplete pairs are dropped."""
    table = rows.pivot_table(index=_PAIR, columns=["method", "lr"], values=column)
    return table.dropna().T.groupby("method").mean().T


def tuned(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return each method at the rate that is best for the target on the *other* sets, per (target, seed), by method.

    The rate is chosen by the mean target accuracy, whatever ``column`` is shown. If there is one set only, such as
    digits, the rate is chosen on it.
    """
    means = rows.groupby(["method", "target", "lr"])["target_accuracy"].mean().unstack("lr")
    parts = []
    for (method, target), _ in means.iterrows():
        others = means.loc[method].drop(index=target)
        best = (others if len(others) else means.loc[method]).mean().idxmax()
        parts.append(rows[(rows["method"] == method) & (rows["target"] == target) & (rows["lr"] == best)])
    chosen = pd.concat(parts) if parts else rows
    return chosen.pivot_table(index=_PAIR, columns="method", values=column).dropna()


def worst(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the mean over seeds at the worst rate of the grid: one value per target, by method."""
    means: pd.DataFrame = rows.groupby(["method", "target", "lr"])[column].mean().unstack("lr")
    return means.min(axis=1).unstack("method")


class Difference(NamedTuple):
    """Mean of paired differences and its 95% bootstrap interval, which is infinite for a single pair."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.mean:+.1f} (one pair)"
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def difference(table: pd.DataFrame, method: str, base: str = BASE) -> Difference:
    """Return the mean of ``method`` minus ``base`` over the pairs of ``table``, with its percentile interval."""
    pairs = (table[method] - table[base]).to_numpy(dtype=float)
    mean = float(pairs.mean())
    if len(pairs) == 1:
        return Difference(mean, -math.inf, math.inf)
    low, high = bootstrap(
        (pairs,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Difference(mean, float(low), float(high))


def cells(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the value of every cell (scenario, source, target, condition, shots, rate) and seed, by method."""
    return rows.pivot_table(index=[*_CELL, "seed"], columns="method", values=column)


def step_ratio(rows: pd.DataFrame, method: str) -> float:
    """Return the time of a step of ``method`` over the baseline's: the median over pairs of the same commit, or nan.

    Rows of different commits were measured on different days, when the machine may have been slower or faster.
    """
    table = rows.pivot_table(index=[*_CELL, "seed", "commit"], columns="method", values="seconds_per_step")
    return float((table[method] / table[BASE]).median())


def outcomes(rows: pd.DataFrame, column: str, method: str) -> dict[str, int]:
    """Count cells as wins, ties and losses against the baseline, by whether the interval excludes zero."""
    table = cells(rows, column)
    counted = {"wins": 0, "ties": 0, "losses": 0}
    if method not in table:
        return counted
    pairs = table[[method, BASE]].dropna()
    for _, cell in pairs.groupby(level=_CELL):
        found = difference(cell, method)
        counted["wins" if found.low > 0 else "losses" if found.high < 0 else "ties"] += 1
    return counted


def share_above(table: pd.DataFrame, method: str, base: str = BASE) -> float:
    """Return the share of the cells, means over seeds, in which ``method`` is above ``base``, in [0, 1]."""
    means = table[[method, base]].dropna().groupby(level=list(range(6))).mean()
    return float((means[method] > means[base]).mean())


def confirming(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of most goals: transfer to the confirming sets at 4 shots, by the methods that run on all sets.

    Tables of pairs keep the pairs that all their methods have, so a method with one set would leave only that set.
    """
    part = rows[(rows["scenario"] == "transfer") & (rows["condition"] == "clean") & (rows["shots"] == 4)]
    return part[part["target"].isin(CONFIRMING) & part["method"].isin(MAIN)]
