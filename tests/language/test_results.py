"""The order of the grid, the file of results, and the report on rows whose answers are known."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.language import grid, report
from benchmarks.language.grid import BASE, LRS, TARGETS, Run
from benchmarks.language.methods import parse

_ABOUT = dict.fromkeys(("commit", "gradguide", "torch", "python", "device", "threads"), "x")
_OURS = "structured"


def _row(run: Run) -> dict[str, object]:
    """clip is right at 3e-3 only, and drifts with the rate; the other is always 2 points below that, and stays."""
    clip = run.method == BASE
    accuracy = (0.70 if run.lr == 3e-3 else 0.60) if clip else 0.68
    level = 0.01 * run.seed + 0.05 * TARGETS.index(run.target)
    return {
        "target_accuracy": accuracy + level,
        "target_loss": 1.0,
        "drift": 100 * run.lr if clip else 0.01,
        "drift_answers": 0.5,
        "modelled_drift": None if clip else 0.02,
        "seconds_per_step": 0.1 if clip else 0.11,
        "seconds": 5.0,
        "rows": 160,
        "jobs": 1,
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Rows of two methods on the research grid."""
    path = tmp_path / "language.csv"
    for run in grid.research():
        if run.method in (BASE, _OURS):
            grid.append(path, run, _row(run), _ABOUT)
    return path


def test_a_grid_that_is_cut_off_is_balanced() -> None:
    runs = grid.research()
    assert len(set(runs)) == len(runs)
    counted = Counter(run.method for run in runs)
    assert set(counted.values()) == {2 * len(TARGETS) * len(LRS)}
    for end in range(1, len(runs)):
        methods = Counter(run.method for run in runs[:end])
        begun = [m for m in methods if methods[m] < 32]
        assert not begun or max(methods[m] for m in begun) - min(methods[m] for m in begun) <= 1
    assert [run.method for run in runs[:2]] == [BASE, _OURS]
    assert {run.seed for run in runs[:32]} == {0}


def test_every_method_of_every_grid_parses() -> None:
    for make in grid.GRIDS.values():
        for run in make():
            parse(run.method)


def test_a_failed_run_is_made_again(tmp_path: Path) -> None:
    first, second = grid.research()[:2]
    grid.append(tmp_path / "r.csv", first, {"error": "ValueError: no luck", "jobs": 1}, _ABOUT)
    grid.append(tmp_path / "r.csv", second, _row(second), _ABOUT)
    assert grid.done(tmp_path / "r.csv") == {second}
    grid.append(tmp_path / "r.csv", first, _row(first), _ABOUT)
    assert grid.done(tmp_path / "r.csv") == {first, second}
    assert len(report.load(tmp_path / "r.csv")) == 2


def test_the_report_compares_with_the_baseline_in_pairs(file: Path) -> None:
    lines = {line.split(" | ")[0].strip("| "): line for line in report.compared(report.load(file)).splitlines()}
    ours = [cell.strip() for cell in lines[_OURS].strip("|").split(" | ")]
    # 68 against a mean over the rates of 62.5, and against 70 at the best rate; every pair has the same difference.
    assert ours[1:3] == ["8", "4"]
    assert ours[4:6] == ["+5.5 (+5.5 to +5.5)", "-2.0 (-2.0 to -2.0)"]
    assert ours[7] == "0.010"
    assert ours[8].startswith("-0.347")
    assert ours[-3:] == ["0.010", "0.020", "110"]


def test_the_report_of_a_cut_off_grid_uses_complete_pairs(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(lines[:1] + lines[1:-3]) + "\n", encoding="utf-8")
    ours = next(line for line in report.compared(report.load(file)).splitlines() if line.startswith(f"| {_OURS}"))
    assert ours.split(" | ")[1] == "7"


def test_the_report_is_written(file: Path, tmp_path: Path) -> None:
    assert report.main(["--results", str(file), "--out", str(tmp_path / "language.md")]) == 0
    text = (tmp_path / "language.md").read_text(encoding="utf-8")
    assert "| clip | 0.030 | 0.100 | 0.300 | 1.000 | 32 |" in text
    assert "64 runs (the full grid has" in text
