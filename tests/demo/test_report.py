from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from gradguide.demo.compare import Outcome, Prepared
from gradguide.demo.config import DemoConfig
from gradguide.demo.data import Example, Task, Transfer
from gradguide.demo.report import paired_difference, print_table, write_report


def task(name: str, labels: tuple[str, ...], tests: int) -> Task:
    return Task(name=name, labels=labels, train=(), test=(Example("text", labels[0], name),) * tests)


class Rows(list[int]):
    """Stands for encoded rows: a length and a device."""

    device = torch.device("cpu")


def prepared(seeds: int, *, tested: int = 8) -> Prepared:
    """Only what the report reads; there is no model."""
    transfer = Transfer(
        source=task("sea, sky", ("a", "b", "c"), 8), target=task("land", ("d", "e"), 4), split="by domain"
    )
    return Prepared(
        config=DemoConfig(seeds=seeds, model="some/model", lr=0.5),
        transfer=transfer,
        model=cast(Any, None),
        adapter={},
        source=cast(Any, None),
        shots=(),
        target_test=cast(Any, Rows(range(4))),
        source_test=cast(Any, Rows(range(tested))),
        source_accuracy=0.875,
    )


def outcome(method: str, seed: int, target: float, source: float, coherence: tuple[float, ...]) -> Outcome:
    return Outcome(
        method=method,
        seed=seed,
        target_accuracy=target,
        source_accuracy=source,
        coherence=coherence,
        seconds_per_step=0.25,
    )


# Not sorted by seed, which the report must not depend on.
TWO_SEEDS = [
    outcome("plain", 1, 0.5, 0.75, (0.5, 0.75)),
    outcome("mine", 1, 0.75, 0.75, (1.0, 0.5)),
    outcome("plain", 0, 0.25, 0.5, (1.0, 0.5)),
    outcome("mine", 0, 0.75, 0.625, (1.0, 0.75)),
]


@pytest.mark.parametrize(
    ("pairs", "quantile"), [(2, 12.7062), (3, 4.30265), (4, 3.18245), (5, 2.77645), (10, 2.26216), (31, 2.04227)]
)
def test_half_width_is_that_of_the_printed_t_table(pairs: int, quantile: float) -> None:
    differences = [float(number % 2) for number in range(pairs)]
    mean, half = paired_difference([7 + d for d in differences], [7.0] * pairs)
    squares = sum((d - sum(differences) / pairs) ** 2 for d in differences)
    assert mean == pytest.approx(sum(differences) / pairs)
    assert half == pytest.approx(quantile * math.sqrt(squares / (pairs - 1) / pairs), rel=1e-5)


def test_equal_pairs_have_an_interval_of_zero() -> None:
    assert paired_difference([1.0, 1.0], [1.0, 1.0]) == (0.0, 0.0)


def test_one_pair_has_no_interval() -> None:
    mean, half = paired_difference([3.0], [2.0])
    assert mean == 1.0
    assert math.isnan(half)


def test_pairs_must_be_complete() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0, 2.0], [1.0])


def test_table_has_means_deviations_and_paired_differences(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(prepared(2), TWO_SEEDS)
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")] for line in out.splitlines()]
    assert ["plain", "37.5 ± 17.7", "62.5 ± 17.7", "0.69 ± 0.09", "0.250 ± 0.000"] in lines
    assert ["mine", "75.0 ± 0.0", "68.8 ± 8.8", "0.81 ± 0.09", "0.250 ± 0.000"] in lines
    # Differences per seed: target 50 and 25, source 12.5 and 0, coherence 0.125 and 0.125.
    assert ["mine - plain", "+37.5 ± 158.8", "+6.2 ± 79.4", "+0.12 ± 0.00", "+0.000 ± 0.000"] in lines
    text = " ".join(out.split())
    assert text.startswith("target land (2 labels, 4 shots), source sea, sky (3 labels)")
    assert "Source accuracy before: 87.5 %. Split by domain." in text
    assert "over 2 seeds" in text
    assert "test rows" not in text


def test_table_of_one_seed_has_no_deviations(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(prepared(1, tested=6), [o for o in TWO_SEEDS if o.seed == 0])
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")] for line in out.splitlines()]
    assert ["plain", "25.0", "50.0", "0.75", "0.250"] in lines
    assert ["mine - plain", "+50.0", "+12.5", "+0.12", "+0.000"] in lines
    text = " ".join(out.split())
    assert "One seed: no standard deviation and no interval." in text
    assert "Source accuracy is measured on 6 of 8 test rows" in text


def test_brackets_in_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    results = [dataclasses.replace(o, method=f"[{o.method}]") for o in TWO_SEEDS]
    print_table(prepared(2), results)
    assert "[mine] - [plain]" in capsys.readouterr().out


def test_csv_has_one_row_per_run(tmp_path: Path) -> None:
    path, _ = write_report(tmp_path, prepared(2), TWO_SEEDS)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("plain", "1"),
        ("mine", "1"),
        ("plain", "0"),
        ("mine", "0"),
    ]
    expected = {
        "target_accuracy": "0.75",
        "source_accuracy": "0.625",
        "coherence": "0.875",
        "seconds_per_step": "0.25",
        "source_accuracy_before": "0.875",
        "source_test_rows": "8",
        "target_test_rows": "4",
        "source": "sea, sky",
        "target": "land",
        "model": "some/model",
        "shots": "4",
        "steps": "50",
        "batch": "16",
        "lr": "0.5",
        "device": "cpu",
    }
    assert {key: rows[3][key] for key in expected} == expected
    assert list(rows[0])[-5:] == ["python", "gradguide", "torch", "transformers", "peft"]
    assert rows[0]["torch"] == torch.__version__


def test_figure_has_a_dot_per_run_and_a_mean_curve_per_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    save = figure.Figure.savefig

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", spy)
    _, path = write_report(tmp_path, prepared(2), TWO_SEEDS)
    assert path.read_bytes().startswith(b"\x89PNG")
    target, source, steps = drawn[0].axes
    assert [dots.get_offsets().tolist() for dots in target.collections] == [[[0, 25], [0, 50]], [[1, 75], [1, 75]]]
    assert [dots.get_offsets().tolist() for dots in source.collections] == [[[0, 50], [0, 75]], [[1, 62.5], [1, 75]]]
    assert [list(line.get_ydata()) for line in target.lines] == [[25, 75], [50, 75]]
    assert list(source.lines[-1].get_ydata()) == [87.5, 87.5]
    curves = {line.get_label(): list(line.get_ydata()) for line in steps.lines}
    assert (curves["plain"], curves["mine"]) == ([0.75, 0.625], [1.0, 0.625])
