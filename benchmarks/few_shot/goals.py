"""The goals that were set before the evaluation, and whether GradGuide's defaults reach them on the confirming sets."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from benchmarks import markdown
from benchmarks.few_shot.grid import CONFIRMING, MAIN
from benchmarks.few_shot.methods import BASE
from benchmarks.few_shot.results import cells, difference, step_ratio, tuned, untuned, worst

__all__ = ["share_above", "table", "transfer"]

OURS = "GradGuide"

Check = Callable[[pd.DataFrame], tuple[str, bool]]
"""Returns what was found, in words, and whether the goal is reached."""


def table(rows: pd.DataFrame) -> str:
    """Return a table of each goal, what was found, and whether it is reached; "not run" if rows are missing."""
    return markdown.table(
        ["goal", "found", "reached"], [[goal, *_checked(check, rows)] for goal, check in _GOALS.items()]
    )


def _checked(check: Check, rows: pd.DataFrame) -> tuple[str, str]:
    try:
        found, reached = check(rows)
    except (KeyError, ValueError, IndexError):  # rows of a method or a scenario are missing
        return "not run", ""
    return found, "yes" if reached else "**no**"


def share_above(table: pd.DataFrame, method: str, base: str = BASE) -> float:
    """Return the share of the cells, means over seeds, in which ``method`` is above ``base``, in [0, 1]."""
    means = table[[method, base]].dropna().groupby(level=list(range(6))).mean()
    return float((means[method] > means[base]).mean())


def transfer(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of most goals: transfer to the confirming sets at 4 shots, by the methods that run on all sets.

    Tables of pairs keep the pairs that all their methods have, so a method with one set would leave only that set.
    """
    part = rows[(rows["scenario"] == "transfer") & (rows["condition"] == "clean") & (rows["shots"] == 4)]
    return part[part["target"].isin(CONFIRMING) & part["method"].isin(MAIN)]


def _untuned(column: str, least: float) -> Check:
    def check(rows: pd.DataFrame) -> tuple[str, bool]:
        found = difference(untuned(transfer(rows), column), OURS)
        return str(found), found.mean >= least and found.low > 0

    return check


def _worst_target(rows: pd.DataFrame) -> tuple[str, bool]:
    part = transfer(rows)
    ours = worst(part, "target_accuracy")[OURS].mean()
    best = tuned(part, "target_accuracy")[BASE].mean()
    return f"{ours:.1f}, base tuned {best:.1f}", bool(ours >= best - 1.0)


def _worst_source(rows: pd.DataFrame) -> tuple[str, bool]:
    part = transfer(rows)
    share = 100 * worst(part, "source_accuracy")[OURS].mean() / part["source_accuracy_before"].mean()
    return f"{share:.1f}%", bool(share >= 90.0)


def _tuned_target(rows: pd.DataFrame) -> tuple[str, bool]:
    found = difference(tuned(transfer(rows), "target_accuracy"), OURS)
    return str(found), found.low > -0.3


def _tuned_source(rows: pd.DataFrame) -> tuple[str, bool]:
    found = difference(tuned(transfer(rows), "source_accuracy"), OURS)
    return str(found), found.mean >= 0


def _sequence(base: str, least: float) -> Check:
    def check(rows: pd.DataFrame) -> tuple[str, bool]:
        part = rows[(rows["scenario"] == "sequence") & (rows["target"] == "confirming")]
        both = part[part["method"].isin((OURS, base))]  # keep every pair that these two have
        found = difference(untuned(both, "target_accuracy"), OURS, base)
        return str(found), found.mean >= least

    return check


def _sequence_time(rows: pd.DataFrame) -> tuple[str, bool]:
    part = rows[(rows["scenario"] == "sequence") & (rows["target"] == "confirming")]
    ratio = step_ratio(part, OURS)
    if math.isnan(ratio):
        raise ValueError("no pair has rows of one commit")
    return f"{ratio:.2f}", ratio <= 1.05


def _rough(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows["scenario"] == "rough") & rows["target"].isin(CONFIRMING)]


def _spread(rows: pd.DataFrame) -> tuple[str, bool]:
    spread = _rough(rows).groupby(["method", "condition", "lr"])["target_accuracy"].std().groupby("method").mean()
    ratio = float(spread[OURS] / spread[BASE])
    if math.isnan(ratio):
        raise ValueError("a standard deviation needs at least two seeds")
    return f"{spread[OURS]:.1f} to {spread[BASE]:.1f}: {ratio:.2f}", ratio <= 0.7


def _diverged(rows: pd.DataFrame) -> tuple[str, bool]:
    counted = _rough(rows).groupby(["method", "condition", "target", "lr"])["diverged"].sum().unstack("method")
    where = counted[counted[BASE] > 0]
    ours = int(where[OURS].sum())
    return f"{ours} to {int(where[BASE].sum())} of the base's", ours == 0


def _above(column: str) -> Check:
    def check(rows: pd.DataFrame) -> tuple[str, bool]:
        share = 100 * share_above(cells(transfer(rows), column), OURS)
        return f"{share:.0f}% of the cells", share >= 80.0

    return check


_GOALS: dict[str, Check] = {
    "untuned, target: at least +1.0, interval above 0": _untuned("target_accuracy", 1.0),
    "untuned, source: at least +5.0, interval above 0": _untuned("source_accuracy", 5.0),
    "worst rate, target: within 1 point of the base's tuned": _worst_target,
    "worst rate, source: at least 90% of what was known": _worst_source,
    "tuned, target: interval above -0.3": _tuned_target,
    "tuned, source: kept better or equal": _tuned_source,
    f"sequence: at least +3 over {BASE}": _sequence(BASE, 3.0),
    "sequence: not below A-GEM": _sequence("A-GEM", 0.0),
    "sequence: not below EWC": _sequence("EWC", 0.0),
    "sequence: not below L2-SP (no goal at first; the strongest rival)": _sequence("L2-SP", 0.0),
    f"sequence: time of a step at most 1.05 of {BASE}": _sequence_time,
    f"rough data: spread over seeds at most 0.7 of {BASE}'s": _spread,
    f"rough data: no diverged run where {BASE} has any": _diverged,
    "directional alignment above in at least 80% of the cells": _above("alignment"),
    "stability (coherence) above in at least 80% of the cells": _above("coherence"),
}
