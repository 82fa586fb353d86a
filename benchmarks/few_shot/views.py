"""Statistics of the results: paired differences with bootstrap intervals, the tuned and the untuned view."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.few_shot.grid import ONE_RATE, Run, full
from benchmarks.few_shot.methods import BASE, HEAD_ONLY

__all__ = ["Difference", "cells", "difference", "load", "outcomes", "step_ratio", "tuned", "untuned", "worst"]

_RESAMPLES = 10_000
_PAIR = ["target", "seed"]
_CELL = ["scenario", "source", "target", "condition", "shots", "lr", "seed"]


class Difference(NamedTuple):
    """Mean of paired differences, with its 95% bootstrap interval; one pair alone says nothing of its spread."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.mean:+.1f} (one pair)"
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def load(path: Path, *, grid: bool = False) -> pd.DataFrame:
    """The rows of a file of results; accuracies in percent. What does not depend on the rate stands at each of them.

    Args:
        grid: only the runs of the full grid; the file keeps others too, of methods and cells that were in it before.
    """
    rows = pd.read_csv(path)
    if grid:
        key = [field.name for field in fields(Run)]
        rows = rows.merge(pd.DataFrame(map(asdict, full(causal=True))), on=key)
    rows = _at_every_rate(rows)
    for column in ("target_accuracy", "source_accuracy", "source_accuracy_before", "backward_transfer"):
        rows[column] *= 100
    return rows


def _at_every_rate(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs of the head alone, made at one rate of the adapter, once for each rate of their scenario; ``copied``
    says which of these were not made."""
    rows = rows.assign(copied=False)
    alone = (rows["method"] == HEAD_ONLY) & (rows["condition"] != ONE_RATE)
    others = rows[~alone]
    rates = others[["scenario", "lr"]].drop_duplicates()
    copies = rows[alone].rename(columns={"lr": "made_at"}).merge(rates, on="scenario")
    copies["copied"] = copies["lr"] != copies.pop("made_at")
    return pd.concat([others, copies], ignore_index=True)


def untuned(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean over the grid of rates: one value per (target, seed), by method; only pairs whose grid is complete."""
    table = rows.pivot_table(index=_PAIR, columns=["method", "lr"], values=column)
    return table.dropna().T.groupby("method").mean().T


def tuned(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Each method at the rate that is best for the target on the *other* sets: one value per (target, seed), by method.

    The choice is by the mean target accuracy, whatever ``column`` is shown.
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
    """Mean over seeds at the worst rate of the grid: one value per target, by method."""
    means: pd.DataFrame = rows.groupby(["method", "target", "lr"])[column].mean().unstack("lr")
    return means.min(axis=1).unstack("method")


def difference(table: pd.DataFrame, method: str, base: str = BASE) -> Difference:
    """``method`` minus ``base`` over the pairs of ``table``, resampled with replacement 10,000 times."""
    pairs = (table[method] - table[base]).to_numpy(dtype=float)
    if len(pairs) == 1:
        return Difference(float(pairs[0]), -math.inf, math.inf)
    generator = np.random.default_rng(0)
    means = pairs[generator.integers(len(pairs), size=(_RESAMPLES, len(pairs)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(pairs.mean()), float(low), float(high))


def cells(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Every cell (scenario, source, target, condition, shots, rate) and seed, by method."""
    return rows.pivot_table(index=_CELL, columns="method", values=column)


def step_ratio(rows: pd.DataFrame, method: str) -> float:
    """Time of a step of ``method`` over that of the base: median over the pairs that one version made; nan without any.

    Rows of other versions were made on other days, on a machine as fast as it was then.
    """
    table = rows.pivot_table(index=[*_CELL, "commit"], columns="method", values="seconds_per_step")
    return float((table[method] / table[BASE]).median())


def outcomes(rows: pd.DataFrame, column: str, method: str) -> dict[str, int]:
    """Wins, ties and losses against the base by cell: where the interval of the paired differences leaves out zero."""
    table = cells(rows, column)
    counted = {"wins": 0, "ties": 0, "losses": 0}
    if method not in table:
        return counted
    pairs = table[[method, BASE]].dropna()
    for _, cell in pairs.groupby(level=list(range(6))):
        found = difference(cell, method)
        counted["wins" if found.low > 0 else "losses" if found.high < 0 else "ties"] += 1
    return counted
