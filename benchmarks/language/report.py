"""Make the report from the results alone: ``python -m benchmarks.language.report --results FILE --out FILE.md``."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks import markdown
from benchmarks.few_shot.results import Difference, difference, untuned
from benchmarks.language.grid import BASE, research
from gradguide.utils.atomic import atomic_write

__all__ = ["by_rate", "compared", "load", "summary", "write"]

_PAIR = ["target", "seed"]
_KEY = ["target", "shots", "steps", "method", "lr", "seed"]
_COLUMNS = {
    "target_accuracy": "target %",
    "target_loss": "target loss",
    "drift": "drift",
    "drift_answers": "on answers",
}

table = partial(markdown.table, rule=" --- ")


def load(path: Path) -> pd.DataFrame:
    """Return the rows without an error, the last one of each run, with accuracies in percent."""
    rows = pd.read_csv(path)
    rows = rows[rows["error"].isna()].drop_duplicates(_KEY, keep="last")
    rows["target_accuracy"] *= 100
    return rows


def by_rate(rows: pd.DataFrame, column: str, form: str) -> str:
    """Return means of ``column`` over targets and seeds: methods x rates, with the number of runs."""
    means = rows.pivot_table(index="method", columns="lr", values=column)
    counts = rows.groupby("method").size()
    lines = [
        [method, *(format(v, form) if pd.notna(v) else "" for v in means.loc[method]), str(counts[method])]
        for method in _methods(rows)
    ]
    return table(["method", *(f"{lr:g}" for lr in means.columns), "runs"], lines)


def compared(rows: pd.DataFrame) -> str:
    """Return each method's means over the rates, with paired differences from the baseline.

    Pairs are (target, seed) that both methods have at every rate. "at its best rate": against the baseline at the rate
    that is best for it on the same pairs.
    """
    lines = []
    for method in _methods(rows):
        both = rows[rows["method"].isin([method, BASE])]
        rates = both["lr"].nunique()
        values = {column: untuned(both, column) for column in _COLUMNS}
        accuracy = values["target_accuracy"]
        if method not in accuracy or BASE not in accuracy or accuracy.empty:
            continue
        line = [method, f"{len(accuracy)}", f"{rates}"]
        line += [
            f"{accuracy[method].mean():.1f}",
            "" if method == BASE or len(accuracy) < 2 else _shown(difference(accuracy, method, BASE), 1),
        ]
        line.append(_shown(_against_best(both, method, accuracy.index), 1))
        for column in list(_COLUMNS)[1:]:
            found = values[column]
            line.append(f"{found[method].mean():.3f}")
            if column == "drift":
                line.append("" if method == BASE or len(found) < 2 else _shown(difference(found, method, BASE), 3))
        mine = rows[rows["method"] == method]
        line.append(f"{mine.groupby('lr')['drift'].mean().max():.3f}")
        line.append(f"{mine['modelled_drift'].mean():.3f}" if mine["modelled_drift"].notna().any() else "")
        line.append(f"{1e3 * mine['seconds_per_step'].median():.0f}")
        lines.append(line)
    heads = [
        "method", "pairs", "rates", "target %", f"minus {BASE}", f"minus {BASE} at its best rate", "target loss",
        "drift", f"minus {BASE}", "on answers", "worst rate's drift", "modelled", "ms per step",
    ]  # fmt: skip
    return table(heads, lines)


def summary(path: Path) -> str:
    """Return the tables of the file, for a terminal."""
    rows = load(path) if path.exists() else pd.DataFrame()
    return f"{path} has no finished run" if rows.empty else "\n\n".join(_sections(rows))


def write(results: Path, out: Path) -> None:
    """Write ``out`` (Markdown)."""
    rows = load(results)
    targets = ", ".join(map(str, rows["target"].unique()))
    parts = [
        "# A language model that is to be kept",
        f"{len(rows)} runs (the full grid has {len(research())}); targets {targets}; seeds: {rows['seed'].nunique()}; "
        f"torch {_all(rows, 'torch')}, {_all(rows, 'device')}, commits {_all(rows, 'commit')}. A fresh LoRA adapter "
        "learns a task from a few rows per class; drift is the KL from the base model in nats per token on held-out "
        f"text. Differences are paired against `{BASE}`, with 95% bootstrap intervals over (target, seed).",
        *_sections(rows),
    ]
    with atomic_write(out) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _sections(rows: pd.DataFrame) -> list[str]:
    return [
        "## Means over the rates", compared(rows),
        "## Target accuracy in percent, by rate", by_rate(rows, "target_accuracy", ".1f"),
        "## Target loss in nats per label, by rate", by_rate(rows, "target_loss", ".3f"),
        "## Drift on encyclopedia in nats per token, by rate", by_rate(rows, "drift", ".3f"),
        "## Drift on answered instructions in nats per token, by rate", by_rate(rows, "drift_answers", ".3f"),
    ]  # fmt: skip


def _against_best(both: pd.DataFrame, method: str, pairs: pd.Index) -> Difference:
    """Return the paired difference of the method's mean over the rates from the baseline at its best rate."""
    cells = both.pivot_table(index=_PAIR, columns=["method", "lr"], values="target_accuracy").loc[pairs]
    best = cells[BASE].mean().idxmax()
    return difference(pd.DataFrame({method: cells[method].mean(axis=1), "best": cells[BASE][best]}), method, "best")


def _shown(found: Difference, digits: int) -> str:
    if found.low == -float("inf"):
        return f"{found.mean:+.{digits}f} (one pair)"
    return f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


def _methods(rows: pd.DataFrame) -> list[str]:
    """Return the methods of ``rows`` in the order of the grid; others come last."""
    order = list(dict.fromkeys(run.method for run in research()))
    found = set(rows["method"])
    return [m for m in order if m in found] + sorted(found - set(order))


def _all(rows: pd.DataFrame, column: str) -> str:
    return ", ".join(sorted(map(str, rows[column].unique())))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language.report", description=__doc__)
    folder = Path(__file__).parent.parent / "results"
    parser.add_argument("--results", type=Path, default=folder / "language.csv", help="result file")
    parser.add_argument("--out", type=Path, default=folder / "language.md", help="report to write")
    options = parser.parse_args(argv)
    write(options.results, options.out)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
