"""Worker processes: a task that fails or kills its worker costs only itself, and a deadline ends all."""

from __future__ import annotations

import time

import pytest

from benchmarks.language import pool
from benchmarks.language.pool import Failed, Task, do_tasks
from tests.language import workers


class Clock:
    """Seconds since ``started``; 0 before it is set."""

    started: float | None = None

    def monotonic(self) -> float:
        return 0.0 if self.started is None else time.monotonic() - self.started


def test_a_worker_that_dies_costs_its_own_task_only() -> None:
    tasks = [Task(what=what) for what in (1, "die", 2, "raise", 3)]
    found = {task.what: outcome for task, outcome in do_tasks(tasks, workers.start, 2)}
    assert found.pop("die") == Failed("the worker died with exit code 3", fatal=True)
    assert found.pop("raise") == Failed("ValueError: no luck")
    assert found == {1: 2, 2: 4, 3: 6}


def test_tasks_wait_for_what_they_need() -> None:
    tasks = [
        Task(what=1, needs=frozenset({"file"})),
        Task(what=2, makes="file"),
        Task(what=3, needs=frozenset({"old"})),
        Task(what="raise", makes="never"),
        Task(what=4, needs=frozenset({"never"})),
    ]
    found = [(task.what, outcome) for task, outcome in do_tasks(tasks, workers.start, 1, have={"old"})]
    assert found[:4] == [(2, 4), (1, 2), (3, 6), ("raise", Failed("ValueError: no luck"))]
    assert found[4][0] == 4
    assert isinstance(found[4][1], Failed)


def test_a_deadline_keeps_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still until the first outcome, so that a slow start of the worker does not count."""
    clock = Clock()
    monkeypatch.setattr(pool, "time", clock)
    found = []
    tasks = [Task(what=1), Task(what="sleep"), Task(what=2)]
    for task, _ in do_tasks(tasks, workers.start, 1, until=0.5):
        found.append(task.what)
        clock.started = time.monotonic()
    assert found == [1]
    assert clock.monotonic() < 50, "the sleep, of 60 seconds, was waited for"


def test_workers_that_cannot_start_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="exit code 4"):
        list(do_tasks([Task(what=1), Task(what=2)], workers.broken, 2))
