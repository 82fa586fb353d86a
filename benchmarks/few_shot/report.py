"""Make the report from the results alone: ``python -m benchmarks.few_shot.report`` writes few_shot.md and figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from benchmarks import plotting
from benchmarks.few_shot import tables
from benchmarks.few_shot.grid import CONFIRMING, DEVELOPING, EVERY_METHOD, MAIN, ONE_RATE, SHOT_SETS, full
from benchmarks.few_shot.methods import BASE
from benchmarks.few_shot.results import confirming, difference, load, tuned, untuned, worst
from gradguide.utils.atomic import atomic_write

__all__ = ["compact", "one_rate", "summary", "write"]

RESULTS = Path(__file__).parent.parent / "results"


def write(results: Path, out: Path) -> None:
    """Write ``out`` (Markdown) and two figures beside it."""
    rows = load(results, grid=True)
    transfer = rows[(rows["scenario"] == "transfer") & (rows["condition"] == "clean")]
    standard = transfer[transfer["shots"] == 4]
    with atomic_write(out) as temporary:
        temporary.write_text(_markdown(rows, transfer, standard), encoding="utf-8")
    plotting.save(plotting.accuracies(confirming(rows), "lr"), out.with_name(f"{out.stem}-rates.png"))
    plotting.save(plotting.accuracies(_over_shots(transfer), "shots"), out.with_name(f"{out.stem}-shots.png"))


def summary(results: Path) -> str:
    """Return a short table of every scenario in the file, untuned view, for a terminal."""
    rows = load(results)
    parts = [f"{name}\n{tables.accuracies(part, 'untuned')}" for name, part in rows.groupby("scenario")]
    return "\n\n".join(parts) + "\n\nmeans over the grid of rates; in brackets 95% bootstrap intervals of differences"


def compact(results: Path) -> str:
    """Return the README's table: both views and the worst rate on the confirming sets, for the methods of ``MAIN``."""
    rows = load(results, grid=True)
    part = confirming(rows)
    made = {column: (untuned(part, column), tuned(part, column), worst(part, column)) for column in tables.ACCURACIES}
    lines = []
    for method in MAIN:
        line = [method]
        for mean, best, least in made.values():
            if method not in mean:
                break
            line.append(f"{mean[method].mean():.1f}" + ("" if method == BASE else f", {difference(mean, method)}"))
            line.append(f"{best[method].mean():.1f}")
            line.append(f"{least[method].mean():.1f}")
        if len(line) == 7:
            lines.append(line)
    heads = [
        f"{title}: {view}"
        for title in tables.ACCURACIES.values()
        for view in ("mean over rates", "tuned", "worst rate")
    ]
    seeds = part["seed"].nunique()
    before = part["source_accuracy_before"].mean()
    return tables.table(["method", *heads], lines) + (
        f"\n\n{', '.join(CONFIRMING)}; 4 shots, seeds: {seeds}, rates 1e-4, 5e-4, 2e-3 and 1e-2. The source was known "
        f"at {before:.1f}%. With a comma: paired difference from `{BASE}`, clip_grad_norm_ and AdamW, with its 95% "
        "bootstrap interval."
    )


def one_rate(results: Path) -> str:
    """Return the README's table of runs in which head and adapter have one learning rate."""
    rows = load(results, grid=True)
    part = rows[rows["condition"] == ONE_RATE]
    sets = ", ".join(part["target"].unique())
    return f"{tables.by_rate(part)}\n\n{sets}; 4 shots, seeds: {part['seed'].nunique()}; differences are paired."


def _markdown(rows: pd.DataFrame, transfer: pd.DataFrame, standard: pd.DataFrame) -> str:
    main = standard[standard["method"].isin(MAIN)]
    every = standard[standard["target"].isin(EVERY_METHOD)]
    late = _late(every)
    seeds = every[every["method"].isin(late)]["seed"]
    sections = (
        ("confirming sets", confirming(rows)),
        ("developing sets", _complete(main[main["target"].isin(DEVELOPING)], "target")),
        ("every method on two sets", _complete(every[~every["method"].isin(late)], "target")),
        ("methods with fewer seeds beside the others", every[every["seed"].isin(seeds)]),
    )
    made = f"{(~rows['copied']).sum()} of {len(full())} runs, {rows['seed'].nunique()} seeds where goals are judged"
    parts = [
        "# Few-shot evaluation",
        f"{made}; torch {_all(rows, 'torch')}, commits {_all(rows, 'commit')}. Differences are paired (same samples, "
        f"head and order) against `{BASE}` (clip_grad_norm_ and AdamW), with 95% bootstrap intervals over (data set, "
        "seed). Accuracies in percent.",
        "## Goals, on the confirming sets",
        tables.goals(rows),
    ]
    for name, part in sections:
        if part.empty:
            continue
        parts += [
            f"## Transfer, {name} ({', '.join(part['target'].unique())}), 4 shots, {_seeds(part)}",
            "### Untuned: mean over the grid of learning rates, 1e-4 to 1e-2",
            tables.accuracies(part, "untuned"),
            "### Tuned: the rate that is best for the target on the other sets",
            tables.accuracies(part, "tuned"),
            "### Worst rate of the grid, mean over sets",
            tables.worst_rate(part),
            "### Stability, alignment and cost",
            tables.measures(part),
        ]
    parts += ["## Wins, ties and losses by cell, transfer", tables.wins(transfer)]
    for scenario, title in (("sequence", "Five tasks one after the other"), ("cross", "Cross-domain"),
                            ("digits", "Not language: handwritten digits")):  # fmt: skip
        part = rows[rows["scenario"] == scenario]
        if not part.empty:
            parts += [f"## {title}, {_seeds(part)}", *_scenario(part, scenario)]
    one_rate = rows[rows["condition"] == ONE_RATE]
    if not one_rate.empty:
        parts += [
            f"## One rate for head and adapter, {_seeds(one_rate)}",
            *_scenario(one_rate, "transfer"),
            tables.by_rate(one_rate),
        ]
    rough = rows[rows["scenario"] == "rough"]
    if not rough.empty:
        parts += [f"## Rough data, {_seeds(rough)}", tables.rough(rough)]
    shots = _over_shots(transfer)
    if shots["shots"].nunique() > 1:
        parts += [f"## Shots, untuned view, {_seeds(shots)}", tables.shots(shots)]
    return "\n\n".join(parts) + "\n"


def _seeds(rows: pd.DataFrame) -> str:
    counts = rows.groupby(["target", "shots", "method"])["seed"].nunique()
    fewest, most = counts.min(), counts.max()
    return f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"


def _late(rows: pd.DataFrame) -> list[str]:
    """Return the methods with fewer seeds than the base."""
    seeds = rows.groupby("method")["seed"].nunique()
    return [str(method) for method in seeds.index[seeds < seeds.get(BASE, 0)]]


def _complete(rows: pd.DataFrame, over: str) -> pd.DataFrame:
    """Return the rows of the methods and seeds that ran at every value of ``over``, so that pairs are complete."""
    for column in ("method", "seed"):
        counted = rows.groupby(column)[over].nunique()
        rows = rows[rows[column].isin(counted.index[counted == counted.max()])]
    return rows


def _scenario(rows: pd.DataFrame, scenario: str) -> list[str]:
    if scenario == "sequence":
        parts = []
        for half, part in rows.groupby("target"):
            parts += [f"### {str(half).capitalize()} sets", tables.sequence(part)]
        return parts
    return [
        "### Untuned", tables.accuracies(rows, "untuned"), "### Tuned", tables.accuracies(rows, "tuned"),
    ]  # fmt: skip


def _over_shots(transfer: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the sets on which shots are studied."""
    return _complete(transfer[transfer["target"].isin(SHOT_SETS)], "shots")


def _all(rows: pd.DataFrame, column: str) -> str:
    return ", ".join(sorted(map(str, rows[column].unique())))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_shot.report", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "few_shot.csv", help="result file (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "few_shot.md", help="report to write (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    write(options.results, options.out)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
