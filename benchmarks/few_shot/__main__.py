"""Make the runs: ``python -m benchmarks.few_shot --quick --data FOLDER``, or ``--full``. A stopped grid is resumed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from benchmarks.few_shot import grid, report, results
from benchmarks.few_shot.runs import Settings, default_workers, make_rows
from benchmarks.harness import versions
from gradguide.demo.config import DEFAULT_MODEL

RESULTS = Path(__file__).parent.parent / "results"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.few_shot", description=__doc__)
    size = made.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="a small table in about 5 minutes on 2 cores")
    size.add_argument("--full", action="store_true", help="the whole grid; prints first how long it will take")
    made.add_argument(
        "--data", type=Path, required=True, help="folder of the text sets, each with train.tsv and test.tsv"
    )
    made.add_argument("--out", type=Path, help="result file, appended to (default: by size, in benchmarks/results)")
    made.add_argument("--model", default=DEFAULT_MODEL, help="hub id or folder of the encoder (default: %(default)s)")
    made.add_argument("--workers", type=int, default=default_workers(), help="processes (default: %(default)s)")
    made.add_argument("--cache", type=Path, default=Path("build/few_shot"), help="folder of trained source adapters")
    made.add_argument("--scenario", help="only the runs of this scenario")
    made.add_argument("--estimate", action="store_true", help="print how long it will take, and stop")
    return made


def main(argv: list[str] | None = None) -> int:
    """Make the runs that the result file does not have."""
    made = parser()
    options = made.parse_args(argv)
    if options.out is None and results.model_name(options.model) != results.model_name(DEFAULT_MODEL):
        made.error(f"--model {options.model} needs --out: the default file has runs of {DEFAULT_MODEL}")
    out = options.out or RESULTS / ("few_shot.csv" if options.full else "few_shot_quick.csv")
    wanted = grid.full() if options.full else grid.quick()
    if options.scenario is not None:
        wanted = [run for run in wanted if run.scenario == options.scenario]
    try:
        finished = results.done(out, options.model)
    except ValueError as error:
        made.error(str(error))
    left = [run for run in wanted if run not in finished]
    hours = sum(grid.SECONDS[run.scenario] for run in left) / options.workers / 3600
    print(
        f"{len(left)} of {len(wanted)} runs are left: about {hours:.1f} h with {options.workers} workers on CPU cores"
    )
    if options.estimate or not left:
        return 0
    settings = Settings(data=options.data, cache=options.cache, model=options.model)
    about = {**versions(), "threads": "1", "model": results.model_name(options.model)}
    with tqdm(total=len(left), unit="run", smoothing=0.02) as bar:
        for run, measured in make_rows(left, settings, options.workers):
            results.append(out, run, measured, about)
            bar.update()
    if not options.full:
        print(report.summary(out))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
