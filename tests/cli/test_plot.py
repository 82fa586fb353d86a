"""gradguide plot: several histories in one figure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gradguide import History
from gradguide.cli.main import main


def history(path: Path, *, steps: int = 5) -> Path:
    made = History()
    for step in range(steps):
        made.append({"grad_norm": 1.0 + step, "coherence": 0.5, "source_cosine": math.nan, "conflict": float(step % 2)})
    made.save(path)
    return path


def test_runs_are_drawn_into_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    paths = [str(history(tmp_path / name)) for name in ("a.csv", "b.jsonl")]
    out = tmp_path / "plot.png"
    assert main(["plot", *paths, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "steps": {"a": 5, "b": 5}}
    assert out.stat().st_size > 10_000


def test_runs_of_one_name_keep_their_folders_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(str(history(tmp_path / name / "run.csv")))
    assert main(["plot", *paths, "--out", str(tmp_path / "plot.png"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["steps"]) == set(paths)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["missing.csv"], "missing.csv"),
        (["run.txt"], "is no saved history"),
        (["empty.csv"], "the histories are empty"),
        (["run.csv", "--out", "plot.doc"], "a plot is saved as one of"),
        ([], "required: HISTORY"),
    ],
)
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    history(Path("run.csv"))
    history(Path("empty.csv"), steps=0)
    Path("run.txt").write_text("x", encoding="utf-8")
    assert main(["plot", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))
