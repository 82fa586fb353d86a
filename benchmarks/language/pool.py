"""Share tasks among worker processes. A worker that dies costs its own task only."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

__all__ = ["Failed", "Task", "do_tasks"]

Work: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work.

    Args:
        what: passed to the worker.
        needs: what other tasks must have made before.
        makes: what it makes.
    """

    what: Any
    needs: frozenset[Hashable] = frozenset()
    makes: Hashable = None


@dataclass(frozen=True)
class Failed:
    """The outcome of a task that raised an error; ``fatal`` if its worker must end."""

    error: str
    fatal: bool = False


@dataclass
class _Worker:
    process: Any
    connection: Connection
    task: Task | None = None
    ready: bool = False


def do_tasks(
    tasks: Sequence[Task],
    start: Callable[[], Work],
    jobs: int,
    *,
    have: Collection[Hashable] = (),
    until: float | None = None,
) -> Iterator[tuple[Task, Any]]:
    """Do tasks in ``jobs`` spawned processes; yield each with its outcome as soon as it ends.

    A free worker gets the first task whose needs are made.

    Args:
        start: called once in each process; returns the function that is called with ``what`` of each task.
        have: what is made already.
        until: value of ``time.monotonic()`` at which the processes are ended. Unfinished tasks yield nothing.

    Yields:
        The task, and what the function returned, or ``Failed``. A task whose needs cannot be made fails too.

    Raises:
        RuntimeError: every worker died, before it could do a task or too often.
    """
    waiting, made = list(tasks), set(have)
    spares = 2 * jobs  # workers that may replace others
    reason = ""
    workers = [_spawn(start) for _ in range(min(jobs, len(waiting)))]
    try:
        while waiting or any(worker.task for worker in workers):
            for worker in workers:
                if worker.ready and worker.task is None:
                    _give(worker, waiting, made)
            if waiting and all(worker.ready and worker.task is None for worker in workers):
                yield from ((task, Failed(f"needs what was not made: {task.needs - made}")) for task in waiting)
                return
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return
            ended = wait([worker.connection for worker in workers], left)
            for worker in [worker for worker in workers if worker.connection in ended]:
                outcome = _receive(worker)
                if isinstance(outcome, Failed) and outcome.fatal:
                    workers.remove(worker)
                    reason = outcome.error
                    if worker.ready and spares and waiting:
                        spares -= 1
                        workers.append(_spawn(start))
                worker.ready = True
                if worker.task is None:
                    continue
                task, worker.task = worker.task, None
                if not isinstance(outcome, Failed):
                    made.add(task.makes)
                yield task, outcome
            if waiting and not workers:
                raise RuntimeError(f"no worker is left, {len(waiting)} tasks are: {reason}")
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _spawn(start: Callable[[], Work]) -> _Worker:
    context = multiprocessing.get_context("spawn")  # CUDA and OpenMP do not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, start), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _give(worker: _Worker, waiting: list[Task], made: Collection[Hashable]) -> None:
    """Send the worker the first task whose needs are made, if there is one."""
    for task in waiting:
        if task.needs <= set(made):
            waiting.remove(task)
            worker.task = task
            worker.connection.send(task.what)
            return


def _receive(worker: _Worker) -> Any:
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        return Failed(f"the worker died with exit code {worker.process.exitcode}", fatal=True)


def _serve(connection: Connection, start: Callable[[], Work]) -> None:
    """Do tasks until the connection closes."""
    work = start()
    connection.send(None)
    while True:
        try:
            what = connection.recv()
        except EOFError:
            return
        try:
            outcome = work(what)
        except Exception as error:
            # After an error of the device itself, nothing more can be done in this process.
            outcome = Failed(f"{type(error).__name__}: {error}", fatal="CUDA error" in str(error))
        connection.send(outcome)
        if isinstance(outcome, Failed) and outcome.fatal:
            return
