"""Makes the runs: ``python -m benchmarks.few_shot --quick --data FOLDER`` or ``--full``; resumes a stopped one."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from benchmarks.few_shot import grid, report, results, workers
from benchmarks.few_shot.candidates import CANDIDATES
from benchmarks.few_shot.scenarios import Settings
from benchmarks.harness import versions
from gradguide.demo.config import DEFAULT_MODEL

RESULTS = Path(__file__).parent.parent / "results"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.few_shot", description=__doc__)
    size = made.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="a small table in about 5 minutes on 2 cores")
    size.add_argument("--full", action="store_true", help="the whole grid; says beforehand how long it will take")
    size.add_argument("--candidates", action="store_true", help="rules under study, on the developing sets")
    made.add_argument("--data", type=Path, required=True, help="folder of the text sets, each with train.tsv, test.tsv")
    made.add_argument(
        "--out", type=Path, help="file of results, appended to (default: of its size, in benchmarks/results)"
    )
    made.add_argument("--model", default=DEFAULT_MODEL, help="hub id or folder of the encoder")
    made.add_argument("--causal", help="hub id or folder of a causal language model: adds its runs to the full grid")
    made.add_argument("--workers", type=int, default=workers.default_workers(), help="processes (default: one a core)")
    made.add_argument("--cache", type=Path, default=Path("build/few_shot"), help="where source adapters are kept")
    made.add_argument("--scenario", help="only this scenario's runs")
    made.add_argument("--estimate", action="store_true", help="only say how long it would take")
    return made


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    size = "full" if options.full else "quick" if options.quick else "candidates"
    out = options.out or RESULTS / ("few_shot.csv" if options.full else f"few_shot_{size}.csv")
    wanted = _wanted(size, causal=options.causal is not None)
    if options.scenario is not None:
        wanted = [run for run in wanted if run.scenario == options.scenario]
    finished = results.done(out)
    left = [run for run in wanted if run not in finished]
    hours = sum(grid.SECONDS[run.scenario] for run in left) / options.workers / 3600
    print(
        f"{len(left)} of {len(wanted)} runs are left: about {hours:.1f} h with {options.workers} workers on CPU cores"
    )
    if options.estimate or not left:
        return 0
    settings = Settings(data=options.data, cache=options.cache, model=options.model, causal=options.causal)
    about = {**versions(), "threads": "1"}
    with tqdm(total=len(left), unit="run", smoothing=0.02) as bar:
        for run, measured in workers.make(left, settings, options.workers):
            results.append(out, run, measured, about)
            bar.update()
    if not options.full:
        print(report.summary(out))
    return 0


def _wanted(size: str, *, causal: bool) -> list[grid.Run]:
    if size == "full":
        return grid.full(causal=causal)
    return grid.quick() if size == "quick" else grid.candidates(CANDIDATES)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
