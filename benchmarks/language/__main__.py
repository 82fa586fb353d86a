"""Make the runs: ``python -m benchmarks.language --quick --model FOLDER --data FOLDER``. A stopped grid is resumed."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness import versions
from benchmarks.language import grid, report
from benchmarks.language.grid import Run
from benchmarks.language.methods import needs, parse
from benchmarks.language.pool import Failed, Task, do_tasks
from benchmarks.language.run import Settings, device_of
from benchmarks.language.sources import File, Spec, digest, path_of

RESULTS = Path(__file__).parent.parent / "results"
_SECONDS = {"cpu": 150.0, "cuda": 4.0}
"""Approximate seconds of a run of 40 steps of SmolLM2-135M: on two CPU cores, or in one of 12 workers on a GPU."""
_MEMORY = 10 * 2**30
"""Bytes that a worker may take on a GPU. 8 GB were seen; 12 workers on 80 GB ran out of memory."""
_CONTEXT = 0.7 * 2**30
"""Bytes that the CUDA context of a worker takes beside its tensors."""
_WORKERS = 12
"""Workers of the estimate for a GPU."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.language", description=__doc__)
    size = made.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_const", const="quick", dest="grid", help="two runs, minutes on 2 cores")
    size.add_argument("--full", action="store_const", const="full", dest="grid", help="everything")
    size.add_argument("--grid", choices=list(grid.GRIDS), help="a grid by name")
    made.add_argument("--model", required=True, help="folder or hub id of a causal language model")
    made.add_argument("--data", type=Path, required=True, help="folder of the text sets")
    made.add_argument("--out", type=Path, help="result file, appended to (default: by grid, in benchmarks/results)")
    made.add_argument("--cache", type=Path, default=Path("build/language"), help="folder of shared files")
    made.add_argument("--jobs", type=int, default=1, help="worker processes, on one GPU too (default: %(default)s)")
    made.add_argument("--deadline", type=float, help="stop after this many seconds, with all finished rows written")
    made.add_argument("--only", nargs="+", metavar="METHOD", help="only these methods, also such as no grid has")
    made.add_argument("--no-graphs", action="store_true", help="do not capture CUDA graphs")
    made.add_argument("--stability", action="store_true", help="measure gradients too; not for timing steps")
    made.add_argument("--estimate", action="store_true", help="print how long it will take, and stop")
    return made


def main(argv: list[str] | None = None) -> int:
    """Make the runs that the result file does not have."""
    begun = time.monotonic()
    made = parser()
    options = made.parse_args(argv)
    out = options.out or RESULTS / f"language-{options.grid}.csv"
    wanted = _chosen(grid.GRIDS[options.grid](), options.only)
    model = Path(options.model).name
    try:
        finished = grid.done(out, model)
    except ValueError as error:
        made.error(str(error))
    left = [run for run in wanted if run not in finished]
    waiting = set(left)
    device = device_of()
    print(f"{len(left)} of {len(wanted)} runs are left: {_estimate(left)}")
    if options.grid == "full":
        part = [run for run in grid.cpu() if run in waiting]
        print(f"of these for a CPU (--grid cpu): {len(part)} runs: {_estimate(part)}")
        for name in ("fresh", "sequence", "confirm", "transfer", "rows", "instructions", "few", "research"):
            part = [run for run in grid.GRIDS[name]() if run in waiting]
            print(f"of these for a GPU (--grid {name}): {len(part)} runs: {_estimate(part)}")
    if options.estimate or not left:
        return 0
    jobs, share = options.jobs, 1.0
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        jobs = max(1, min(jobs, free // _MEMORY))
        share = (free / jobs - _CONTEXT) / total
        print(f"{jobs} workers, each with at most {share * total / 2**30:.1f} GiB")
    settings = Settings(
        model=options.model,
        data=options.data,
        cache=options.cache,
        threads=1 if device.type == "cuda" else max(1, (os.cpu_count() or 1) // options.jobs),
        graphs=not options.no_graphs,
        stability=options.stability,
        share=share,
    )
    about = {**versions(), "model": model, "threads": str(settings.threads)}
    until = None if options.deadline is None else begun + options.deadline
    failed = 0
    with tqdm(total=len(left), unit="run", smoothing=0.02) as bar:
        for run, measured in make_rows(left, settings, jobs, until):
            grid.append(out, run, {**measured, "jobs": jobs}, about)
            failed += "error" in measured
            bar.set_postfix(failed=failed)
            bar.update()
    print(report.summary(out))
    return 0


def make_rows(
    runs: Sequence[Run], settings: Settings, jobs: int, until: float | None
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Make the shared files that are missing, and do the runs; yield each run with its measured columns."""
    key = digest(settings.model, settings.data, device_of())
    settings.cache.mkdir(parents=True, exist_ok=True)
    have = {file for run in runs for file in _files(run) if path_of(file, settings.cache, key).exists()}
    tasks = _tasks(runs, have)
    for task, outcome in do_tasks(tasks, settings.start, jobs, have=have, until=until):
        if isinstance(outcome, Failed) and not isinstance(task.what, Run):
            tqdm.write(f"{task.what} could not be made: {outcome.error}", file=sys.stderr)
        if isinstance(task.what, Run):
            yield task.what, {"error": " ".join(outcome.error.split())} if isinstance(outcome, Failed) else outcome


def _estimate(runs: Sequence[Run]) -> str:
    """Return the time of the runs on two CPU cores and on a GPU, in words."""
    work = sum(max(run.work, 10) for run in runs) / 40
    hours, minutes = work * _SECONDS["cpu"] / 3600, work * _SECONDS["cuda"] / _WORKERS / 60
    return f"about {hours:.1f} h on two CPU cores, {minutes:.1f} min on a GPU with {_WORKERS} workers"


def _chosen(runs: list[Run], methods: Sequence[str] | None) -> list[Run]:
    """Return the runs of ``methods``, in the order of the grid; every method runs where the baseline does.

    ``none`` makes no step, so that it runs once for all rates.
    """
    if methods is None:
        return runs
    places = [run for run in runs if run.method == grid.BASE]
    made = [replace(run, method=method) for run in places for method in methods]
    return list(dict.fromkeys(replace(run, steps=0, lr=0.0) if run.method == "none" else run for run in made))


def _files(run: Run) -> list[File]:
    """Return the shared files of a run, each after those that it is made from."""
    found: list[File] = []
    for file in sorted(needs(parse(run.method)), key=str):
        found += [*(file.needs if isinstance(file, Spec) else ()), file]
    return found


def _tasks(runs: Sequence[Run], have: Collection[File]) -> list[Task]:
    """Return the tasks in order: each file just before the first run that needs it. Others need not wait for it."""
    tasks: list[Task] = []
    listed = set(have)
    for run in runs:
        for file in _files(run):
            if file not in listed:
                listed.add(file)
                tasks.append(Task(what=file, needs=file.needs if isinstance(file, Spec) else frozenset(), makes=file))
        tasks.append(Task(what=run, needs=needs(parse(run.method))))
    return tasks


if __name__ == "__main__":
    # For the worker processes, which read it when they import the packages: only this one shows a progress bar.
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
