"""Tables of the report, in Markdown, each from rows of results."""

from __future__ import annotations

import math
from functools import partial

import pandas as pd

from benchmarks import markdown
from benchmarks.few_shot import goals
from benchmarks.few_shot.methods import BASE, METHODS
from benchmarks.few_shot.results import cells, difference, outcomes, step_ratio, tuned, untuned, worst

__all__ = [
    "ACCURACIES",
    "accuracies",
    "by_rate",
    "measures",
    "rough",
    "sequence",
    "shots",
    "table",
    "wins",
    "worst_rate",
]

ACCURACIES = {"target_accuracy": "target %", "source_accuracy": "source kept %"}
_COMPARED = [head for title in ACCURACIES.values() for head in (title, f"difference from {BASE}")]


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
            share = "" if method == BASE else f" ({100 * goals.share_above(cells(rows, column), method):.0f}%)"
            line.append(f"{mine[column].mean():.3f}{share}")
        line += [_ratio(rows, method), f"{mine['memory'].mean() / 2**20:.1f}", f"{mine['steps_to_final'].mean():.0f}"]
        lines.append(line)
    heads = [
        "coherence",
        "successive cosine",
        "alignment with the pool",
        "time of a step",
        "MiB held",
        "steps to final",
    ]
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
        "condition",
        "method",
        "target %",
        f"difference from {BASE}",
        "spread over seeds",
        "source kept %",
        "diverged",
    ]
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
