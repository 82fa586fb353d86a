"""Views of the rows: untuned and tuned, with paired differences. All are made from the file of results alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.few_shot.results import Difference, difference
from benchmarks.language.grid import BASE, CHOOSING, COLUMNS, Run
from benchmarks.language.methods import METHODS, family

__all__ = ["KEY", "PAIR", "against", "against_best", "load", "outcomes", "per_pair", "shown", "tuned", "worst"]

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


def per_pair(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the mean over the rates: one value per (target, seed), by method. Incomplete pairs are dropped."""
    table = rows.pivot_table(index=PAIR, columns=["method", "lr"], values=column)
    return table.dropna().T.groupby("method").mean().T


def worst(rows: pd.DataFrame, column: str, *, least: bool) -> float:
    """Return the mean over sets and seeds at the rate where it is worst: the least, or the largest."""
    means = rows.groupby("lr")[column].mean()
    return float(means.min() if least else means.max())


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
        by: "target" or "seed": what the choice must not have seen.
        column: "target_accuracy", or "target_loss", for which lower is better.
    """
    parts = []
    for (name, fold), part in rows.groupby(["family", by]):
        others = rows[(rows["family"] == name) & (rows[by] != fold)]
        if by == "target" and others["target"].isin(CHOOSING).any():
            others = others[others["target"].isin(CHOOSING)]
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
    """Return the paired difference of the method's mean over the rates from the baseline at its best rate."""
    cells = both.pivot_table(index=PAIR, columns=["method", "lr"], values=column).loc[pairs]
    means = cells[BASE].mean()
    best = means.idxmin() if column == "target_loss" else means.idxmax()
    return difference(pd.DataFrame({method: cells[method].mean(axis=1), "best": cells[BASE][best]}), method, "best")
