"""Make the report from the results alone: ``python -m benchmarks.language.report --results FILE --out FILE.md``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Container
from pathlib import Path

import pandas as pd

from benchmarks import plotting
from benchmarks.few_shot.results import Difference
from benchmarks.language import tables
from benchmarks.language.frontier import CAP, Frontier, frontier, minus
from benchmarks.language.grid import BASE, CHOOSING, CONFIRMING, default_strength
from benchmarks.language.results import PAIR, against, against_best, at_shared_rates, load, per_pair, shown, worst
from gradguide.utils.atomic import atomic_write

__all__ = ["compact", "load", "ours", "summary", "write"]

_OURS = ("structured", "structured direction=on")
"""The method that others are compared with in frontiers: the first that a file has. The second had the defaults of
version 0.2."""
_COMPACT = {
    BASE: "clip_grad_norm_ + AdamW",
    "l2sp:1": "L2-SP",
    "early:0.1": "Early stopping at a drift of 0.1",
    "ewc-lora:100": "EWC-LoRA",
    "lora-null": "LoRA-Null",
    "corda": "CorDA, knowledge-preserving",
    "null": "A in unused directions, frozen (after LoRA-Null)",
    "kl:1": "KL term on own text: two more passes per step",
    "structured weight=10 text=own direction=on": "GradGuide with a direction, weight 10, own text",
    "structured direction=on": "GradGuide with a direction, structured source",
    "structured": "GradGuide, structured source",
    "structured text=own": "GradGuide, structured source from own text",
}
"""Methods of the compact table, with their names there."""
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


def ours(methods: Container[str]) -> str:
    """Return the method that others are compared with in frontiers."""
    return next((name for name in _OURS if name in methods), _OURS[0])


def summary(path: Path) -> str:
    """Return the tables of the file, for a terminal."""
    rows = load(path) if path.exists() else pd.DataFrame()
    return f"{path} has no finished run" if rows.empty else "\n\n".join(_sections(rows))


def compact(path: Path, methods: Collection[str] = tuple(_COMPACT), option: str = "") -> str:
    """Return one line for each of ``methods`` in scenario (a) that the file has, over the pairs that all of them have.

    A pair is a target and a seed. The frontiers need runs of ``none``, the model before training.

    Args:
        option: an option that all of the methods have in the file, such as ``schedule=linear``.
    """
    rows = _standard(load(path))
    if option:
        with_option = rows["method"].str.endswith(f" {option}")
        rows = rows[with_option | (rows["steps"] == 0)].assign(method=rows["method"].str.removesuffix(f" {option}"))
    trained = at_shared_rates(rows[(rows["steps"] > 0) & rows["method"].isin(methods)])
    labels = {name: label for name, label in _COMPACT.items() if name in set(trained["method"])}
    values = {column: per_pair(trained, column) for column in ("target_accuracy", "target_loss", "drift")}
    pairs = values["drift"].index
    mine = trained[trained.set_index(PAIR).index.isin(pairs)]
    each = rows[rows.set_index(PAIR).index.isin(pairs)]
    each = each.assign(family=each["method"])  # a frontier of its own for each method, at the same number of settings
    fronts = {name: frontier(each, name, "target_accuracy") for name in labels}
    best = fronts[ours(labels)]
    lines = []
    for name, label in labels.items():
        runs, front = mine[mine["method"] == name], fronts[name]
        line = [
            label,
            f"{values['target_accuracy'][name].mean():.1f}",
            against(values["target_accuracy"], name, 1),
            shown(against_best(mine, name, "target_accuracy", pairs), 1),
            f"{worst(runs, 'target_accuracy', least=True):.1f}",
            f"{values['target_loss'][name].mean():.2f}",
            f"{values['drift'][name].mean():.3f}",
            f"{worst(runs, 'drift', least=False):.3f}",
        ]
        if best is not None and front is not None:
            mean, low, high, _ = minus(best, front, "target_accuracy")
            line.append("" if name == ours(labels) else shown(Difference(mean, low, high), 1))
        lines.append(line)
    heads = [
        "method", "target %: mean over rates", "minus clip", "minus clip at clip's best rate", "target %: lowest",
        "target loss", "drift: mean", "drift: highest",
    ]  # fmt: skip
    area = ""
    if best is not None:
        heads.append("frontier: the structured source's minus this")
        area = f" The frontier is the best target % within a drift of 0 to {CAP} nats per token, over the rates."
    targets = ", ".join(dict.fromkeys(target for target, _ in pairs))
    rates = ", ".join(f"{lr:g}" for lr in sorted(mine["lr"].unique()))
    return tables.table(heads, lines) + (
        f"\n\n{len(pairs)} pairs of target ({targets}) and seed; rates {rates}; {_all(rows, 'device')}, torch "
        f"{_all(rows, 'torch')}. Differences are paired, in points, with 95% bootstrap intervals.{area}"
    )


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
            plotting.save(plotting.frontiers(found, CAP, ours(found[_FRONTIERS[0]])), picture)
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
            *_views(trained, "fresh", "target", standard[(standard["steps"] > 0) & ~standard["target"].isin(sets)]),
        ]
        found = _frontiers(standard, sets)
        if any(found.values()):
            parts += [
                f"### Frontier: means of the best target within a drift of 0 to {CAP} nats",
                tables.areas(found, ours(found[_FRONTIERS[0]])),
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
    other = rows[(rows["scenario"] == "fresh") & (rows["steps"] > 0) & ~rows.index.isin(standard.index)]
    for (shots, scaled), part in other.groupby(["shots", other["steps"] != 40]):
        steps = " or ".join(f"{number}" for number in sorted(part["steps"].unique()))
        title = f"({'d' if scaled else 'a'}) {shots} rows per class, {steps} steps"
        parts += [f"## {title}", *_views(part, "fresh", "target")]
    return parts


def _views(rows: pd.DataFrame, scenario: str, by: str, others: pd.DataFrame | None = None) -> list[str]:
    columns = _COLUMNS[scenario]
    return [
        "### Untuned: means over the rates", tables.compared(rows, columns),
        f"### Tuned: strength and rate chosen on other {by}s", tables.at_best(rows, columns, by, others),
    ]  # fmt: skip


def _standard(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of scenario (a) with 8 rows per class and 40 steps, and the untrained ones."""
    return rows[(rows["scenario"] == "fresh") & (rows["shots"] == 8) & rows["steps"].isin([0, 40])]


def _frontiers(rows: pd.DataFrame, sets: tuple[str, ...]) -> dict[str, dict[str, Frontier]]:
    """Return the frontier of each family on some sets, by column, on the pairs that all of them have.

    Each has its default strength, where the file has that: a choice among more settings would favour a family.
    A family with at most half of the pairs of the others is left out: the grid was stopped early.
    """
    part = rows[rows["target"].isin(sets)]
    default = part["method"] == part["family"].map(default_strength)
    part = part[default | ~part["family"].isin(part["family"][default])]
    names = [name for name in tables.order(list(part["family"].unique())) if name != "none"]
    first = {name: found for name in names if (found := frontier(part, name, _FRONTIERS[0])) is not None}
    most = max((len(each.pairs) for each in first.values()), default=0)
    first = {name: each for name, each in first.items() if 2 * len(each.pairs) > most}
    shared = set.intersection(*(set(each.pairs) for each in first.values())) if first else set()
    part = part[part.set_index(PAIR).index.isin(shared)]
    return {
        column: {name: found for name in first if (found := frontier(part, name, column)) is not None}
        for column in _FRONTIERS
    }


def _all(rows: pd.DataFrame, column: str) -> str:
    return ", ".join(sorted(map(str, rows[column].unique())))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language.report", description=__doc__)
    folder = Path(__file__).parent.parent / "results"
    parser.add_argument("--results", type=Path, default=folder / "language-full.csv", help="result file")
    parser.add_argument("--out", type=Path, default=folder / "language-full.md", help="report to write")
    options = parser.parse_args(argv)
    if not options.results.is_file():
        parser.error(f"--results must be an existing file of results, found {str(options.results)!r}")
    write(options.results, options.out)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
