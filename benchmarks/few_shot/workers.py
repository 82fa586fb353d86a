"""Runs handed to worker processes of one thread each: runs are small, and two side by side take no longer than one."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.few_shot.grid import Run
from benchmarks.few_shot.scenarios import Settings, Suite

__all__ = ["default_workers", "make"]

_suite: Suite | None = None  # of a worker process


def default_workers() -> int:
    """One per core; one on a GPU, which the workers would share."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def make(runs: Sequence[Run], settings: Settings, workers: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run with its results, as they end.

    Raises:
        RuntimeError: a run failed; its name is in the message.
    """
    # Once here, so that the workers find the source adapters made.
    shared = Suite(settings)
    for run in {run.source: run for run in runs if run.scenario not in ("digits", "causal")}.values():
        shared.prepare(run)
    context = multiprocessing.get_context("spawn")  # CUDA and OpenMP do not survive a fork
    with context.Pool(workers, _start, (settings,)) as pool:
        yield from pool.imap_unordered(_make, runs)


def _start(settings: Settings) -> None:
    global _suite
    os.environ["TQDM_DISABLE"] = "1"  # the bar is the parent's
    torch.set_num_threads(1)
    _suite = Suite(settings)


def _make(run: Run) -> tuple[Run, dict[str, Any]]:
    assert _suite is not None
    try:
        return run, _suite.row(run)
    except Exception as error:
        raise RuntimeError(f"{run} failed: {error!r}") from error
