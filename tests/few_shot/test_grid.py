"""The grids keep what the suite promises."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from benchmarks.few_shot import __main__ as command
from benchmarks.few_shot.grid import CONFIRMING, DEVELOPING, LRS, ONE_RATE, SECONDS, SHOTS, full, quick
from benchmarks.few_shot.methods import HEAD_ONLY, METHODS
from benchmarks.few_shot.results import done


def test_every_cell_of_the_full_grid_has_its_seeds_and_every_rate() -> None:
    runs = full()
    assert len(set(runs)) == len(runs)
    cells: dict[tuple[object, ...], Counter[float]] = defaultdict(Counter)
    for run in runs:
        cells[run.scenario, run.source, run.target, run.condition, run.shots, run.method][run.lr] += 1
    assert all(set(rates.values()) == {10} for rates in cells.values())
    every = {cell: set(rates) for cell, rates in cells.items() if cell[0] != "rough"}
    assert all(rates == set(LRS) for cell, rates in every.items() if HEAD_ONLY not in cell or ONE_RATE in cell)
    assert all(len(rates) == 1 for cell, rates in every.items() if HEAD_ONLY in cell and ONE_RATE not in cell)


def test_the_full_grid_has_every_set_method_shot_and_scenario() -> None:
    runs = full()
    assert {run.target for run in runs if run.scenario == "transfer"} == {*DEVELOPING, *CONFIRMING}
    assert {run.method for run in runs} == set(METHODS)
    assert {run.shots for run in runs} == set(SHOTS)
    assert {run.scenario for run in runs} == set(SECONDS)


def test_within_a_seed_all_methods_run_before_the_next_seed() -> None:
    seeds = [run.seed for run in full()]
    assert seeds == sorted(seeds)


def test_the_full_grid_fits_in_a_night_on_two_cores() -> None:
    assert sum(SECONDS[run.scenario] for run in full()) / 2 / 3600 < 11


def test_another_model_needs_a_file_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default file has runs, which would count as done."""
    options = ["--full", "--estimate", "--data", str(tmp_path), "--model"]
    with pytest.raises(SystemExit):
        command.main([*options, "models/large"])
    assert "--model models/large needs --out" in capsys.readouterr().err
    assert command.main([*options, "models/all-MiniLM-L6-v2"]) == 0
    assert command.main([*options, "models/large", "--out", str(tmp_path / "r.csv")]) == 0


def test_estimate_says_how_long_and_runs_nothing(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.csv"
    assert command.main(["--full", "--estimate", "--data", str(sets), "--out", str(out)]) == 0
    assert "runs are left: about" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.slow
def test_a_stopped_grid_is_resumed(
    sets: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.csv"
    arguments = [
        "--quick", "--scenario", "digits", "--data", str(sets), "--model", str(tiny_model), "--out", str(out),
        "--cache", str(tmp_path / "cache"), "--workers", "2",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    wanted = {run for run in quick() if run.scenario == "digits"}
    assert done(out, str(tiny_model)) == wanted
    lines = out.read_text(encoding="utf-8").splitlines()
    out.write_text("\n".join(lines[:10]) + "\n", encoding="utf-8")
    capsys.readouterr()
    assert command.main(arguments) == 0
    assert f"{len(wanted) - 9} of {len(wanted)} runs are left" in capsys.readouterr().out
    assert done(out, str(tiny_model)) == wanted
