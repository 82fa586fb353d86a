"""Tables of the report, in Markdown, each from rows of results."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pandas as pd

from benchmarks import markdown
from benchmarks.few_shot.grid import CONFIRMING
from benchmarks.few_shot.methods import BASE, METHODS
from benchmarks.few_shot.results import (
    cells,
    confirming,
    difference,
    outcomes,
    share_above,
    step_ratio,
    tuned,
    untuned,
    worst,
)

__all__ = [
    "ACCURACIES", "accuracies", "by_rate", "goals", "measures", "rough", "sequence", "shots", "table", "wins",
    "worst_rate",
]  # fmt: skip

OURS = "GradGuide"
ACCURACIES = {"target_accuracy": "target %", "source_accuracy": "source kept %"}
_COMPARED = [head for title in ACCURACIES.values() for head in (title, f"difference from {BASE}")]

Check = Callable[[pd.DataFrame], tuple[str, bool]]
"""Returns what was found of a goal, in words, and whether it is reached."""

table = partial(markdown.table, rule=" --- ")


def accuracies(rows: pd.DataFrame, view: str) -> str:
    """Return accuracies and their paired differences from the baseline; ``view`` is "untuned" or "tuned"."""
    made = {column: (untuned if view == "untuned" else tuned)(rows, column) for column in ACCURACIES}
    lines = []
    for method in _methods(rows):
        line = [method]
        for values in made.values():
            line += _compared(values, method) if method in values else ["", ""]
        lines.append(line)
    return table(["method", *_COMPARED], lines)


def worst_rate(rows: pd.DataFrame) -> str:
    """Return accuracies at the worst rate of each method."""
    found = {column: worst(rows, column) for column in ACCURACIES}
    lines = [
        [method, *(f"{values[method].mean():.1f}" for values in found.values())] for method in _methods(rows)
    ]  # fmt: skip
    return table(["method", *ACCURACIES.values()], lines)


def wins(rows: pd.DataFrame) -> str:
    """Return the numbers of cells in which a method is above, level with and below the baseline."""
    lines = []
    for method in _methods(rows):
        if method == BASE:
            continue
        line = [method]
        for column in ACCURACIES:
            counted = outcomes(rows, column, method)
            line.append(" / ".join(str(counted[key]) for key in ("wins", "ties", "losses")))
        lines.append(line)
    return table(["method", "target: wins / ties / losses", "source: wins / ties / losses"], lines)


def measures(rows: pd.DataFrame) -> str:
    """Return means of stability, alignment and cost, and the share of cells (set, rate) above the baseline."""
    lines = []
    for method in _methods(rows):
        mine = rows[rows["method"] == method]
        line = [method]
        for column in ("coherence", "successive_cosine", "alignment"):
            share = "" if method == BASE else f" ({100 * share_above(cells(rows, column), method):.0f}%)"
            line.append(f"{mine[column].mean():.3f}{share}")
        line += [_ratio(rows, method), f"{mine['memory'].mean() / 2**20:.1f}", f"{mine['steps_to_final'].mean():.0f}"]
        lines.append(line)
    heads = [
        "coherence", "successive cosine", "alignment with the pool", "time of a step", "MiB held", "steps to final",
    ]  # fmt: skip
    return table(["method", *heads], lines) + (
        "\n\nIn brackets: share of the cells (set, rate) in which the mean over seeds is above the base's. Time of a "
        "step: forward, backward and optimizer, over the base's, median of the pairs of one version. MiB: beside "
        "parameters and gradients."
    )


def by_rate(rows: pd.DataFrame) -> str:
    """Return accuracies at each rate, and the paired difference of the mean target accuracy from the baseline."""
    means = {column: rows.pivot_table(index="method", columns="lr", values=column) for column in ACCURACIES}
    target = untuned(rows, "target_accuracy")
    rates = sorted(rows["lr"].unique())
    lines = [
        [
            method,
            *(" / ".join(f"{values.loc[method, lr]:.1f}" for values in means.values()) for lr in rates),
            *_compared(target, method),
        ]
        for method in _methods(rows)
        if method in target
    ]
    heads = ["method", *(f"{lr:g}" for lr in rates), "target, mean over rates", f"difference from {BASE}"]
    return "Target / source kept, %, by rate:\n\n" + table(heads, lines)


def sequence(rows: pd.DataFrame) -> str:
    """Return the average accuracy over the five tasks, untuned and at the best rate, and backward transfer."""
    means = rows.groupby(["method", "lr"])["target_accuracy"].mean().unstack("lr")
    mean = untuned(rows, "target_accuracy")
    lines = []
    for method in _methods(rows):
        if method not in mean:
            continue
        mine = rows[rows["method"] == method]
        lines.append([
            method,
            *_compared(mean, method),
            f"{means.loc[method].max():.1f} at {means.loc[method].idxmax():g}",
            f"{mine['backward_transfer'].mean():+.1f}",
            _ratio(rows, method),
        ])  # fmt: skip
    heads = ["average accuracy", f"difference from {BASE}", "at its best rate", "backward transfer", "time of a step"]
    return table(["method", *heads], lines)


def _compared(values: pd.DataFrame, method: str) -> list[str]:
    """Return two cells: the method's mean, and its paired difference from the baseline."""
    return [f"{values[method].mean():.1f}", "" if method == BASE else str(difference(values, method))]


def _ratio(rows: pd.DataFrame, method: str) -> str:
    found = step_ratio(rows, method)
    return "" if math.isnan(found) else f"{found:.2f}"


def rough(rows: pd.DataFrame) -> str:
    """Return accuracy, its standard deviation over seeds, and diverged runs, by condition."""
    lines = []
    for condition, part in rows.groupby("condition", sort=False):
        means = untuned(part, "target_accuracy")
        for method in _methods(part):
            mine = part[part["method"] == method]
            spread = mine.groupby(["target", "lr"])["target_accuracy"].std().mean()
            lines.append([
                str(condition), method, f"{mine['target_accuracy'].mean():.1f}",
                "" if method == BASE or method not in means else str(difference(means, method)),
                f"{spread:.1f}", f"{mine['source_accuracy'].mean():.1f}", f"{mine['diverged'].sum()} of {len(mine)}",
            ])  # fmt: skip
    heads = [
        "condition", "method", "target %", f"difference from {BASE}", "spread over seeds", "source kept %", "diverged",
    ]  # fmt: skip
    return table(heads, lines)


def shots(rows: pd.DataFrame) -> str:
    """Return accuracies by number of shots, untuned view."""
    lines = []
    for count, part in rows.groupby("shots"):
        made = {column: untuned(part, column) for column in ACCURACIES}
        for method in _methods(part):
            if all(method in values for values in made.values()):
                cells_of = [cell for values in made.values() for cell in _compared(values, method)]
                lines.append([str(count), method, *cells_of])
    return table(["shots", "method", *_COMPARED], lines)


def _methods(rows: pd.DataFrame) -> list[str]:
    """Return the methods of ``rows`` in the order of ``METHODS``; methods of earlier grids come last."""
    found = set(rows["method"])
    return [m for m in METHODS if m in found] + sorted(found - set(METHODS))


def goals(rows: pd.DataFrame) -> str:
    """Return the goals set before the evaluation: what was found, and whether it is reached; "not run" without rows."""
    return markdown.table(
        ["goal", "found", "reached"], [[goal, *_checked(check, rows)] for goal, check in _GOALS.items()]
    )


def _checked(check: Check, rows: pd.DataFrame) -> tuple[str, str]:
    try:
        found, reached = check(rows)
    except (KeyError, ValueError, IndexError):  # rows of a method or a scenario are missing
        return "not run", ""
    return found, "yes" if reached else "**no**"


def _untuned(column: str, least: float) -> Check:
    def check(rows: pd.DataFrame) -> tuple[str, bool]:
        found = difference(untuned(confirming(rows), column), OURS)
        return str(found), found.mean >= least and found.low > 0

    return check


def _worst_target(rows: pd.DataFrame) -> tuple[str, bool]:
    part = confirming(rows)
    ours = worst(part, "target_accuracy")[OURS].mean()
    best = tuned(part, "target_accuracy")[BASE].mean()
    return f"{ours:.1f}, base tuned {best:.1f}", bool(ours >= best - 1.0)


def _worst_source(rows: pd.DataFrame) -> tuple[str, bool]:
    part = confirming(rows)
    share = 100 * worst(part, "source_accuracy")[OURS].mean() / part["source_accuracy_before"].mean()
    return f"{share:.1f}%", bool(share >= 90.0)


def _tuned_target(rows: pd.DataFrame) -> tuple[str, bool]:
    found = difference(tuned(confirming(rows), "target_accuracy"), OURS)
    return str(found), found.low > -0.3


def _tuned_source(rows: pd.DataFrame) -> tuple[str, bool]:
    found = difference(tuned(confirming(rows), "source_accuracy"), OURS)
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
        share = 100 * share_above(cells(confirming(rows), column), OURS)
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
