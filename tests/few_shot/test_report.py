"""Goals and report on rows whose answers are known."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import plotting
from benchmarks.few_shot import report, tables
from benchmarks.few_shot.grid import LRS, full
from benchmarks.few_shot.methods import BASE, HEAD_ONLY
from benchmarks.few_shot.results import difference, load, untuned, worst
from tests.few_shot.known import OURS, results


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the two figures, which take as long as the text."""
    monkeypatch.setattr(plotting, "accuracies", lambda rows, column: None)
    monkeypatch.setattr(plotting, "save", lambda figure, path: None)


def test_goals_are_reached_not_reached_or_not_run(file: Path) -> None:
    text = tables.goals(load(file))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines()}
    assert "| yes |" in lines["untuned, target: at least +1.0, interval above 0"]
    assert "| yes |" in lines["stability (coherence) above in at least 80% of the cells"]
    assert "**no**" in lines["directional alignment above in at least 80% of the cells"]
    assert "not run" in lines["sequence: not below A-GEM"]


def test_the_report_is_made_from_the_rows_alone(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    assert report.main(["--results", str(file), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    rows = load(file)
    assert "## Transfer, confirming sets (hwu64, goemotions, subj, medical_abstracts), 4 shots, 10 seeds" in text
    means = untuned(rows, "target_accuracy")
    assert f"| GradGuide | {means[OURS].mean():.1f} | {difference(means, OURS)} |" in text
    assert f"| {BASE} | {worst(rows, 'target_accuracy')[BASE].mean():.1f} |" in text
    assert (tmp_path / "report-rates.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report-shots.png").read_bytes().startswith(b"\x89PNG")
    assert report.summary(file).startswith("transfer\n| method | target % |")


@pytest.mark.usefixtures("no_pictures")
def test_a_method_that_ran_on_one_set_removes_no_pairs_of_the_others(tmp_path: Path) -> None:
    rows = results()
    path, alone = tmp_path / "few_shot.csv", rows[(rows["target"] == "hwu64") & (rows["method"] == BASE)]
    rows.to_csv(path, index=False)
    before = tables.goals(load(path)), report.compact(path)
    pd.concat([rows, alone.assign(method="ZClip")]).to_csv(path, index=False)
    assert (tables.goals(load(path)), report.compact(path)) == before
    report.write(path, tmp_path / "few_shot.md")
    text = (tmp_path / "few_shot.md").read_text(encoding="utf-8")
    confirming, every = text.split("## Transfer, every method on two sets (hwu64)")
    assert "| ZClip |" not in confirming
    assert "| ZClip |" in every


@pytest.mark.usefixtures("no_pictures")
def test_the_report_counts_the_runs_of_the_grid_that_were_made(tmp_path: Path) -> None:
    known = results()
    beyond = known[known["seed"] == 0].assign(seed=10)  # a seed that the grid has not
    alone = known[(known["method"] == BASE) & (known["lr"] == LRS[0])].assign(method=HEAD_ONLY)
    former = known.assign(method="a method of former days")
    path = tmp_path / "few_shot.csv"
    pd.concat([known, beyond, alone, former]).to_csv(path, index=False)
    assert set(load(path)["method"]) == {BASE, OURS, HEAD_ONLY, "a method of former days"}
    assert set(load(path, grid=True)["method"]) == {BASE, OURS, HEAD_ONLY}
    report.write(path, tmp_path / "few_shot.md")
    text = (tmp_path / "few_shot.md").read_text(encoding="utf-8")
    assert f"{len(known) + len(alone)} of {len(full())} runs, 10 seeds where goals are judged" in text
