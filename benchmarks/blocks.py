"""Tables of the READMEs, each made from committed results. ``BLOCKS`` has one function per block name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from scipy.stats import ttest_1samp

from benchmarks.few_shot import report, results, tables
from benchmarks.harness import BASELINE
from benchmarks.language import report as language
from benchmarks.markdown import table

__all__ = ["BLOCKS"]

RESULTS = Path(__file__).parent / "results"
FEW_SHOT = RESULTS / "few_shot.csv"
MEDIANS = "Medians (20th to 80th percentile)"

# Columns of a demo's results: head of the table, factor, digits.
DEMO_COLUMNS = {
    "target_accuracy": ("target %", 100, 1),
    "source_accuracy": ("source kept %", 100, 1),
    "coherence": ("coherence", 1, 2),
    "seconds_per_step": ("s/step", 1, 3),
}


def read(name: str) -> pd.DataFrame:
    """Return the rows of a result file. Texts that look like numbers (1e5) stay as they are written."""
    texts = dict.fromkeys(("commit", "parameters", "python", "torch", "triton"), str)
    return pd.read_csv(RESULTS / name, dtype=texts, keep_default_na=False)


def spread(row: pd.Series, digits: int, unit: str = "") -> str:
    """Return median with 20th and 80th percentile."""
    return f"{row['value']:.{digits}f}{unit} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def measured_on(row: pd.Series) -> str:
    """Return device and versions of a row."""
    triton = f", Triton {row['triton']}" if row["device"].startswith("NVIDIA") else ""
    return f"{row['device']}, {row['threads']} threads, torch {row['torch']}{triton}, commit {row['commit']}"


def side_by_side(row: pd.Series, of: str = "") -> str:
    """Return the line under a table whose providers were timed side by side."""
    return f"\n\n{MEDIANS}{of} over {row['rounds']} rounds in one run; {measured_on(row)}."


def demo(name: str) -> str:
    """Return mean and standard deviation over seeds of each method, and the paired difference with its t-interval."""
    rows = read(name)
    values = rows.pivot(index="seed", columns="method")
    base, *others = rows["method"].unique()
    lines = [
        [
            method,
            *(
                f"{factor * values[column, method].mean():.{digits}f} ± "
                f"{factor * values[column, method].std():.{digits}f}"
                for column, (_, factor, digits) in DEMO_COLUMNS.items()
            ),
        ]
        for method in (base, *others)
    ]
    for method in others:
        line = ["difference"]
        for column, (_, factor, digits) in DEMO_COLUMNS.items():
            pairs = factor * (values[column, method] - values[column, base])
            mean, interval = pairs.mean(), ttest_1samp(pairs, 0.0).confidence_interval(0.95)
            line.append(f"{mean:+.{digits}f} ± {(interval.high - interval.low) / 2:.{digits}f}")
        lines.append(line)
    first = rows.iloc[0]
    return table(["method", *(head for head, _, _ in DEMO_COLUMNS.values())], lines) + (
        f"\n\nTarget {first['target']}, {first['shots']} shots, {first['steps']} steps of AdamW at {first['lr']}, "
        f"{len(values)} seeds: mean ± standard deviation, and the mean of the paired differences ± half of its 95% "
        f"t-interval. The source accuracy before adaptation is {100 * first['source_accuracy_before']:.1f}%."
    )


def step() -> str:
    """Return time over that of the baseline, memory, and the share of a training step, of each provider on a CPU."""
    rows = read("step.csv")
    first = rows.iloc[0]
    lora = rows[rows["benchmark"] == first["benchmark"]]
    times = lora[lora["unit"] == "ratio"].set_index("provider")
    memory = lora[lora["unit"] == "bytes per parameter"].set_index("provider")["value"]
    shares = rows[rows["unit"] == "%"].set_index("provider")["value"]
    lines = [
        [name, spread(row, 2), f"{memory[name]:.1f}", f"{shares[name]:.1f}%" if name in shares else ""]
        for name, row in times.iterrows()
    ]
    heads = ["on CPU", times["metric"].iloc[0], "extra bytes per parameter", "share of a MiniLM training step"]
    return table(heads, lines) + side_by_side(first)


def gpu_step(device: str, folder: str, files: Sequence[str]) -> str:
    """Return time over that of the baseline of each provider and set on a GPU, and the share of a training step."""
    rows = pd.concat([read(f"{folder}/{name}.csv") for name in files])
    # On large sets the baseline is timed anew beside each provider.
    rows = rows[rows["unit"] == "ratio"].drop_duplicates(["provider", "benchmark"])
    training = read(f"{folder}/training.csv")
    shares = training[training["unit"] == "%"].set_index("provider")
    sets, found = rows["benchmark"].unique(), rows.set_index(["provider", "benchmark"])
    lines = [
        [
            name,
            *(spread(found.loc[(name, each)], 2) for each in sets),
            spread(shares.loc[name], 1, "%") if name in shares.index else "",
        ]
        for name in rows["provider"].unique()
    ]
    first = rows.iloc[0]
    return table([device, *sets, "share of a training step"], lines) + side_by_side(first, f" of {first['metric']}")


def training() -> str:
    """Return what guiding adds to a training step on a GPU, and the time of capturing a structured source."""
    rows = pd.concat([read("h100/training.csv"), read("h100/training-8b.csv")])
    found, steps = rows.set_index(["provider", "metric", "benchmark"]), rows["benchmark"].unique()
    metrics = {"share of the step that guiding adds": "%", "capture / forward and backward": ""}
    lines = [
        [f"{provider}: {metric}", *(spread(found.loc[(provider, metric, step)], 1, metrics[metric]) for step in steps)]
        for provider, metric in rows[["provider", "metric"]].drop_duplicates().itertuples(index=False)
        if metric in metrics and provider != BASELINE
    ]
    return table(["on an H100", *steps], lines) + side_by_side(rows.iloc[-1])


def curvature() -> str:
    """Return measured KL of single layers' changes, and the modelled KL of each approximation over it."""
    rows = read("language-curvature.csv")
    values = rows.pivot(index="benchmark", columns="provider", values="value")
    kinds = [kind for kind in rows["provider"].unique() if kind != "measured"]
    lines = [
        [
            layer.removeprefix("model.layers."),
            f"{values.loc[layer, 'measured']:.1e}",
            *(f"{values.loc[layer, kind]:.2f}" for kind in kinds),
        ]
        for layer in rows["benchmark"].unique()
    ]
    return table(["layer", "measured KL, nats per token", *kinds], lines) + f"\n\n{measured_on(rows.iloc[0])}."


def kernels() -> str:
    """Return the time of each kernel, and its bandwidth over that of a copy."""
    rows = read("h200/kernels.csv")
    found = rows.set_index(["provider", "unit"])
    lines = [
        [
            name,
            spread(found.loc[(name, "ms")], 2),
            f"{found.loc[(name, 'GB/s'), 'value']:.0f}",
            spread(found.loc[(name, "%")], 0, "%"),
        ]
        for name in rows["provider"].unique()
    ]
    return table(["kernel, 2^28 elements", "ms", "GB/s", "share of the copy's"], lines) + side_by_side(rows.iloc[0])


def peers(name: str, where: str) -> str:
    """Return the time of other ways to reconcile two gradients, over GradGuide's."""
    rows = read(name)
    rows = rows[rows["unit"] == "ratio"]
    lines = [[row["provider"], spread(row, 2)] for _, row in rows.iterrows()]
    return table([f"on {where}, the same vectors", "time / GradGuide's"], lines) + side_by_side(rows.iloc[0])


def communication() -> str:
    """Return the all-reduces of a step, and the bytes that they move, by optimizer and number of ranks."""
    rows = read("communication.csv")
    rows = rows[rows["optimizer"] != "AdamW"]
    ranks, sizes = rows["ranks"].unique(), rows["parameters"].unique()
    lines = []
    for optimizer, part in rows.groupby("optimizer", sort=False):
        moved = [sorted(part.loc[part["ranks"] == count, "bytes_moved_per_rank"].unique()) for count in ranks]
        cells = [" or ".join(f"{value:.0f}" for value in values) for values in moved]
        lines.append([str(optimizer), str(part["all_reduces_per_step"].iloc[0]), *cells])
    about = rows.iloc[0]
    heads = ["GradGuide with", "all-reduces", *(f"bytes per rank, {count} ranks" for count in ranks)]
    return table(heads, lines) + (
        f"\n\nThe same at {' as at '.join(sizes)} parameters. Measured on {ranks[0]} ranks (gloo), computed for more "
        f"by a ring's 2 (n - 1) / n; torch {about['torch']}, commit {about['commit']}."
    )


def capture() -> str:
    """Return the time of capturing a source over that of its passes alone, and what reading metrics adds to a step."""
    rows = read("capture.csv")
    lines = [
        [
            f"{row['benchmark']}: {row['provider']}",
            row["metric"],
            spread(row, 1, "%") if row["unit"] == "%" else spread(row, 2),
        ]
        for _, row in rows[rows["provider"] != "forward and backward alone"].iterrows()
    ]
    return table(["what", "against", "found"], lines) + f"\n\n{MEDIANS}; {measured_on(rows.iloc[0])}."


def objective() -> str:
    """Return the time of a step with each form of the exact objective, over that of a step without."""
    rows = read("objective.csv")
    first = rows.iloc[0]
    lines = [[row["provider"], spread(row, 2)] for _, row in rows.iterrows()]
    about = f"{MEDIANS} over {first['rounds']} rounds in one run, attention eager in all; {measured_on(first)}."
    return table([first["benchmark"], first["metric"]], lines) + f"\n\n{about}"


def growth() -> str:
    """Return the computed cost by model, beside the measured ratio where there is one."""
    rows = read("growth.csv")
    measured = read("h200/step-lora.csv")
    measured = measured[(measured["unit"] == "ratio") & (measured["provider"] == "defaults, no source")]
    lines = []
    for model, part in rows.groupby("model", sort=False):
        cost = part.set_index("provider")
        base, plain, structured = (
            cost.loc[each] for each in (BASELINE, "defaults, no source", "defaults, structured source")
        )
        beside = measured.loc[measured["benchmark"].str.fullmatch(f"LoRA r16 of an? {model} Llama"), "value"]
        lines.append([
            str(model),
            f"{base['trained'] / 1e6:.1f}",
            f"{plain['ratio']:.2f}",
            f"{beside.iloc[0]:.2f}" if len(beside) else "",
            f"{structured['ratio']:.2f}",
            f"{base['launches']} / {plain['launches']} / {structured['launches']}",
            f"{plain['held'] / 2**20:.0f}",
            f"{structured['held'] / 2**20:.0f}",
            f"{structured['adapter'] / 2**20:.0f}",
            f"{100 * structured['pull_share']:.3f}%",
        ])  # fmt: skip
    heads = [
        "model", "trained, M", "defaults: bytes / clip + AdamW's", "time, H200", "structured source: bytes",
        "launches: clip + AdamW / defaults / structured source", "defaults hold, MiB", "with a structured source, MiB",
        "an adapter of its rank, MiB", "pull's operations / passes'",
    ]  # fmt: skip
    return table(heads, lines)


_CHOSEN = (
    "clip", "l2sp:1", "ewc-lora:100", "null", "kl:1", "structured weight=10 text=own direction=on",
    "structured direction=on",
)  # fmt: skip
"""Methods of the table of the choosing sets: those with all rates on at least four pairs."""
_CONFIRMED: dict[str, Collection[str]] = {
    "language-confirm": ("clip", "null", "structured"),
    "language-own": ("clip", "structured", "structured text=own"),
    "language-rivals": ("clip", "null", "ewc-lora:100", "structured"),
    "language-rivals-one": ("clip", "l2sp:1", "early:0.1", "ewc-lora:100", "lora-null", "corda", "null", "structured"),
}
"""Methods of each table of the confirming sets, with the pairs that all of them have."""

BLOCKS: dict[str, Callable[[], str]] = {
    "demo": partial(demo, "demo-clinc150.csv"),
    "demo-high": partial(demo, "demo-clinc150-lr1e-2.csv"),
    "few-shot": partial(report.compact, FEW_SHOT),
    "few-shot-one-rate": partial(report.one_rate, FEW_SHOT),
    "few-shot-goals": lambda: tables.goals(results.load(FEW_SHOT, grid=True)),
    "step": step,
    "peers": partial(peers, "peers.csv", "CPU"),
    "gpu-step": partial(gpu_step, "on an H200", "h200", ["step-lora", "step-whole"]),
    "h100-step": partial(gpu_step, "on an H100", "h100", ["step-lora"]),
    "h100-training": training,
    "language": partial(language.compact, RESULTS / "h200" / "language.csv", _CHOSEN),
    **{name: partial(language.compact, RESULTS / "language-confirm.csv", each) for name, each in _CONFIRMED.items()},
    "language-schedule": partial(
        language.compact, RESULTS / "language-confirm.csv", _CONFIRMED["language-confirm"], "schedule=linear"
    ),
    "language-curvature": curvature,
    "gpu-kernels": kernels,
    "gpu-peers": partial(peers, "h200/peers.csv", "an H200"),
    "objective": objective,
    "capture": capture,
    "communication": communication,
    "growth": growth,
}
"""The function that makes each block, by the name in its marker."""
