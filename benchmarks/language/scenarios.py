"""The scenarios: what is learnt in which order, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.language.data import Rows, Target
from benchmarks.language.grid import SOURCE, Run
from benchmarks.language.measures import Watch, accuracy, answers
from benchmarks.language.methods import parse

if TYPE_CHECKING:
    from benchmarks.language.run import Suite, Trained

__all__ = ["KNOWN", "SCENARIOS"]

KNOWN = "mr"
"""The classification set whose accuracy is measured before and after instruction tuning."""
_SOURCE_RUN = Run(target=SOURCE, shots=16, steps=80, method="clip", lr=1e-3, seed=7)
"""Settings for training the source task of ``transfer``. It is trained once for all methods."""


def fresh(suite: Suite, run: Run) -> dict[str, Any]:
    """A fresh adapter learns the target, and the base model is to be kept."""
    target = suite.target(run.target, run.shots, run.seed)
    with Watch() as watch:
        kept = suite.remember_text(parse(run.method), run.seed)
    trained = suite.train(run, target.rows, kept, pool=target.pool_rows)
    return {
        **accuracy(suite.model, target, suite.size),
        **suite.drift(),
        **_columns([trained], watch),
        **_rows(suite, target),
    }


def sequence(suite: Suite, run: Run) -> dict[str, Any]:
    """Tasks are learnt after one another by one adapter; each is to be kept once it is finished.

    ``target_accuracy`` and ``target_loss`` are means over all tasks at the end, ``learnt_accuracy`` the mean of each
    task's accuracy just after its training. ``tasks`` holds both for each task: "name learnt last; ...".
    """
    method = parse(run.method)
    targets = [suite.target(name, run.shots, run.seed) for name in run.targets]
    learnt: list[float | None] = [None] * len(targets)
    trained: list[Trained] = []
    kept: Sequence[Any] = ()
    watch = Watch()
    if method.name == "joint":
        trained.append(suite.train(run, Rows.joined([target.rows for target in targets]), steps=run.work))
    else:
        for index, target in enumerate(targets[:-1]):
            trained.append(suite.train(run, target.rows, kept))
            learnt[index] = accuracy(suite.model, target, suite.size)["target_accuracy"]
            with watch:
                kept = suite.remember_rows(method, target.rows, kept, run.seed + index)
        trained.append(suite.train(run, targets[-1].rows, kept))
    last = [accuracy(suite.model, target, suite.size) for target in targets]
    first = [found["target_accuracy"] if known is None else known for known, found in zip(learnt, last, strict=True)]
    pairs = zip(run.targets, first, last, strict=True)
    return {
        **{name: sum(found[name] for found in last) / len(last) for name in last[0]},
        **suite.drift(),
        "learnt_accuracy": sum(first) / len(first),
        "tasks": "; ".join(f"{name} {known:.4f} {found['target_accuracy']:.4f}" for name, known, found in pairs),
        **_columns(trained, watch),
        **_rows(suite, *targets),
    }


def transfer(suite: Suite, run: Run) -> dict[str, Any]:
    """An adapter that has learnt a source task learns the target; the source task is to be kept."""
    method = parse(run.method)
    name, last = run.targets
    source = suite.target(name, _SOURCE_RUN.shots, _SOURCE_RUN.seed)
    target = suite.target(last, run.shots, run.seed)
    adapter, before = _source_adapter(suite, name, source)
    torch._foreach_copy_([p.data for p in suite.model.parameters], adapter)
    with Watch() as watch:
        kept = suite.remember_rows(method, source.rows, (), run.seed)
    trained = suite.train(run, target.rows, kept)
    return {
        **accuracy(suite.model, target, suite.size),
        **suite.drift(),
        "source_accuracy": accuracy(suite.model, source, suite.size)["target_accuracy"],
        "source_before": before,
        **_columns([trained], watch),
        **_rows(suite, target),
    }


def instructions(suite: Suite, run: Run) -> dict[str, Any]:
    """A fresh adapter learns the answers of instructions. ``target_loss`` is per token of held-out answers, in nats.

    The accuracy of a classification set, chosen without training, is measured before and after.
    """
    rows = suite.texts.instructions(run.shots)
    held_out = suite.texts.answers("eval", 2 * suite.size.answers)
    known = suite.target(KNOWN, 1, 0)
    before = accuracy(suite.model, known, suite.size)["target_accuracy"]
    with Watch() as watch:
        kept = suite.remember_text(parse(run.method), run.seed)
    trained = suite.train(run, rows, kept)
    return {
        "target_loss": answers(suite.model, held_out, suite.size),
        **suite.drift(),
        "source_accuracy": accuracy(suite.model, known, suite.size)["target_accuracy"],
        "source_before": before,
        **_columns([trained], watch),
        "rows": len(held_out),
    }


SCENARIOS: dict[str, Callable[[Suite, Run], dict[str, Any]]] = {
    "fresh": fresh, "sequence": sequence, "transfer": transfer, "instructions": instructions,
}  # fmt: skip


def _source_adapter(suite: Suite, name: str, source: Target) -> tuple[list[Tensor], float]:
    """Return A and B after the source task was learnt, and its accuracy. It is learnt once per suite."""
    if name not in suite.learnt:
        run = replace(_SOURCE_RUN, target=name)
        suite.model.reset(run.seed)
        suite.train(run, source.rows)
        adapter = [p.detach().clone() for p in suite.model.parameters]
        suite.learnt[name] = adapter, accuracy(suite.model, source, suite.size)["target_accuracy"]
    return suite.learnt[name]


def _columns(trained: Sequence[Trained], watch: Watch) -> dict[str, Any]:
    steps = sum(part.steps for part in trained)
    return {
        "modelled_drift": trained[-1].modelled,
        "source_bytes": max(part.held for part in trained),
        "capture_seconds": watch.seconds,
        **trained[-1].stability,
        "seconds_per_step": sum(part.seconds for part in trained) / steps if steps else None,
    }


def _rows(suite: Suite, *targets: Target) -> dict[str, int]:
    return {"rows": sum(min(suite.size.rows, len(target.test)) for target in targets)}
