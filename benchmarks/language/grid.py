"""List the runs of each grid in the order in which they are made, and keep the file of their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.harness import append_row, read_rows

__all__ = ["BASE", "COLUMNS", "GRIDS", "LRS", "TARGETS", "Run", "append", "done", "research"]

BASE = "clip"
"""The method that others are compared with."""
TARGETS = ("banking77", "goemotions", "subj", "medical_abstracts")
LRS = (3e-4, 1e-3, 3e-3, 1e-2)
_SEEDS = (0, 1)
_BLOCKS = (
    ("clip", "structured"),
    ("structured weight=10", "structured weight=30", "structured weight=300", "defaults"),
    ("l2sp:1", "kl:1", "null"),
    ("structured rank=whole", "structured rank=16", "structured text=own"),
    ("structured rest=none", "structured rest=mean", "structured floor=0", "structured floor=1"),
    ("structured start=null", "structured direction=off", "structured bound=off"),
    ("clip unit=row", "structured unit=row", "replay:1", "quarter"),
    ("structured tokens=2k", "structured tokens=8k", "clip base=sgd", "structured base=sgd"),
)
"""Methods by priority."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run. Its fields are its key in the results.

    Args:
        target: name of the target's set.
        shots: training rows per class.
        steps: training steps of 8 rows.
        method: see ``methods.parse``.
        lr: learning rate.
        seed: of rows, their order, and the adapter's start.
    """

    target: str
    shots: int
    steps: int
    method: str
    lr: float
    seed: int


_KEY = [field.name for field in fields(Run)]
_MEASURED = (
    "target_accuracy", "target_loss", "drift", "drift_answers", "modelled_drift", "seconds_per_step", "seconds",
    "rows", "jobs", "error",
)  # fmt: skip
_ABOUT = ("commit", "gradguide", "torch", "python", "device", "threads")
COLUMNS = [*_KEY, *_MEASURED, *_ABOUT]


def research() -> list[Run]:
    """Return the grid of scenario (a): a fresh adapter, and a base model to be kept.

    Blocks of methods are the outermost loop, then seeds: a grid that is stopped early has whole blocks, and of the
    last one every method equally often.
    """
    return [
        Run(target=target, shots=8, steps=40, method=method, lr=lr, seed=seed)
        for block in _BLOCKS
        for seed in _SEEDS
        for target in TARGETS
        for lr in LRS
        for method in block
    ]


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


GRIDS: dict[str, Callable[[], list[Run]]] = {"quick": quick, "check": check, "research": research, "full": research}


def append(path: Path, run: Run, measured: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Add the row of ``run``."""
    append_row(path, COLUMNS, {**asdict(run), **measured, **{name: about[name] for name in _ABOUT}})


def done(path: Path) -> set[Run]:
    """Return the runs that the file has without an error.

    Raises:
        ValueError: the file has other columns.
    """
    return {_run(row) for row in read_rows(path, COLUMNS) if not row["error"]}


def _run(row: Mapping[str, str]) -> Run:
    numbers: dict[str, Callable[[str], Any]] = {"shots": int, "steps": int, "lr": float, "seed": int}
    return Run(**{name: numbers.get(name, str)(row[name]) for name in _KEY})
