"""The command from end to end, with worker processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.language import grid, report
from benchmarks.language.__main__ import _chosen, main

_PARTS = ("fresh", "sequence", "confirm", "transfer", "rows", "instructions", "few", "research")


def test_an_estimate_makes_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.csv"
    options = ["--full", "--estimate", "--model", "none", "--data", "none", "--out", str(out)]
    assert main(options) == 0
    shown, count = capsys.readouterr().out, len(grid.full())
    assert f"{count} of {count} runs are left" in shown
    assert "of these for a CPU (--grid cpu): 20 runs" in shown
    for name in ("fresh", "sequence", "confirm", "transfer", "rows", "instructions"):
        assert f"of these for a GPU (--grid {name}): {len(grid.GRIDS[name]())} runs" in shown
    assert not out.exists()


def test_an_estimate_counts_the_chosen_methods_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--full", "--estimate", "--model", "none", "--data", "none", "--out", str(tmp_path / "r.csv")]
    assert main([*options, "--only", "clip"]) == 0
    first, *parts = capsys.readouterr().out.splitlines()
    for name, line in zip(("cpu", *_PARTS), parts, strict=True):
        clip = sum(run.method == "clip" for run in grid.GRIDS[name]())
        assert f"(--grid {name}): {clip} runs" in line
    assert f"{sum(run.method == 'clip' for run in grid.full())} of" in first


def test_the_untrained_model_is_measured_once_for_all_rates() -> None:
    chosen = _chosen(grid.confirm(), ["none", "clip"])
    untrained = [run for run in chosen if run.method == "none"]
    assert set(untrained) == {run for run in grid.confirm() if run.method == "none"}
    assert len(untrained) == len(set(untrained)) == 40
    assert len(chosen) == 40 + 160


def test_a_result_file_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its runs would count as done."""
    run = grid.quick()[0]
    about = dict.fromkeys(("commit", "gradguide", "torch", "python", "device", "threads"), "x")
    out = tmp_path / "r.csv"
    grid.append(out, run, {"target_loss": 1.0}, {**about, "model": "small"})
    options = ["--quick", "--model", "models/large", "--data", str(tmp_path), "--out", str(out)]
    with pytest.raises(SystemExit):
        main(options)
    assert "runs of the model 'small', found 'large'; name another --out" in capsys.readouterr().err
    assert main([*options, "--estimate", "--model", "models/small"]) == 0
    assert "1 of 2 runs are left" in capsys.readouterr().out


def test_a_report_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path / "no.csv"), "--out", str(tmp_path / "no.md")])
    assert "must be an existing file of results" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_grid_is_resumed(
    folder: Path, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.csv"
    options = ["--quick", "--model", str(folder), "--data", str(sets), "--out", str(out), "--jobs", "2",
               "--cache", str(tmp_path / "cache")]  # fmt: skip
    assert main([*options, "--deadline", "0"]) == 0
    assert not grid.done(out, folder.name)
    assert main([*options, "--only", "clip"]) == 0
    assert "1 of 1 runs are left" in capsys.readouterr().out
    assert main(options) == 0
    assert "1 of 2 runs are left" in capsys.readouterr().out
    assert grid.done(out, folder.name) == set(grid.quick())


@pytest.mark.slow
def test_every_method_and_scenario_runs_in_worker_processes(folder: Path, sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    options = ["--grid", "smoke", "--model", str(folder), "--data", str(sets), "--out", str(out), "--jobs", "2",
               "--cache", str(tmp_path / "cache")]  # fmt: skip
    assert main(options) == 0
    assert grid.done(out, folder.name) == set(grid.smoke())  # none failed
    assert report.main(["--results", str(out), "--out", str(tmp_path / "r.md")]) == 0
