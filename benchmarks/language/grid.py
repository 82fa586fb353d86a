"""List the runs of each grid in the order in which they are made, and keep the file of their rows.

Sets are split before any run: strengths and rates are chosen on ``CHOOSING`` and judged on ``CONFIRMING``. Each method
with a strength has the same tuning budget: three strengths, a factor of 10 apart (3 for a drift budget), at each rate.
Methods without a strength have the rates alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.harness import append_row, read_rows

__all__ = [
    "BASE", "CHOOSING", "COLUMNS", "CONFIRMING", "GRIDS", "LRS", "SOURCE", "STRENGTHS", "TARGETS", "Run", "append",
    "default_strength", "done", "methods", "research",
]  # fmt: skip

BASE = "clip"
"""The method that others are compared with."""
TARGETS = ("banking77", "goemotions", "subj", "medical_abstracts")
_PAIR = ("goemotions", "subj")
CHOOSING = ("banking77", "goemotions", "subj", "medical_abstracts", "hwu64", "clinc_work")
CONFIRMING = ("mr", "snli", "clinc_home", "clinc_utility")
SOURCE = "clinc_travel"
"""The task to be kept in scenario ``transfer``."""
LRS = (3e-4, 1e-3, 3e-3, 1e-2)
STRENGTHS: dict[str, tuple[str, str, str]] = {
    "structured{}": (" weight=10", "", " weight=1000"),
    "structured{} sources=tasks": (" weight=10", "", " weight=1000"),
    "structured{} merge=on": (" weight=10", "", " weight=1000"),
    "anchored{}": (":0.1", ":1", ":10"),
    "l2sp{}": (":0.1", ":1", ":10"),
    "l2sp-ba{}": (":0.1", ":1", ":10"),
    "ewc{}": (":10", ":100", ":1000"),
    "ewc-lora{}": (":10", ":100", ":1000"),
    "olora{}": (":0.05", ":0.5", ":5"),
    "osf{}": (":0.25", ":0.5", ":0.9"),
    "early{}": (":0.03", ":0.1", ":0.3"),
    "kl{}": (":0.1", ":1", ":10"),
    "kl{} text=real": (":0.1", ":1", ":10"),
    "kl{} every=4": (":0.1", ":1", ":10"),
    "replay{}": (":0.1", ":1", ":10"),
    "replay{} text=own": (":0.1", ":1", ":10"),
    "replay{} every=4": (":0.1", ":1", ":10"),
}
"""Strengths by method; the middle one is the default, "" stands for that of the method itself."""
_SEQUENCE = ("banking77", "hwu64", "goemotions", "subj", "medical_abstracts", "clinc_travel", "mr")
_CLASSES = {"banking77": 10, "goemotions": 7, "medical_abstracts": 5, "subj": 2}
_RESEARCH = (
    ("clip", "structured"),
    ("structured weight=10", "structured weight=30", "structured weight=300", "defaults"),
    ("l2sp:1", "kl:1", "null"),
    ("structured rank=whole", "structured rank=16", "structured text=own"),
    ("structured rest=none", "structured rest=mean", "structured floor=0", "structured floor=1"),
    ("structured start=null", "structured direction=on", "structured direction=shared", "structured bound=off"),
    ("clip unit=row", "structured unit=row", "replay:1", "quarter"),
    ("structured tokens=2k", "structured tokens=8k", "clip base=sgd", "structured base=sgd"),
)
"""Methods by priority."""

Blocks = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run. Its fields are its key in the results.

    Args:
        scenario: "fresh" (a fresh adapter, the base model to be kept), "sequence" (tasks after one another),
            "transfer" (a source task, then the target) or "instructions" (answers of ``seed_tasks`` are learnt).
        target: name of the target's set; of several tasks, their names in order with a "+" between.
        shots: training rows per class; of instructions, all rows.
        steps: training steps of 8 rows, for each task.
        method: see ``methods.parse``.
        lr: learning rate.
        seed: of rows, their order, and the adapter's start.
    """

    scenario: str = "fresh"
    target: str
    shots: int
    steps: int
    method: str
    lr: float
    seed: int

    @property
    def targets(self) -> list[str]:
        """The tasks in order."""
        return self.target.split("+")

    @property
    def work(self) -> int:
        """The number of steps of all tasks."""
        return self.steps * (len(self.targets) if self.scenario == "sequence" else 1)


_KEY = [field.name for field in fields(Run)]
_MEASURED = (
    "target_accuracy", "target_loss", "drift", "drift_answers", "source_accuracy", "source_before", "learnt_accuracy",
    "tasks", "modelled_drift", "coherence", "successive_cosine", "alignment", "source_bytes", "capture_seconds",
    "memory", "seconds_per_step", "seconds", "rows", "jobs", "error",
)  # fmt: skip
_ABOUT = ("model", "commit", "gradguide", "torch", "python", "device", "threads")
COLUMNS = [*_KEY, *_MEASURED, *_ABOUT]


def default_strength(family: str) -> str:
    """Return the method of a family at its default strength: ``kl:1`` for ``kl``. See ``methods.family``."""
    defaults = {name.format(""): name.format(middle) for name, (_, middle, _) in STRENGTHS.items()}
    return defaults.get(family, family)


def methods(middle: Sequence[str], *, plain: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return the methods at their default strength with the ``plain`` ones, and the same at their other strengths."""
    low, default, high = ([name.format(STRENGTHS[name][i]) for name in middle] for i in range(3))
    return [*plain, *default], [*low, *high]


def research() -> list[Run]:
    """Return the variants of structured sources in scenario ``fresh``, on four sets."""
    return _ordered(_RESEARCH, TARGETS)


def fresh(sets: Sequence[str] = CHOOSING, seeds: Sequence[int] = (0, 1)) -> list[Run]:
    """Return scenario (a): a fresh adapter, and a base model to be kept."""
    first, flanks = methods(
        ["structured{}", "kl{}", "l2sp{}", "anchored{}", "ewc-lora{}", "early{}", "replay{}"],
        plain=[BASE, "null", "defaults"],
    )
    second, others = methods(
        ["ewc{}", "l2sp-ba{}", "osf{}"], plain=["corda", "lora-null", "lora-null train=b", "quarter"]
    )
    third, rest = methods(["kl{} text=real", "kl{} every=4", "replay{} text=own", "replay{} every=4"])
    return _untrained(sets, seeds) + _ordered((first, flanks, second, others, third, rest), sets, seeds=seeds)


def sequence() -> list[Run]:
    """Return scenario (c): five tasks in a row, in an order of their own for each seed."""
    first, flanks = methods(
        ["structured{}", "l2sp{}", "anchored{}", "ewc-lora{}", "olora{}", "structured{} sources=tasks"],
        plain=[BASE, "joint"],
    )
    second, others = methods(["structured{} merge=on", "ewc{}", "l2sp-ba{}"], plain=["defaults"])
    runs = []
    for block in (first, second, flanks, others):
        for seed in range(3):
            runs += _ordered((block,), (_order(seed),), seeds=(seed,), lrs=(1e-3, 3e-3, 3e-4), scenario="sequence")
    return runs


def transfer() -> list[Run]:
    """Return scenario (b): an adapter that has learnt the source task learns the target."""
    first, flanks = methods(["structured{}", "l2sp{}", "anchored{}", "ewc-lora{}", "ewc{}"], plain=[BASE, "defaults"])
    targets = [f"{SOURCE}+{name}" for name in ("banking77", "goemotions", "medical_abstracts", *CONFIRMING[:2])]
    return _ordered((first, flanks, ["structured sources=tasks"]), targets, seeds=(0, 1, 2), scenario="transfer")


def rows() -> list[Run]:
    """Return scenario (d): 8 to 64 rows per class, three epochs."""
    first, flanks = methods(["structured{}", "l2sp{}", "kl{}", "ewc-lora{}"], plain=[BASE, "null"])
    return [
        run
        for block in (first, flanks)
        for seed in (0, 1, 2)
        for shots in (32, 64, 16, 8)
        for name, classes in _CLASSES.items()
        if (name, shots) != ("banking77", 64)  # its smallest class has 35 rows
        for run in _ordered(
            (block,), (name,), seeds=(seed,), lrs=LRS[:3], shots=shots, steps=-(-3 * shots * classes // 8)
        )
    ]


def instructions() -> list[Run]:
    """Return scenario (e): answers of at most 96 instructions are learnt, three epochs of as many."""
    first, flanks = methods(["structured{}", "l2sp{}", "kl{}", "ewc-lora{}"], plain=[BASE, "null"])
    return _ordered(
        (first, flanks, ["structured text=own"]), ("seed_tasks",), seeds=(0, 1, 2), shots=96, steps=36,
        scenario="instructions",
    )  # fmt: skip


def few() -> list[Run]:
    """Return scenario (a) with 1 to 32 rows per class."""
    first, _ = methods(["structured{}", "l2sp{}", "kl{}"], plain=[BASE, "null"])
    return [
        run
        for shots in (1, 2, 4, 16, 32)
        for run in _ordered((first,), TARGETS, seeds=(0, 1), lrs=LRS[1:3], shots=shots)
    ]


def cpu() -> list[Run]:
    """Return the part of the full grid for two CPU cores: one seed, two sets, two rates."""
    first, _ = methods(["structured{}", "l2sp{}", "kl{}"], plain=[BASE, "null"])
    return _ordered((first,), ("banking77", "subj"), seeds=(0,), lrs=(1e-3, 3e-3))


def variants() -> list[Run]:
    """Return the part of the research for two CPU cores: one seed, two sets, a low and a high rate."""
    blocks = [
        (BASE, "structured"),
        ("structured floor=0", "structured floor=1", "structured tokens=2k", "structured tokens=8k"),
        ("structured start=null", "structured base=sgd", "structured pull=after weight=1", "structured pull=update"),
        ("clip unit=row", "structured unit=row", "structured direction=on", "structured bound=off", "clip base=sgd"),
        ("structured text=own", "structured rest=none", "structured rest=mean"),
    ]
    low = _ordered([(BASE, "structured", "structured least=0.02")], _PAIR, seeds=(0,), lrs=(1e-4,))
    first, second = (_ordered(part, _PAIR, seeds=(0,), lrs=(3e-4, 3e-3)) for part in (blocks[:3], blocks[3:]))
    return [*first, *low, *second]


def others() -> list[Run]:
    """Return the part of scenarios (b), (d) and (e) for two CPU cores: one seed, two targets, two methods."""
    places = {(f"{SOURCE}+goemotions", 8), (f"{SOURCE}+snli", 8), ("seed_tasks", 96), ("goemotions", 32), ("subj", 64)}
    return [
        run
        for run in (*instructions(), *rows(), *transfer())
        if run.seed == 0 and (run.target, run.shots) in places and run.method in (BASE, "structured")
    ]


def gpu() -> list[Run]:
    """Return the part of the full grid for 8 minutes of one GPU: the most informative runs first."""
    sets = ("banking77", "goemotions", "medical_abstracts")
    blocks = [
        (BASE, "structured", "structured weight=300", "structured weight=30", "kl:1", "null"),
        ("structured text=own", "structured rank=16", "l2sp:1", "ewc-lora:100", "lora-null", "structured weight=1000"),
        ("structured start=null", "structured direction=on", "structured bound=off", "structured floor=0"),
        ("structured rank=whole", "structured floor=1", "structured weight=10", "structured rest=none"),
        ("kl:10", "kl:0.1", "l2sp:10", "ewc-lora:1000", "anchored:1", "early:0.1", "corda", "replay:1"),
    ]
    tasks = (BASE, "structured", "structured sources=tasks", "l2sp:1", "ewc-lora:100", "olora:0.5", "joint")
    rows = [
        _ordered((tasks,), (_order(seed),), seeds=(seed,), lrs=(1e-3, 3e-3), scenario="sequence") for seed in (0, 1)
    ]
    first, *others = (_ordered((block,), sets) for block in blocks)
    return [
        *_untrained(sets, (0, 1)),
        *first,
        *rows[0],
        *others[0],
        *rows[1],
        *(run for block in others[1:] for run in block),
    ]


def full() -> list[Run]:
    """Return all runs, each once."""
    parts = (fresh, sequence, confirm, schedule, transfer, rows, instructions, few, research)
    return list(dict.fromkeys(run for part in parts for run in part()))


def confirm() -> list[Run]:
    """Return scenario (a) on the confirming sets, ten seeds."""
    return fresh(CONFIRMING, range(10))


def schedule() -> list[Run]:
    """Return scenario (a) on the confirming sets with a learning rate that falls linearly to zero."""
    names = [f"{name} schedule=linear" for name in (BASE, "structured", "null")]
    return _ordered((names,), CONFIRMING, seeds=range(2, 5))


def quick() -> list[Run]:
    """Return one target at one rate, with a small source."""
    return [
        Run(target="subj", shots=8, steps=16, method=method, lr=3e-3, seed=0)
        for method in ("clip", "structured tokens=2k")
    ]


def check() -> list[Run]:
    """Return the smallest runs whose magnitudes are known: clip drifts 1 to 5 nats, a structured source below 0.1."""
    return [
        Run(target="banking77", shots=8, steps=40, method=method, lr=3e-3, seed=0) for method in (BASE, "structured")
    ]


def smoke() -> list[Run]:
    """Return one run of four steps of every method and scenario: whether all works on a machine."""
    grids = (fresh, sequence, transfer, instructions)
    found = {(run.scenario, run.method): run for grid in grids for run in reversed(grid())}
    return [
        Run(**{**asdict(run), "shots": 96 if run.scenario == "instructions" else 2, "steps": min(run.steps, 4)})
        for run in reversed(found.values())
    ]


GRIDS: dict[str, Callable[[], list[Run]]] = {
    "quick": quick, "check": check, "smoke": smoke, "research": research, "fresh": fresh, "confirm": confirm,
    "sequence": sequence, "transfer": transfer, "rows": rows, "instructions": instructions, "few": few, "cpu": cpu,
    "schedule": schedule, "variants": variants, "others": others, "gpu": gpu, "full": full,
}  # fmt: skip


def _untrained(sets: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Return a run without a step for each set and seed."""
    return [Run(target=t, shots=8, steps=0, method="none", lr=0.0, seed=s) for s in seeds for t in sets]


def _order(seed: int) -> str:
    """Return five tasks in an order of their own."""
    return "+".join(random.Random(seed).sample(_SEQUENCE, 5))


def _ordered(
    blocks: Iterable[Sequence[str]],
    targets: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1),
    lrs: Sequence[float] = LRS,
    shots: int = 8,
    steps: int = 40,
    scenario: str = "fresh",
) -> list[Run]:
    """Return the runs of blocks of methods.

    Blocks are the outermost loop, then seeds: a grid that is stopped early has whole blocks, and of the last one every
    method equally often.
    """
    return [
        Run(scenario=scenario, target=target, shots=shots, steps=steps, method=method, lr=lr, seed=seed)
        for block in blocks
        for seed in seeds
        for target in targets
        for lr in lrs
        for method in block
    ]


def append(path: Path, run: Run, measured: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Add the row of ``run``."""
    append_row(path, COLUMNS, {**asdict(run), **measured, **{name: about[name] for name in _ABOUT}})


def done(path: Path, model: str) -> set[Run]:
    """Return the runs that the file has without an error.

    Args:
        model: name of the model. A file has the runs of one.

    Raises:
        ValueError: the file has other columns, or runs of another model.
    """
    rows = read_rows(path, COLUMNS)
    others = sorted({row["model"] for row in rows} - {model})
    if others:
        raise ValueError(f"{path} has runs of the model {', '.join(others)!r}, found {model!r}; name another --out")
    return {_run(row) for row in rows if not row["error"]}


def _run(row: Mapping[str, str]) -> Run:
    numbers: dict[str, Callable[[str], Any]] = {"shots": int, "steps": int, "lr": float, "seed": int}
    return Run(**{name: numbers.get(name, str)(row[name]) for name in _KEY})
