"""Make the report from the results alone: ``python -m benchmarks.language.report --results FILE --out FILE.md``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from benchmarks import plotting
from benchmarks.language import tables
from benchmarks.language.frontier import CAP, Frontier, frontier
from benchmarks.language.grid import BASE, CHOOSING, CONFIRMING
from benchmarks.language.results import load
from gradguide.utils.atomic import atomic_write

__all__ = ["OURS", "load", "summary", "write"]

OURS = "structured"
_FRONTIERS = ("target_accuracy", "target_loss")
_COLUMNS = {
    "fresh": ["target_accuracy", "target_loss", "drift", "drift_answers"],
    "sequence": ["target_accuracy", "learnt_accuracy", "forgetting", "drift"],
    "transfer": ["target_accuracy", "source_accuracy", "kept", "drift"],
    "instructions": ["target_loss", "drift", "source_accuracy", "kept"],
}
"""Measured columns by scenario; the first one decides."""
_TITLES = {
    "fresh": "(a) A fresh adapter; the base model is to be kept",
    "sequence": "(c) Five tasks in a row",
    "transfer": "(b) A source task, then the target",
    "instructions": "(e) Answers of instructions are learnt",
}


def summary(path: Path) -> str:
    """Return the tables of the file, for a terminal."""
    rows = load(path) if path.exists() else pd.DataFrame()
    return f"{path} has no finished run" if rows.empty else "\n\n".join(_sections(rows))


def write(results: Path, out: Path) -> None:
    """Write ``out`` (Markdown), and the frontiers beside it if the file has runs of ``none``."""
    rows = load(results)
    parts = [
        "# A language model that is to be kept",
        f"{len(rows)} runs; torch {_all(rows, 'torch')}, {_all(rows, 'device')}, commits {_all(rows, 'commit')}. "
        "Drift is the KL from the base model in nats per token on held-out encyclopedia, and on answered instructions. "
        f"Differences are paired against `{BASE}`, with 95% bootstrap intervals over (target, seed). Strengths and "
        f"rates are chosen on {', '.join(CHOOSING)}; {', '.join(CONFIRMING)} confirm.",
        *_sections(rows),
    ]
    for name, sets in (("choosing", CHOOSING), ("confirming", CONFIRMING)):
        found = _frontiers(_standard(rows), sets)
        if any(found.values()):
            picture = out.with_name(f"{out.stem}-frontier-{name}.png")
            plotting.save(plotting.frontiers(found, CAP), picture)
            parts.append(f"![Target over drift on the {name} sets]({picture.name})")
    with atomic_write(out) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _sections(rows: pd.DataFrame) -> list[str]:
    standard = _standard(rows)
    parts: list[str] = []
    for name, sets in (("choosing", CHOOSING), ("confirming", CONFIRMING)):
        part = standard[standard["target"].isin(sets)]
        trained = part[part["steps"] > 0]
        if trained.empty:
            continue
        parts += [
            f"## {_TITLES['fresh']}: {name} sets ({', '.join(s for s in sets if s in set(part['target']))})",
            *_views(trained, "fresh", "target"),
        ]
        found = _frontiers(standard, sets)
        if any(found.values()):
            parts += [
                f"### Frontier: means of the best target within a drift of 0 to {CAP} nats",
                tables.areas(found, OURS),
            ]
        if trained["coherence"].notna().any():
            parts += ["### Steadiness of gradients", tables.steadiness(trained)]
        for column, form in (
            ("target_accuracy", ".1f"),
            ("target_loss", ".3f"),
            ("drift", ".3f"),
            ("drift_answers", ".3f"),
        ):
            heading = tables.COLUMNS[column][0]
            parts += [f"### By rate: {heading}", tables.by_rate(trained, column, form)]
    for scenario in ("sequence", "transfer", "instructions"):
        part = rows[(rows["scenario"] == scenario) & (rows["steps"] > 0)]
        if part.empty:
            continue
        parts += [f"## {_TITLES[scenario]}", *_views(part, scenario, "target" if scenario == "transfer" else "seed")]
        if scenario == "sequence":
            parts += ["### Points forgotten, by position in the sequence", tables.forgetting(part)]
        for column in _COLUMNS[scenario][:2]:
            parts += [
                f"### By rate: {tables.COLUMNS[column][0]}",
                tables.by_rate(part, column, f".{tables.COLUMNS[column][1]}f"),
            ]
    other = rows[(rows["scenario"] == "fresh") & ~rows.index.isin(standard.index)]
    for (shots, epochs), part in other.groupby(["shots", other["steps"] != 40]):
        title = f"(d) {shots} rows per class, three epochs" if epochs else f"(a) {shots} rows per class, 40 steps"
        parts += [f"## {title}", *_views(part, "fresh", "target")]
    return parts


def _views(rows: pd.DataFrame, scenario: str, by: str) -> list[str]:
    columns = _COLUMNS[scenario]
    return [
        "### Untuned: means over the rates", tables.compared(rows, columns),
        f"### Tuned: strength and rate chosen on other {by}s", tables.at_best(rows, columns, by),
    ]  # fmt: skip


def _standard(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of scenario (a) with 8 rows per class and 40 steps, and the untrained ones."""
    return rows[(rows["scenario"] == "fresh") & (rows["shots"] == 8) & rows["steps"].isin([0, 40])]


def _frontiers(rows: pd.DataFrame, sets: tuple[str, ...]) -> dict[str, dict[str, Frontier]]:
    """Return the frontier of each family on some sets, by column."""
    part = rows[rows["target"].isin(sets)]
    found = {
        column: {name: frontier(part, name, column) for name in tables.order(list(part["family"].unique()))}
        for column in _FRONTIERS
    }
    return {
        column: {name: each for name, each in families.items() if each is not None and name != "none"}
        for column, families in found.items()
    }


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
