"""Views of the rows: untuned and tuned, with paired differences. All are made from the file of results alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.few_shot.results import Difference, difference
from benchmarks.language.grid import BASE, CHOOSING, COLUMNS, Run
from benchmarks.language.methods import METHODS, family

__all__ = [
    "KEY", "PAIR", "against", "against_best", "at_shared_rates", "cells", "load", "outcomes", "per_pair", "shown",
    "tuned", "worst",
]  # fmt: skip

PAIR = ["target", "seed"]
KEY = list(Run.__dataclass_fields__)
_TIE = 1.0  # percentage points


def load(path: Path) -> pd.DataFrame:
    """Return the rows without an error, the last one of each run. Accuracies are in percent.

    Further columns: ``family``, the method without its strength, ``kept``, the accuracy on the source task
    in percent of that before, and ``forgetting``, the points that the tasks of a sequence lost after their training.
    """
    rows = pd.read_csv(path, keep_default_na=False, na_values=["", "nan"])  # "null" is a method
    rows = rows[rows["error"].isna()].drop_duplicates(KEY, keep="last")
    rows = rows[[name.split()[0].partition(":")[0] in METHODS for name in rows["method"]]].copy()
    accuracies = [name for name in COLUMNS if name.endswith("_accuracy")] + ["source_before"]
    rows[accuracies] *= 100
    rows["family"] = rows["method"].map(family)
    rows["kept"] = 100 * rows["source_accuracy"] / rows["source_before"]
    rows["forgetting"] = rows["learnt_accuracy"] - rows["target_accuracy"]
    return rows


def at_shared_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows at the rates that every method has: means over other rates do not compare."""
    counts = rows.groupby("lr")["method"].nunique()
    return rows[rows["lr"].isin(counts.index[counts == rows["method"].nunique()])]


def cells(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return one value per (target, seed), by method and rate. A setting whose values are all nan has a column too."""
    return rows.groupby([*PAIR, "method", "lr"])[column].mean().unstack(["method", "lr"])


def per_pair(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the mean over the shared rates: one value per (target, seed), by method. Incomplete pairs are dropped."""
    return cells(at_shared_rates(rows), column).dropna().T.groupby("method").mean().T


def worst(rows: pd.DataFrame, column: str, *, least: bool) -> float:
    """Return the mean over sets and seeds at the rate where it is worst: the least, or the largest.

    It is nan if a run is: one that diverged has no mean.
    """
    means = rows.groupby("lr")[column].agg(lambda values: values.mean(skipna=False))
    return float(means.min(skipna=False) if least else means.max(skipna=False))


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Pairs (target, seed) in which a method is better than the baseline by more than a point, within one, or worse."""

    wins: int
    ties: int
    losses: int

    def __str__(self) -> str:
        return f"{self.wins} / {self.ties} / {self.losses}"


def outcomes(table: pd.DataFrame, method: str, base: str = BASE) -> Outcomes:
    """Count the pairs of a table of percentages."""
    found = table[method] - table[base]
    wins, losses = int((found > _TIE).sum()), int((found < -_TIE).sum())
    return Outcomes(wins=wins, ties=len(found) - wins - losses, losses=losses)


def tuned(rows: pd.DataFrame, by: str, column: str) -> pd.DataFrame:
    """Return the rows of each family at the strength and rate that are best elsewhere.

    The choice for a set is made by the mean of ``column`` over the choosing sets without it, and for a seed of a
    sequence over the other seeds. Only settings with the most runs there are compared.

    Args:
        by: "target" or "seed": what the choice must not have seen. Of several tasks the last one is the target.
        column: "target_accuracy", or "target_loss", for which lower is better.
    """
    parts = []
    for (name, fold), part in rows.groupby(["family", by]):
        others = rows[(rows["family"] == name) & (rows[by] != fold)]
        choosing = others["target"].str.split("+").str[-1].isin(CHOOSING)
        if by == "target" and choosing.any():
            others = others[choosing]
        found = others.groupby(["method", "lr"])[column].agg(["mean", "count"])
        found = found[found["count"] == found["count"].max()]["mean"].dropna()
        if found.empty:
            continue
        method, lr = found.idxmin() if column == "target_loss" else found.idxmax()
        parts.append(part[(part["method"] == method) & (part["lr"] == lr)])
    return pd.concat(parts) if parts else rows.iloc[:0]


def shown(found: Difference, digits: int) -> str:
    """Return a difference and its interval."""
    if found.low == -float("inf"):
        return f"{found.mean:+.{digits}f} (one pair)"
    return f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


def against(table: pd.DataFrame, method: str, digits: int, base: str = BASE) -> str:
    """Return the paired difference of two columns of a table, or nothing."""
    if method == base or not {method, base} <= set(table.columns):
        return ""
    both = table[[method, base]].dropna()
    return "" if both.empty else shown(difference(both, method, base), digits)


def against_best(both: pd.DataFrame, method: str, column: str, pairs: pd.Index) -> Difference:
    """Return the paired difference of the method's mean over the shared rates from the baseline at its best one."""
    found = cells(at_shared_rates(both), column).loc[pairs]
    means = found[BASE].mean()
    best = means.idxmin() if column == "target_loss" else means.idxmax()
    return difference(pd.DataFrame({method: found[method].mean(axis=1), "best": found[BASE][best]}), method, "best")
