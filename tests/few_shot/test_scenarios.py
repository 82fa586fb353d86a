"""Every scenario, from a run to its row, on a tiny encoder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.few_shot.grid import SEQUENCES, Run
from benchmarks.few_shot.results import append, done
from benchmarks.few_shot.rough import CONDITIONS, outlier_batches, spikes
from benchmarks.few_shot.scenarios import Settings, Suite


def run_of(**fields: object) -> Run:
    given = {
        "scenario": "transfer", "source": "assistant", "target": "clinc150", "condition": "clean", "shots": 2,
        "method": "clip", "lr": 1e-3, "seed": 0,
    }  # fmt: skip
    return Run(**{**given, **fields})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def suite(sets: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite(Settings(data=sets, cache=tmp_path_factory.mktemp("cache"), model=str(tiny_model)))


RUNS = [
    run_of(),
    run_of(method="GradGuide", seed=5),
    run_of(target="banking77", method="A-GEM"),
    run_of(scenario="cross", source="films", target="goemotions", method="EWC"),
    run_of(scenario="digits", source="digits 0-4", target="digits 5-9", method="GradGuide"),
    *(run_of(scenario="rough", condition=condition, method="GradGuide") for condition in CONDITIONS),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.scenario}-{run.condition}-{run.method}")
def test_a_run_gives_a_row_that_the_file_takes_and_remembers(suite: Suite, tmp_path: Path, run: Run) -> None:
    row = suite.row(run)
    assert 0.0 <= row["target_accuracy"] <= 1.0
    assert 0.0 <= row["source_accuracy"] <= 1.0
    assert 0.0 < row["coherence"] <= 1.0
    assert math.isfinite(row["alignment"]) == (run.seed < 2)
    assert row["seconds"] > 0
    path = tmp_path / "results.csv"
    about = dict.fromkeys(("commit", "gradguide", "torch", "python", "device", "threads"), "x")
    append(path, run, row, about)
    append(path, run_of(seed=7), row, about)
    assert done(path) == {run, run_of(seed=7)}


def test_the_same_run_twice_is_the_same(suite: Suite) -> None:
    run = run_of(method="GradGuide", lr=1e-2)
    first = suite.row(run)
    suite.row(run_of(method="replay", target="banking77"))
    second = suite.row(run)
    for key in ("target_accuracy", "source_accuracy", "loss", "coherence", "alignment"):
        assert first[key] == second[key], key


@pytest.mark.parametrize("method", ["clip", "EWC", "A-GEM", "GradGuide"])
def test_a_sequence_learns_five_tasks_and_says_what_was_lost(
    suite: Suite, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SEQUENCES, "small", ("clinc150", "banking77", "mr", "clinc150", "banking77"))
    row = suite.row(run_of(scenario="sequence", source="none", target="small", method=method))
    assert -1.0 <= row["backward_transfer"] <= 1.0
    assert 0.0 <= row["target_accuracy"] <= 1.0
    assert (row["capture_seconds"] > 0.01) == (method in ("EWC", "GradGuide"))


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("method,lr\nclip,0.1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="other columns"):
        done(path)


def test_spikes_and_outliers_come_at_their_rate_and_are_the_same_for_every_method() -> None:
    factor = spikes(0.1, seed=3)
    found = [factor(step) for step in range(1000)]
    assert found == [factor(step) for step in range(1000)]
    assert set(found) == {1.0, 1000.0}
    assert 60 < found.count(1000.0) < 140

    batch = {"input_ids": torch.arange(12).view(3, 4), "labels": torch.tensor([0, 1, 2])}
    spoil = outlier_batches(0.2, 3, seed=3)
    made = [spoil(step, dict(batch)) for step in range(200)]
    noisy = [b for b in made if not torch.equal(b["input_ids"], batch["input_ids"])]
    assert 20 < len(noisy) < 60
    assert all(torch.equal(b["input_ids"].reshape(-1).sort().values, torch.arange(12)) for b in noisy)
