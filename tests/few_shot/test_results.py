"""The file of results, and its statistics on rows whose answers are known."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.few_shot.__main__ import RESULTS
from benchmarks.few_shot.grid import LRS, ONE_RATE, quick
from benchmarks.few_shot.methods import BASE, HEAD_ONLY
from benchmarks.few_shot.results import append, difference, done, load, outcomes, step_ratio, tuned, untuned, worst
from gradguide.demo.config import DEFAULT_MODEL
from tests.few_shot.known import OURS, results


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


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("method,lr\nclip,0.1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="other columns"):
        done(path, "model")


def test_a_file_has_the_runs_of_one_model(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    about = dict.fromkeys(("commit", "gradguide", "torch", "python", "device", "threads"), "x")
    append(path, quick()[0], {}, {**about, "model": "one"})
    assert done(path, "hub/One") == done(path, "folder/one") == {quick()[0]}
    with pytest.raises(ValueError, match=r"has runs of the model 'one', found 'three'; name another --out"):
        done(path, "three")


def test_files_of_earlier_versions_have_the_runs_of_the_default_model(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    with (RESULTS / "few_shot.csv").open(encoding="utf-8") as file:
        path.write_text("".join(islice(file, 3)), encoding="utf-8")
    first = done(path, DEFAULT_MODEL)
    added = replace(next(iter(first)), seed=99)
    about = dict.fromkeys(("model", "commit", "gradguide", "torch", "python", "device", "threads"), "x")
    append(path, added, {"seconds": 1.0}, about)
    assert done(path, DEFAULT_MODEL) == {*first, added}
    assert len(load(path)) == 3
    with pytest.raises(ValueError, match="name another --out"):
        done(path, "other")
