"""The table, CSV file and figure of the demo on a language model."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from gradguide.demo.data import Task
from gradguide.demo.language.report import print_table, write_report
from gradguide.demo.language.run import LanguageConfig, Outcome


def test_table_and_files_hold_every_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = LanguageConfig(model="m", out=tmp_path)
    task = Task(name="west", labels=("a", "b"), train=(), test=())
    values = {"plain": [(0.5, 0.4), (0.7, 0.6)], "GradGuide": [(0.6, 0.1), (0.8, 0.1)]}
    outcomes = [
        Outcome(method=method, seed=seed, target_accuracy=accuracy, drift=drift, seconds_per_step=0.25)
        for method, runs in values.items()
        for seed, (accuracy, drift) in enumerate(runs)
    ]
    csv_path, png_path = write_report(config, task, outcomes, 0.3, torch.device("cpu"))
    with csv_path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["drift"]) for row in rows[:2]] == [
        ("plain", "0", "0.4"),
        ("plain", "1", "0.6"),
    ]
    assert rows[0]["target_accuracy_before"] == "0.3"
    assert png_path.read_bytes().startswith(b"\x89PNG")
    print_table(config, task, outcomes, 0.3)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "plain 60.0 ± 14.1 0.500 ± 0.141 0.250 ± 0.000" in shown
    assert "GradGuide - plain +10.0 ± 0.0 -0.400 ±" in shown
    assert "Target accuracy before: 30.0 %" in shown
