"""The README's tables from committed results: ``python -m benchmarks.readme`` (``--check`` only compares)."""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.few_shot import goals
from benchmarks.few_shot.report import compact, one_rate
from benchmarks.few_shot.views import load
from gradguide.demo.report import paired_difference
from gradguide.utils.atomic import replacing

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"


def rows_of(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


MEDIANS = "Medians (20th to 80th percentile)"


def spread(row: dict[str, str], digits: int, unit: str = "") -> str:
    """Median with 20th and 80th percentile of a benchmark's row."""
    value, low, high = (f"{float(row[key]):.{digits}f}" for key in ("value", "low", "high"))
    return f"{value}{unit} ({low} to {high})"


def measured_on(row: dict[str, str]) -> str:
    """Where and with what a row was measured."""
    triton = f", Triton {row['triton']}" if row["device"].startswith("NVIDIA") else ""
    return f"{row['device']}, {row['threads']} threads, torch {row['torch']}{triton}, commit {row['commit']}"


def in_one_run(row: dict[str, str], of: str = "") -> str:
    """What figures are and where they are from, where rows were timed side by side."""
    return f"{MEDIANS}{of} over {row['rounds']} rounds in one run; {measured_on(row)}."


def demo_table(name: str) -> str:
    """Mean and standard deviation over the seeds of each method, and the paired difference with its 95% interval."""
    rows = rows_of(name)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    columns = {
        "target_accuracy": (100, 1),
        "source_accuracy": (100, 1),
        "coherence": (1, 2),
        "seconds_per_step": (1, 3),
    }
    values = {
        (method, column): [float(row[column]) * factor for row in rows if row["method"] == method]
        for method in methods
        for column, (factor, _) in columns.items()
    }
    lines = ["| method | target % | source kept % | coherence | s/step |", "|---|---|---|---|---|"]
    for method in methods:
        cells = []
        for column, (_, digits) in columns.items():
            found = values[method, column]
            cells.append(f"{statistics.fmean(found):.{digits}f} ± {statistics.stdev(found):.{digits}f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    base, *others = methods
    for method in others:
        cells = []
        for column, (_, digits) in columns.items():
            mean, half = paired_difference(values[method, column], values[base, column])
            cells.append(f"{mean:+.{digits}f} ± {half:.{digits}f}")
        lines.append(f"| difference | {' | '.join(cells)} |")
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    lines.append("")
    lines.append(
        f"Target {first['target']}, {first['shots']} shots, {first['steps']} steps of AdamW at {first['lr']}, {seeds} "
        f"seeds: mean ± standard deviation, and the mean of the paired differences ± half of its 95% t-interval. The "
        f"source accuracy before adaptation is {100 * float(first['source_accuracy_before']):.1f}%."
    )
    return "\n".join(lines)


def step_table() -> str:
    """Ratio to clipping and AdamW, and memory, of each provider."""
    rows = rows_of("step.csv")
    found = {(row["benchmark"], row["provider"], row["metric"]): row for row in rows}
    lora = rows[0]["benchmark"]
    training = next(row["benchmark"] for row in rows if row["benchmark"] != lora)
    ratio = next(row["metric"] for row in rows if row["unit"] == "ratio")
    memory = next(row["metric"] for row in rows if row["unit"] == "bytes per parameter")
    share = next(row["metric"] for row in rows if row["unit"] == "%")
    lines = [f"| on CPU | {ratio} | extra bytes per parameter | share of a MiniLM training step |", "|---|---|---|---|"]
    for provider in dict.fromkeys(row["provider"] for row in rows if row["benchmark"] == lora):
        time, held = found[lora, provider, ratio], found[lora, provider, memory]
        added = found.get((training, provider, share))
        cells = [
            spread(time, 2),
            f"{float(held['value']):.1f}",
            "" if added is None else f"{float(added['value']):.1f}%",
        ]
        lines.append(f"| {provider} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", in_one_run(rows[0])])


def gpu_step_table() -> str:
    """Ratio to clipping and AdamW on a GPU, of each provider and set, and the share of a training step."""
    rows = [
        row for name in ("step-lora", "step-whole") for row in rows_of(f"h200/{name}.csv") if row["unit"] == "ratio"
    ]
    found = {(row["benchmark"], row["provider"]): row for row in rows}
    added = {row["provider"]: row for row in rows_of("h200/training.csv") if row["unit"] == "%"}
    sets = list(dict.fromkeys(row["benchmark"] for row in rows))
    lines = [f"| on an H200 | {' | '.join(sets)} | share of a training step |", "|---" * (len(sets) + 2) + "|"]
    for provider in dict.fromkeys(row["provider"] for row in rows):
        share = spread(added[provider], 1, "%") if provider in added else ""
        cells = " | ".join(spread(found[name, provider], 2) for name in sets)
        lines.append(f"| {provider} | {cells} | {share} |")
    return "\n".join([*lines, "", in_one_run(rows[0], f" of {rows[0]['metric']}")])


def kernels_table() -> str:
    """Time of each kernel and its bandwidth over that of a copy."""
    rows = rows_of("h200/kernels.csv")
    found = {(row["provider"], row["unit"]): row for row in rows}
    lines = ["| kernel, 2^28 elements | ms | GB/s | share of the copy's |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["provider"] for row in rows):
        cells = (
            spread(found[name, "ms"], 2),
            f"{float(found[name, 'GB/s']['value']):.0f}",
            spread(found[name, "%"], 0, "%"),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", in_one_run(rows[0])])


def peers_table(name: str, where: str) -> str:
    """Time of other ways to reconcile two gradients, over GradGuide's."""
    rows = [row for row in rows_of(name) if row["unit"] == "ratio"]
    lines = [f"| on {where}, the same vectors | time / GradGuide's |", "|---|---|"]
    lines += [f"| {row['provider']} | {spread(row, 2)} |" for row in rows]
    return "\n".join([*lines, "", in_one_run(rows[0])])


def communication_table() -> str:
    """All-reduces of a step, and bytes that they move, by optimizer and number of ranks."""
    rows = [row for row in rows_of("communication.csv") if row["optimizer"] != "AdamW"]
    ranks = list(dict.fromkeys(row["ranks"] for row in rows))
    sizes = list(dict.fromkeys(row["parameters"] for row in rows))
    found = {(row["optimizer"], row["parameters"], row["ranks"]): row for row in rows}
    heads = [f"bytes per rank, {count} ranks" for count in ranks]
    lines = [f"| GradGuide with | all-reduces | {' | '.join(heads)} |", "|---" * (2 + len(ranks)) + "|"]
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
        cells = []
        for count in ranks:
            each = {found[optimizer, size, count]["bytes_moved_per_rank"] for size in sizes}
            cells.append(" or ".join(f"{float(moved):.0f}" for moved in sorted(each)))
        reduces = found[optimizer, sizes[0], ranks[0]]["all_reduces_per_step"]
        lines.append(f"| {optimizer} | {reduces} | {' | '.join(cells)} |")
    about = rows[0]
    lines.append("")
    lines.append(
        f"The same at {' as at '.join(sizes)} parameters. Measured on {ranks[0]} ranks (gloo), computed for more by a "
        f"ring's 2 (n - 1) / n; torch {about['torch']}, commit {about['commit']}."
    )
    return "\n".join(lines)


def capture_table() -> str:
    """Time of capturing a source against the same passes alone, and what reading metrics adds to a step."""
    rows = rows_of("capture.csv")
    lines = ["| what | against | found |", "|---|---|---|"]
    for row in rows:
        if float(row["value"]) != 1.0:
            found = spread(row, 1, "%") if row["unit"] == "%" else spread(row, 2)
            lines.append(f"| {row['benchmark']}: {row['provider']} | {row['metric']} | {found} |")
    return "\n".join([*lines, "", f"{MEDIANS}; {measured_on(rows[0])}."])


def objective_table() -> str:
    """Time of a step with each form of the exact objective against one without."""
    rows = rows_of("objective.csv")
    lines = [f"| {rows[0]['benchmark']} | {rows[0]['metric']} |", "|---|---|"]
    lines += [f"| {row['provider']} | {spread(row, 2)} |" for row in rows]
    told = f"{MEDIANS} over {rows[0]['rounds']} rounds in one run, attention eager in all; {measured_on(rows[0])}."
    return "\n".join([*lines, "", told])


TABLES: dict[str, Callable[[], str]] = {
    "demo": partial(demo_table, "demo-clinc150.csv"),
    "demo-high": partial(demo_table, "demo-clinc150-lr1e-2.csv"),
    "few-shot": lambda: compact(RESULTS / "few_shot.csv"),
    "few-shot-one-rate": lambda: one_rate(RESULTS / "few_shot.csv"),
    "few-shot-goals": lambda: goals.table(load(RESULTS / "few_shot.csv", grid=True)),
    "step": step_table,
    "peers": partial(peers_table, "peers.csv", "CPU"),
    "gpu-step": gpu_step_table,
    "gpu-kernels": kernels_table,
    "gpu-peers": partial(peers_table, "h200/peers.csv", "an H200"),
    "objective": objective_table,
    "capture": capture_table,
    "communication": communication_table,
}


def filled(text: str) -> str:
    """The README's text with every marked table made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name}: .*? -->\n).*?(<!-- end -->)"
        if not re.search(pattern, text, flags=re.DOTALL):
            raise ValueError(f"README has no place for the table {name!r}")
        made = table()
        text = re.sub(pattern, lambda match, made=made: match[1] + made + "\n" + match[2], text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a table is not what the results say")
    options = parser.parse_args(argv)
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if options.check:
        return int(before != after)
    with replacing(README) as temporary:
        temporary.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
