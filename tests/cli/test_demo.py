"""gradguide demo: options, and errors as one line."""

from __future__ import annotations

import signal
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import gradguide
from gradguide.cli.main import main, run
from gradguide.demo import run as run_file
from gradguide.demo.config import DemoConfig
from gradguide.demo.language import model as language_model


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line on stderr of a command that ends with exit code 2."""
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("gradguide: error: ")
    return err.removeprefix("gradguide: error: ").rstrip("\n")


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[DemoConfig]:
    """Record the options of every started demo. No demo runs."""
    found: list[DemoConfig] = []
    monkeypatch.setattr(run_file, "run", found.append)
    monkeypatch.setattr(language_model, "is_causal", lambda name: False)
    return found


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    found = capsys.readouterr().out
    assert found in (f"gradguide {gradguide.__version__}\n", "gradguide unknown\n")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # narrower help breaks words at hyphens
    assert main(["demo", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in fields(DemoConfig):
        assert f"--{option.name.replace('_', '-')} " in shown
    defaults = DemoConfig()
    for text in (defaults.model, defaults.out, defaults.shots, defaults.seeds, defaults.steps, defaults.batch, "2e-3"):
        assert f"({text})" in shown
    assert defaults.lr == 2e-3


def test_run_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gradguide", "--version"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored after the test
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            run()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert end.value.code == 0


def test_options_that_are_not_given_keep_their_defaults(configs: list[DemoConfig]) -> None:
    assert main(["demo"]) == 0
    assert configs == [DemoConfig()]


def test_options_reach_the_demo(configs: list[DemoConfig], tmp_path: Path) -> None:
    numbers = ["--shots", "2", "--seeds", "3", "--steps", "5", "--batch", "7", "--lr", "1e-4"]
    names = ["--source", "a, b", "--source", "c", "--target", "d", "--model", "m", "--data", "in"]
    assert main(["demo", *numbers, *names, "--out", str(tmp_path)]) == 0
    (found,) = configs
    assert (found.shots, found.seeds, found.steps, found.batch, found.lr) == (2, 3, 5, 7, 1e-4)
    assert (list(found.source), found.target, found.model, found.data) == (["a", "b", "c"], "d", "m", Path("in"))
    assert found.out == tmp_path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shots", "0"], "--shots must be at least 1, found 0"),
        (["--lr", "nan"], "--lr must be above 0 and finite, found nan"),
        (["--data", "nowhere"], "--data must be a folder with train.tsv and test.tsv, found 'nowhere'"),
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
    # Only the empty output folder exists: it is checked before the data are read.
    assert [path.name for path in tmp_path.rglob("*")] in ([], ["gradguide-demo"])


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: command" in refused(capsys)
