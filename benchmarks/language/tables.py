"""The report's tables, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd

from benchmarks import markdown
from benchmarks.few_shot.results import Difference
from benchmarks.language import grid
from benchmarks.language.frontier import Frontier, minus
from benchmarks.language.grid import BASE
from benchmarks.language.methods import family
from benchmarks.language.results import (
    PAIR,
    against,
    against_best,
    at_shared_rates,
    outcomes,
    per_pair,
    shown,
    tuned,
    worst,
)

__all__ = ["areas", "at_best", "by_rate", "compared", "forgetting", "order", "steadiness"]

COLUMNS = {
    "target_accuracy": ("target %", 1), "target_loss": ("target loss", 3), "drift": ("drift", 3),
    "drift_answers": ("on answers", 3), "source_accuracy": ("source %", 1), "kept": ("kept %", 1),
    "learnt_accuracy": ("just learnt %", 1), "forgetting": ("forgotten", 1),
}  # fmt: skip
"""Heading and digits of what is measured."""
_STEADINESS = ("coherence", "successive_cosine", "alignment")

table = partial(markdown.table, rule=" --- ")


def order(names: Sequence[str]) -> list[str]:
    """Return methods or families in the order of the grids; others come last."""
    known = [run.method for make in (grid.fresh, grid.sequence, grid.research) for run in make()]
    known = list(dict.fromkeys([*known, *map(family, known)]))
    return [name for name in known if name in names] + sorted(set(names) - set(known))


def by_rate(rows: pd.DataFrame, column: str, form: str) -> str:
    """Return means of ``column`` over targets and seeds: methods x rates, with the number of runs.

    A mean is nan if a run diverged. It is empty where there is no run.
    """
    means = rows.groupby(["method", "lr"])[column].agg(lambda values: values.mean(skipna=False))
    rates, counts = sorted(rows["lr"].unique()), rows.groupby("method").size()
    lines = [
        [
            method,
            *(format(means[method, lr], form) if (method, lr) in means else "" for lr in rates),
            str(counts[method]),
        ]
        for method in order(list(counts.index))
    ]
    return table(["method", *(f"{lr:g}" for lr in rates), "runs"], lines)


def compared(rows: pd.DataFrame, columns: Sequence[str]) -> str:
    """Return each method's means over the rates, untuned, with paired differences from the baseline.

    Rates are those that both methods have, and pairs (target, seed) those that both have at every such rate. "at its
    best rate": against the baseline at the rate that is best for it on the same pairs. The worst rate is that of the
    least mean accuracy, and of the largest drift.

    Args:
        columns: keys of ``COLUMNS``; the first one decides.
    """
    first, lines = columns[0], []
    for method in order(list(rows["method"].unique())):
        both = at_shared_rates(rows[rows["method"].isin([method, BASE])])
        values = {column: per_pair(both, column) for column in dict.fromkeys([*columns, "drift"])}
        if method not in values[first] or BASE not in values[first] or values[first].empty:
            continue
        mine = both[both["method"] == method]
        line = [method, f"{len(values[first])}", f"{both['lr'].nunique()}"]
        for column in columns:
            digits, found = COLUMNS[column][1], values[column]
            line.append(f"{found[method].mean():.{digits}f}" if method in found else "")
            if column in (first, "drift"):
                line.append(against(found, method, digits))
        line += [
            shown(against_best(both, method, first, values[first].index), COLUMNS[first][1]),
            str(outcomes(values[first], method)) if first != "target_loss" and method != BASE else "",
            f"{worst(mine, first, least=first != 'target_loss'):.{COLUMNS[first][1]}f}",
            f"{worst(mine, 'drift', least=False):.3f}",
            *_costs(mine),
        ]
        lines.append(line)
    heads = ["method", "pairs", "rates"]
    for column in columns:
        heads += [COLUMNS[column][0], *([f"minus {BASE}"] if column in (first, "drift") else [])]
    return table(
        [*heads, f"minus {BASE} at its best rate", "wins / ties / losses", "worst rate", "worst rate's drift",
         "modelled", "source MB", "ms per step"], lines,
    )  # fmt: skip


def at_best(rows: pd.DataFrame, columns: Sequence[str], by: str, others: pd.DataFrame | None = None) -> str:
    """Return each family at the strength and rate that are best elsewhere, see ``results.tuned``.

    Args:
        others: rows of other sets, on which strength and rate may be chosen too.
    """
    first, lines = columns[0], []
    chosen = tuned(pd.concat([rows, others]), by, first)
    chosen = chosen[chosen["target"].isin(rows["target"])]
    if chosen.empty:
        return "Too few runs."
    for name in order(list(chosen["family"].unique())):
        mine = chosen[chosen["family"] == name]
        both = chosen[chosen["family"].isin([name, BASE])]
        settings = "; ".join(
            f"{method} at {lr:g}" for method, lr in mine[["method", "lr"]].drop_duplicates().itertuples(index=False)
        )
        line = [name, settings, str(len(mine.groupby(PAIR)))]
        for column in columns:
            digits = COLUMNS[column][1]
            values = both.pivot_table(index=PAIR, columns="family", values=column)
            line.append(f"{mine[column].mean():.{digits}f}")
            if column == first:
                line.append(against(values, name, digits))
        lines.append(line)
    heads = ["method", "chosen", "pairs"]
    for column in columns:
        heads += [COLUMNS[column][0], *([f"minus {BASE}"] if column == first else [])]
    return table(heads, lines)


def areas(found: Mapping[str, Mapping[str, Frontier]], ours: str) -> str:
    """Return the area under each frontier, and how far that of ``ours`` is above it, by column.

    Args:
        found: frontiers by column and family.
    """
    columns = list(found)
    lines = []
    for name in order(list(dict.fromkeys(name for each in found.values() for name in each))):
        line = [name]
        for column in columns:
            digits = COLUMNS[column][1]
            mine, best = found[column].get(name), found[column].get(ours)
            line += ["", ""] if mine is None else [str(len(mine.pairs)), f"{mine.value:.{digits}f}"]
            if mine is None or best is None or name == ours:
                line.append("")
                continue
            mean, low, high, pairs = minus(best, mine, column)
            line.append(shown(Difference(mean, low, high), digits) + f", {pairs} pairs" if pairs else "")
        lines.append(line)
    heads = ["method"]
    for column in columns:
        heads += ["pairs", COLUMNS[column][0], f"{ours} minus it"]
    return table(heads, lines)


def forgetting(rows: pd.DataFrame) -> str:
    """Return the points that the tasks lost after their training, by position in the sequence, and by method."""
    lines = []
    for method in order(list(rows["method"].unique())):
        lost = []
        for tasks in rows[rows["method"] == method]["tasks"].dropna():
            parts = [part.split() for part in tasks.split("; ")]
            lost.append([100 * (float(learnt) - float(last)) for _, learnt, last in parts])
        if lost:
            means = pd.DataFrame(lost).mean()
            lines.append([method, *(f"{value:.1f}" for value in means), str(len(lost))])
    width = max((len(line) for line in lines), default=2) - 2
    return table(["method", *(f"task {number}" for number in range(1, width + 1)), "runs"], lines)


def steadiness(rows: pd.DataFrame) -> str:
    """Return the means of the gradients' measures, and in how many cells (set, rate, seed) they are above the baseline.

    Rows without them are left out; see the option ``--stability``.
    """
    measured = rows.dropna(subset=["coherence"])
    cells = {
        column: measured.pivot_table(index=[*PAIR, "lr"], columns="method", values=column) for column in _STEADINESS
    }
    lines = []
    for method in order(list(measured["method"].unique())):
        line = [method]
        for column in _STEADINESS:
            found = cells[column]
            line.append(f"{found[method].mean():.3f}" if method in found else "")
            both = found[[method, BASE]].dropna() if {method, BASE} <= set(found.columns) else found.iloc[:0]
            above = (
                ""
                if method == BASE or both.empty
                else f"{100 * (both[method] > both[BASE]).mean():.0f}% of {len(both)}"
            )
            line.append(above)
        lines.append(line)
    heads = [head for column in _STEADINESS for head in (column.replace("_", " "), f"above {BASE}")]
    return table(["method", *heads], lines)


def _costs(mine: pd.DataFrame) -> list[str]:
    """Return modelled drift, megabytes of source data, and milliseconds per step."""
    modelled = mine["modelled_drift"]
    return [
        f"{modelled.mean():.3f}" if modelled.notna().any() else "",
        f"{mine['source_bytes'].median() / 1e6:.0f}" if mine["source_bytes"].notna().any() else "",
        f"{1e3 * mine['seconds_per_step'].median():.0f}",
    ]
