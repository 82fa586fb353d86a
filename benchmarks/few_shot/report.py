"""The report, from the results alone: ``python -m benchmarks.few_shot.report`` writes few_shot.md and the figures."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.few_shot import figures, goals
from benchmarks.few_shot.grid import CONFIRMING, DEVELOPING, EVERY_METHOD, MAIN, ONE_RATE, SHOT_SETS, full
from benchmarks.few_shot.methods import BASE, METHODS
from benchmarks.few_shot.views import cells, difference, load, outcomes, step_ratio, tuned, untuned, worst
from gradguide.atomic import replacing

__all__ = ["compact", "one_rate", "summary", "table", "write"]

RESULTS = Path(__file__).parent.parent / "results"
_ACCURACIES = {"target_accuracy": "target %", "source_accuracy": "source kept %"}


def write(results: Path, out: Path) -> None:
    """Writes ``out`` (Markdown) and two figures beside it."""
    rows = load(results, grid=True)
    transfer = rows[(rows["scenario"] == "transfer") & (rows["condition"] == "clean")]
    standard = transfer[transfer["shots"] == 4]
    with replacing(out) as temporary:
        temporary.write_text(_markdown(rows, transfer, standard), encoding="utf-8")
    figures.by_rate(goals.transfer(rows), out.with_name(f"{out.stem}-rates.png"))
    figures.by_shots(_over_shots(transfer), out.with_name(f"{out.stem}-shots.png"))


def summary(results: Path) -> str:
    """A short table of every scenario in the file, untuned view, for a terminal."""
    rows = load(results)
    parts = [f"{name}\n{_accuracies(part, 'untuned')}" for name, part in rows.groupby("scenario")]
    return "\n\n".join(parts) + "\n\nmeans over the grid of rates; in brackets 95% bootstrap intervals of differences"


def compact(results: Path) -> str:
    """The README's table: both views and the worst rate, confirming sets, for the methods that run everywhere."""
    rows = load(results, grid=True)
    part = goals.transfer(rows)
    made = {column: (untuned(part, column), tuned(part, column), worst(part, column)) for column in _ACCURACIES}
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
        f"{title}: {view}" for title in _ACCURACIES.values() for view in ("mean over rates", "tuned", "worst rate")
    ]
    seeds = part["seed"].nunique()
    before = part["source_accuracy_before"].mean()
    return table(["method", *heads], lines) + (
        f"\n\n{', '.join(CONFIRMING)}; 4 shots, seeds: {seeds}, rates 1e-4, 5e-4, 2e-3 and 1e-2. The source was known "
        f"at {before:.1f}%. With a comma: paired difference from `{BASE}`, clip_grad_norm_ and AdamW, with its 95% "
        "bootstrap interval."
    )


def one_rate(results: Path) -> str:
    """The README's table of runs in which head and adapter learn at one rate."""
    rows = load(results, grid=True)
    part = rows[rows["condition"] == ONE_RATE]
    sets = ", ".join(part["target"].unique())
    return f"{_by_rate(part)}\n\n{sets}; 4 shots, seeds: {part['seed'].nunique()}; differences are paired."


def _markdown(rows: pd.DataFrame, transfer: pd.DataFrame, standard: pd.DataFrame) -> str:
    main = standard[standard["method"].isin(MAIN)]
    sections = (
        ("confirming sets", goals.transfer(rows)),
        ("developing sets", main[main["target"].isin(DEVELOPING)]),
        ("every method on two sets", _complete(standard[standard["target"].isin(EVERY_METHOD)])),
    )
    made = f"{(~rows['copied']).sum()} of {len(full())} runs, {rows['seed'].nunique()} seeds where goals are judged"
    parts = [
        "# Few-shot evaluation",
        f"{made}; torch {_all(rows, 'torch')}, commits {_all(rows, 'commit')}. Differences are paired (same samples, "
        f"head and order) against `{BASE}` (clip_grad_norm_ and AdamW), with 95% bootstrap intervals over (data set, "
        "seed). Accuracies in percent.",
        "## Goals, on the confirming sets",
        goals.table(rows),
    ]
    for name, part in sections:
        if part.empty:
            continue
        parts += [
            f"## Transfer, {name} ({', '.join(part['target'].unique())}), 4 shots, {_seeds(part)}",
            "### Untuned: mean over the grid of learning rates, 1e-4 to 1e-2",
            _accuracies(part, "untuned"),
            "### Tuned: the rate that is best for the target on the other sets",
            _accuracies(part, "tuned"),
            "### Worst rate of the grid, mean over sets",
            _worst(part),
            "### Stability, alignment and cost",
            _measures(part),
        ]
    parts += ["## Wins, ties and losses by cell, transfer", _outcomes(transfer)]
    for scenario, title in (("sequence", "Five tasks one after the other"), ("cross", "Cross-domain"),
                            ("digits", "Not language: handwritten digits"),
                            ("causal", "Causal language model")):  # fmt: skip
        part = rows[rows["scenario"] == scenario]
        if not part.empty:
            parts += [f"## {title}, {_seeds(part)}", *_scenario(part, scenario)]
    one_rate = rows[rows["condition"] == ONE_RATE]
    if not one_rate.empty:
        parts += [
            f"## One rate for head and adapter, {_seeds(one_rate)}",
            *_scenario(one_rate, "transfer"),
            _by_rate(one_rate),
        ]
    rough = rows[rows["scenario"] == "rough"]
    if not rough.empty:
        parts += [f"## Rough data, {_seeds(rough)}", _rough(rough)]
    shots = _over_shots(transfer)
    if shots["shots"].nunique() > 1:
        parts += [f"## Shots, untuned view, {_seeds(shots)}", _shots(shots)]
    return "\n\n".join(parts) + "\n"


def _seeds(rows: pd.DataFrame) -> str:
    counts = rows.groupby(["target", "shots", "method"])["seed"].nunique()
    fewest, most = counts.min(), counts.max()
    return f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"


def _complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the methods that ran on all sets there are: pairs are of what all methods have."""
    sets = rows.groupby("method")["target"].nunique()
    return rows[rows["method"].isin(sets.index[sets == sets.max()])]


def _accuracies(rows: pd.DataFrame, view: str) -> str:
    made = {column: (untuned if view == "untuned" else tuned)(rows, column) for column in _ACCURACIES}
    lines = []
    for method in _methods(rows):
        line = [method]
        for column in _ACCURACIES:
            values = made[column]
            if method not in values:
                line += ["", ""]
                continue
            line += [f"{values[method].mean():.1f}", "" if method == BASE else str(difference(values, method))]
        lines.append(line)
    heads = [part for title in _ACCURACIES.values() for part in (title, f"difference from {BASE}")]
    return table(["method", *heads], lines)


def _worst(rows: pd.DataFrame) -> str:
    found = {column: worst(rows, column) for column in _ACCURACIES}
    lines = [
        [method, *(f"{values[method].mean():.1f}" for values in found.values())] for method in _methods(rows)
    ]  # fmt: skip
    return table(["method", *_ACCURACIES.values()], lines)


def _outcomes(rows: pd.DataFrame) -> str:
    lines = []
    for method in _methods(rows):
        if method == BASE:
            continue
        line = [method]
        for column in _ACCURACIES:
            counted = outcomes(rows, column, method)
            line.append(" / ".join(str(counted[key]) for key in ("wins", "ties", "losses")))
        lines.append(line)
    return table(["method", "target: wins / ties / losses", "source: wins / ties / losses"], lines)


def _measures(rows: pd.DataFrame) -> str:
    """Means, and for stability and alignment the share of cells (set, rate) in which the mean is above the base's."""
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


def _scenario(rows: pd.DataFrame, scenario: str) -> list[str]:
    if scenario == "sequence":
        parts = []
        for half, part in rows.groupby("target"):
            parts += [f"### {str(half).capitalize()} sets", _sequence(part)]
        return parts
    return [
        "### Untuned", _accuracies(rows, "untuned"), "### Tuned", _accuracies(rows, "tuned"),
    ]  # fmt: skip


def _by_rate(rows: pd.DataFrame) -> str:
    """Target and source accuracy at each rate, and how far the mean target accuracy is from the base's."""
    means = {column: rows.pivot_table(index="method", columns="lr", values=column) for column in _ACCURACIES}
    target = untuned(rows, "target_accuracy")
    rates = sorted(rows["lr"].unique())
    lines = [
        [
            method,
            *(" / ".join(f"{values.loc[method, lr]:.1f}" for values in means.values()) for lr in rates),
            f"{target[method].mean():.1f}",
            "" if method == BASE else str(difference(target, method)),
        ]
        for method in _methods(rows)
        if method in target
    ]
    heads = ["method", *(f"{lr:g}" for lr in rates), "target, mean over rates", f"difference from {BASE}"]
    return "Target / source kept, %, by rate:\n\n" + table(heads, lines)


def _sequence(rows: pd.DataFrame) -> str:
    """Average accuracy over the five tasks, in both views, and backward transfer."""
    means = rows.groupby(["method", "lr"])["target_accuracy"].mean().unstack("lr")
    mean = untuned(rows, "target_accuracy")
    lines = []
    for method in _methods(rows):
        if method not in mean:
            continue
        mine = rows[rows["method"] == method]
        lines.append([
            method,
            f"{mean[method].mean():.1f}",
            "" if method == BASE else str(difference(mean, method)),
            f"{means.loc[method].max():.1f} at {means.loc[method].idxmax():g}",
            f"{mine['backward_transfer'].mean():+.1f}",
            _ratio(rows, method),
        ])  # fmt: skip
    heads = ["average accuracy", f"difference from {BASE}", "at its best rate", "backward transfer", "time of a step"]
    return table(["method", *heads], lines)


def _ratio(rows: pd.DataFrame, method: str) -> str:
    found = step_ratio(rows, method)
    return "" if math.isnan(found) else f"{found:.2f}"


def _rough(rows: pd.DataFrame) -> str:
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


def _shots(rows: pd.DataFrame) -> str:
    lines = []
    for shots, part in rows.groupby("shots"):
        made = {column: untuned(part, column) for column in _ACCURACIES}
        for method in _methods(part):
            if all(method in values for values in made.values()):
                cellsof = [
                    text
                    for values in made.values()
                    for text in (
                        f"{values[method].mean():.1f}",
                        "" if method == BASE else str(difference(values, method)),
                    )
                ]
                lines.append([str(shots), method, *cellsof])
    heads = [part for title in _ACCURACIES.values() for part in (title, f"difference from {BASE}")]
    return table(["shots", "method", *heads], lines)


def _over_shots(transfer: pd.DataFrame) -> pd.DataFrame:
    """Of the sets on which shots are studied, the methods and seeds that ran at all of them: four shots have more."""
    rows = transfer[transfer["target"].isin(SHOT_SETS)]
    for column in ("method", "seed"):
        counted = rows.groupby(column)["shots"].nunique()
        rows = rows[rows[column].isin(counted.index[counted == counted.max()])]
    return rows


def _methods(rows: pd.DataFrame) -> list[str]:
    """Methods in the order of ``METHODS``; others, such as candidates, after them."""
    found = set(rows["method"])
    return [m for m in METHODS if m in found] + sorted(found - set(METHODS))


def _all(rows: pd.DataFrame, column: str) -> str:
    return ", ".join(sorted(map(str, rows[column].unique())))


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    made = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in made)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_shot.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "few_shot.csv", help="file of results")
    parser.add_argument("--out", type=Path, default=RESULTS / "few_shot.md", help="where the report goes")
    options = parser.parse_args(argv)
    write(options.results, options.out)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
