"""Bars of times, from a result file alone: ``python -m benchmarks.plot FILE.csv --out FILE.png``."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

from gradguide.utils.atomic import replacing


def draw(rows: list[dict[str, str]], unit: str) -> Figure:
    """One panel per benchmark: the median of each provider, with its 20th and 80th percentile.

    Raises:
        ValueError: no row has this unit.
    """
    chosen = [row for row in rows if row["unit"] == unit]
    if not chosen:
        raise ValueError(f"no result is in {unit!r}; the file has {sorted({row['unit'] for row in rows})}")
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in chosen))
    height = sum(0.8 + 0.28 * sum(row["benchmark"] == name for row in chosen) for name in benchmarks)
    figure = Figure(figsize=(9, height), layout="constrained")
    panels = figure.subplots(len(benchmarks), 1, squeeze=False)[:, 0]
    for axes, name in zip(panels, benchmarks, strict=True):
        these = [row for row in chosen if row["benchmark"] == name]
        labels = [f"{row['provider']} ({row['metric']})" for row in these]
        values = [float(row["value"]) for row in these]
        below = [max(0.0, float(row["value"]) - float(row["low"])) for row in these]
        above = [max(0.0, float(row["high"]) - float(row["value"])) for row in these]
        axes.barh(range(len(these)), values, xerr=[below, above], color="#1a73e8", ecolor="#5f6368", height=0.6)
        axes.set_yticks(range(len(these)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel(unit, fontsize=8)
    about = rows[0]
    figure.suptitle(f"{about['device']}, torch {about['torch']}, commit {about['commit']}", fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="a file that a benchmark wrote")
    parser.add_argument("--unit", default="ratio", help="which results to draw (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="image file")
    options = parser.parse_args(argv)
    with options.results.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with replacing(options.out) as temporary:
        draw(rows, options.unit).savefig(temporary, dpi=130)


if __name__ == "__main__":
    main()
