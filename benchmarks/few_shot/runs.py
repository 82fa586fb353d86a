"""Do runs: make the problem of each (or five, in a sequence), train, and return its row of results."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.few_shot.data import CONDITIONS, HEAD_LR, Rough, episode, outlier_batches, spikes, wrong_labels
from benchmarks.few_shot.digits import Digits
from benchmarks.few_shot.encoder import Earlier, Encoder, LiveRows
from benchmarks.few_shot.grid import ONE_RATE, SEQUENCES, Run
from benchmarks.few_shot.methods import METHODS, STORED
from benchmarks.few_shot.train import Trained, peak_memory, reset_peak, train
from gradguide.demo.data import batches
from gradguide.demo.model import Encoded, accuracy
from gradguide.demo.source import capture_source

__all__ = ["Settings", "Suite", "default_workers", "make_rows"]

STEPS = 30
_DIGITS_STEPS = 60
_BATCH = 8
_DETAILED = 2  # runs with a seed below this also measure what takes extra time


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Models and data of a suite. ``model`` is a hub id or a folder, ``cache`` is that of ``Encoder``."""

    data: Path
    cache: Path
    model: str


@dataclass
class Suite:
    """Does runs, and keeps the models that they share."""

    settings: Settings
    _encoders: dict[str, Encoder] = field(default_factory=dict)
    _digits: Digits | None = None

    def prepare(self, run: Run) -> None:
        """Make what the run shares with others, and train its source task unless that is cached."""
        if run.scenario == "digits":
            self._digits = self._digits or Digits()
        elif run.source not in self._encoders:
            name = None if run.source == "none" else run.source
            self._encoders[run.source] = Encoder(self.settings.model, self.settings.data, name, self.settings.cache)

    def row(self, run: Run) -> dict[str, Any]:
        """Do ``run``, and return its measured columns."""
        self.prepare(run)
        reset_peak()
        start = time.perf_counter()
        kinds = {"digits": self._digits_run, "sequence": self._sequence_run}
        row = kinds.get(run.scenario, self._transfer_run)(run)
        return {**row, "peak_memory": peak_memory(), "seconds": time.perf_counter() - start}

    def _transfer_run(self, run: Run) -> dict[str, Any]:
        encoder = self._encoders[run.source]
        encoder.reset()
        rough = CONDITIONS.get(run.condition, Rough())
        few = episode(self.settings.data, run.target, run.shots, run.seed)
        problem = encoder.problem(
            few,
            run.seed,
            head_lr=None if run.condition == ONE_RATE else HEAD_LR,
            rows=wrong_labels(few.train, few.task.labels, rough.wrong_labels, run.seed),
            corrupt=outlier_batches(rough.outliers, len(few.task.labels), run.seed) if rough.outliers else None,
        )
        trained = train(
            problem,
            METHODS[run.method],
            run.lr,
            batches(problem.rows, rough.batch, run.seed),
            STEPS * _BATCH // rough.batch,
            seed=run.seed,
            loss_factor=spikes(rough.spikes, run.seed),
            detailed=run.seed < _DETAILED,
        )
        return _row(trained, trained.accuracies, source_accuracy_before=encoder.source_accuracy)

    def _digits_run(self, run: Run) -> dict[str, Any]:
        assert self._digits is not None
        problem = self._digits.problem(run.shots, run.seed)
        stream = batches(problem.rows, _BATCH, run.seed)
        detailed = run.seed < _DETAILED
        trained = train(problem, METHODS[run.method], run.lr, stream, _DIGITS_STEPS, seed=run.seed, detailed=detailed)
        return _row(trained, trained.accuracies, source_accuracy_before=self._digits.source_accuracy)

    def _sequence_run(self, run: Run) -> dict[str, Any]:
        """Train five tasks one after the other. The stored source and the rows of each are kept for later ones.

        ``target_accuracy`` is the mean over the five tasks at the end, ``source_accuracy`` that over the first four,
        and ``backward_transfer`` the mean change of those four since each was trained.
        """
        encoder = self._encoders[run.source]
        encoder.reset()
        earlier = Earlier(sources=(), live=(), accuracies=dict)
        tests: dict[str, Encoded] = {}
        tasks: list[Trained] = []
        capture_seconds = 0.0
        for i, name in enumerate(SEQUENCES[run.target]):
            head = f"task{i}"
            few = episode(self.settings.data, name, run.shots, 101 * i + run.seed)
            rows = encoder.encode(few.train, few.task.labels)
            tests[head] = encoder.encode(few.task.test, few.task.labels)
            problem = encoder.problem(few, run.seed, earlier=earlier, head=head)
            stream = batches(problem.rows, _BATCH, run.seed)
            tasks.append(train(problem, METHODS[run.method], run.lr, stream, STEPS, seed=run.seed))
            encoder.model.heads[head].requires_grad_(False)
            start = time.thread_time()
            stored = run.method in STORED
            captured = [capture_source(encoder.model, rows, seed=run.seed, head=head)] if stored else []
            capture_seconds += time.thread_time() - start
            earlier = Earlier(
                sources=(*earlier.sources, *captured),
                live=(*earlier.live, LiveRows(head=head, rows=rows)),
                accuracies=dict,
            )
        final = [accuracy(encoder.model, head, test) for head, test in tests.items()]
        changes = [after - task.accuracies["target"] for after, task in zip(final[:-1], tasks[:-1], strict=True)]
        return _row(
            tasks[-1],
            {"target": statistics.fmean(final), "source": statistics.fmean(final[:-1])},
            backward_transfer=statistics.fmean(changes),
            diverged=int(any(task.diverged for task in tasks)),
            coherence=statistics.fmean(task.coherence for task in tasks),
            successive_cosine=statistics.fmean(task.successive_cosine for task in tasks),
            seconds_per_step=statistics.fmean(task.seconds_per_step for task in tasks),
            capture_seconds=capture_seconds,
        )


def _row(trained: Trained, accuracies: Mapping[str, float], **others: float) -> dict[str, Any]:
    """Return the measured columns, from ``trained`` unless ``others`` has them."""
    return {
        "target_accuracy": accuracies["target"],
        "source_accuracy": accuracies["source"],
        "source_accuracy_before": math.nan,
        "backward_transfer": math.nan,
        "loss": trained.loss,
        "diverged": int(trained.diverged),
        "coherence": trained.coherence,
        "successive_cosine": trained.successive_cosine,
        "alignment": trained.alignment,
        "steps_to_final": trained.steps_to_final,
        "seconds_per_step": trained.seconds_per_step,
        "capture_seconds": math.nan,
        "memory": trained.memory,
        **others,
    }


def default_workers() -> int:
    """Return the number of cores; 1 with a GPU, which the workers would share."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def make_rows(runs: Sequence[Run], settings: Settings, workers: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Do runs in worker processes; yield each run with its measured columns, in the order in which they end.

    Each worker has one thread: runs are small, and two side by side take no longer than one.

    Raises:
        RuntimeError: a run failed; the message names it.
    """
    # Source adapters are trained here once, so that all workers load them from the cache.
    shared = Suite(settings)
    for run in {run.source: run for run in runs if run.scenario != "digits"}.values():
        shared.prepare(run)
    context = multiprocessing.get_context("spawn")  # CUDA and OpenMP do not survive a fork
    with context.Pool(workers, _start, (settings,)) as pool:
        yield from pool.imap_unordered(_do, runs)


_suite: Suite | None = None  # of a worker process


def _start(settings: Settings) -> None:
    global _suite
    os.environ["TQDM_DISABLE"] = "1"  # only the parent shows a progress bar
    torch.set_num_threads(1)
    _suite = Suite(settings)


def _do(run: Run) -> tuple[Run, dict[str, Any]]:
    assert _suite is not None
    try:
        return run, _suite.row(run)
    except Exception as error:
        raise RuntimeError(f"{run} failed: {error!r}") from error
