"""Statistics, goals and report on results whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.few_shot import goals, report
from benchmarks.few_shot.grid import CONFIRMING, LRS, ONE_RATE, full
from benchmarks.few_shot.methods import BASE, HEAD_ONLY
from benchmarks.few_shot.views import difference, load, outcomes, step_ratio, tuned, untuned, worst

OURS = "GradGuide"


def results(ours: float = 5.0, spread: float = 0.5) -> pd.DataFrame:
    """Transfer on the confirming sets: the base is good at 5e-4 alone; ours is ``ours`` points above it everywhere."""
    generator = np.random.default_rng(0)
    level = dict(zip(LRS, (60.0, 80.0, 70.0, 30.0), strict=True))
    rows = []
    for target in CONFIRMING:
        for seed in range(10):
            for lr in LRS:
                shared = generator.normal()
                for method, gain in ((BASE, 0.0), (OURS, ours)):
                    accuracy = level[lr] + shared + gain + spread * generator.normal()
                    rows.append({
                        "scenario": "transfer", "source": "assistant", "target": target, "condition": "clean",
                        "shots": 4, "method": method, "lr": lr, "seed": seed, "target_accuracy": accuracy / 100,
                        "source_accuracy": (accuracy + 10) / 100, "source_accuracy_before": 0.95,
                        "backward_transfer": np.nan, "coherence": 0.4 + gain / 100, "successive_cosine": 0.1,
                        "alignment": 0.2 - gain / 100, "steps_to_final": 10, "seconds_per_step": 0.1,
                        "memory": 2**20, "diverged": 0, "commit": "abc", "torch": "2",
                    })  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "few_shot.csv"
    results().to_csv(path, index=False)
    return path


def test_the_untuned_view_is_the_mean_over_the_grid_in_pairs(file: Path) -> None:
    table = untuned(load(file), "target_accuracy")
    assert len(table) == 40
    assert table[BASE].mean() == pytest.approx(60.0, abs=1.0)
    found = difference(table, OURS)
    assert found.mean == pytest.approx(5.0, abs=0.2)
    assert found.low < 5.0 < found.high
    assert found.high - found.low < 0.4  # what the pairs share is no noise


def test_the_head_alone_stands_at_every_rate(tmp_path: Path) -> None:
    rows = results()
    alone = rows[(rows["method"] == BASE) & (rows["lr"] == LRS[0])].assign(method=HEAD_ONLY)
    one_rate = alone.assign(condition=ONE_RATE)
    pd.concat([rows, alone, one_rate]).to_csv(tmp_path / "r.csv", index=False)
    table = load(tmp_path / "r.csv")
    assert sorted(table[(table["method"] == HEAD_ONLY) & (table["condition"] == "clean")]["lr"].unique()) == list(LRS)
    assert list(table[table["condition"] == ONE_RATE]["lr"].unique()) == [LRS[0]]
    assert len(table) == len(rows) + len(LRS) * len(alone) + len(one_rate)
    means = untuned(table[table["condition"] == "clean"], "target_accuracy")
    assert means[HEAD_ONLY].mean() == pytest.approx(60, abs=1)


def test_an_incomplete_grid_is_left_out_of_the_untuned_view(file: Path) -> None:
    rows = load(file)
    gap = (rows["method"] == OURS) & (rows["lr"] == 1e-2) & (rows["seed"] == 9) & (rows["target"] == "subj")
    assert len(untuned(rows[~gap], "target_accuracy")) == 39


def test_the_tuned_view_chooses_the_rate_on_the_other_sets(file: Path) -> None:
    rows = load(file)
    # On one set another rate is far better; it must not be chosen there, since the other sets know nothing of it.
    lucky = (rows["target"] == "subj") & (rows["lr"] == 1e-2)
    rows.loc[lucky, "target_accuracy"] += 65.0
    table = tuned(rows, "target_accuracy")[BASE]
    assert table.loc["subj"].mean() == pytest.approx(80.0, abs=1.5)


def test_the_worst_view_is_the_worst_rate_of_each_set(file: Path) -> None:
    assert worst(load(file), "target_accuracy")[BASE].mean() == pytest.approx(30.0, abs=1.0)


def test_wins_ties_and_losses(tmp_path: Path) -> None:
    for gain, expected in ((5.0, "wins"), (-5.0, "losses")):
        results(gain).to_csv(tmp_path / "r.csv", index=False)
        counted = outcomes(load(tmp_path / "r.csv"), "target_accuracy", OURS)
        assert counted == {**dict.fromkeys(("wins", "ties", "losses"), 0), expected: 16}
    results(0.0).to_csv(tmp_path / "r.csv", index=False)
    assert outcomes(load(tmp_path / "r.csv"), "target_accuracy", OURS)["ties"] >= 12


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        pairs = pd.DataFrame({BASE: np.zeros(40), OURS: generator.normal(1.0, 3.0, size=40)})
        found = difference(pairs, OURS)
        covered += found.low <= 1.0 <= found.high
    assert 178 <= covered <= 200


def test_goals_say_yes_no_and_not_run(file: Path) -> None:
    text = goals.table(load(file))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines()}
    assert "| yes |" in lines["untuned, target: at least +1.0, interval above 0"]
    assert "| yes |" in lines["stability (coherence) above in at least 80% of the cells"]
    assert "**no**" in lines["directional alignment above in at least 80% of the cells"]
    assert "not run" in lines["sequence: not below A-GEM"]


def test_the_report_is_made_from_the_rows_alone(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    assert report.main(["--results", str(file), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "Transfer, confirming sets" in text
    assert "| GradGuide |" in text
    assert (tmp_path / "report-rates.png").stat().st_size > 10_000
    assert "GradGuide" in report.summary(file)


def test_a_method_that_ran_on_one_set_takes_the_others_from_nobody(tmp_path: Path) -> None:
    rows = results()
    path, alone = tmp_path / "few_shot.csv", rows[(rows["target"] == "hwu64") & (rows["method"] == BASE)]
    rows.to_csv(path, index=False)
    before = goals.table(load(path)), report.compact(path)
    pd.concat([rows, alone.assign(method="ZClip")]).to_csv(path, index=False)
    assert (goals.table(load(path)), report.compact(path)) == before
    report.write(path, tmp_path / "few_shot.md")
    text = (tmp_path / "few_shot.md").read_text(encoding="utf-8")
    confirming, every = text.split("## Transfer, every method on two sets (hwu64)")
    assert "| ZClip |" not in confirming
    assert "| ZClip |" in every


def test_the_report_speaks_of_the_grid_and_of_runs_that_were_made(tmp_path: Path) -> None:
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


def test_times_are_compared_within_a_version_only() -> None:
    rows = results()
    slow = (rows["method"] == OURS) & (rows["seed"] < 3)
    rows.loc[slow, "seconds_per_step"] = 7.0
    assert step_ratio(rows.assign(commit=np.where(slow, "of another day", "abc")), OURS) == 1.0
    assert np.isnan(step_ratio(rows.assign(commit=rows["method"]), OURS))


def test_one_pair_has_no_interval_and_wins_nothing() -> None:
    table = pd.DataFrame({"GradGuide": [60.0], BASE: [50.0]})
    found = difference(table, "GradGuide")
    assert str(found) == "+10.0 (one pair)"
    assert not found.low > 0
