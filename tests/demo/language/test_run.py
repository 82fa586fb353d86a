"""gradguide demo on a causal language model, from end to end."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from gradguide import StructuredSource
from gradguide.cli.main import main
from gradguide.demo.config import OptionError
from gradguide.demo.language import run as run_file
from gradguide.demo.language.run import LanguageConfig, run
from tests.sources.structured.problems import llama, text

TINY = ["--shots", "2", "--seeds", "2", "--steps", "3", "--batch", "4"]
QUIET = pytest.mark.filterwarnings(
    "ignore:`past_key_values` is deprecated:FutureWarning", "ignore:.*received fewer sequences:UserWarning"
)
pytestmark = QUIET


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_file, "_SOURCE_TOKENS", 512)
    monkeypatch.setattr(run_file, "_HELD_TOKENS", 128)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_guided_model_drifts_less_and_a_saved_source_gives_the_same(
    capsys: pytest.CaptureFixture[str], data: Path, folder: Path, tmp_path: Path
) -> None:
    common = ["demo", "--data", str(data), "--model", str(folder), "--lr", "3e-2", *TINY]
    file = tmp_path / "base.safetensors"
    assert main([*common, "--out", str(tmp_path / "a"), "--source-file", str(file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("min on this cpu device", "target west (2 labels, 2 shots)", "GradGuide - clip + AdamW", "drift in"):
        assert words in shown
    assert (tmp_path / "a" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert len(StructuredSource.load(file).names()) == 7
    assert main([*common, "--out", str(tmp_path / "b"), "--source-file", str(file)]) == 0
    rows, again = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("clip + AdamW", "0"),
        ("GradGuide", "0"),
        ("clip + AdamW", "1"),
        ("GradGuide", "1"),
    ]
    for row, same in zip(rows, again, strict=True):
        assert {**row, "seconds_per_step": ""} == {**same, "seconds_per_step": ""}
    for plain, guided in zip(rows[::2], rows[1::2], strict=True):
        assert 0 < float(guided["drift"]) < float(plain["drift"])


def test_source_domains_are_refused(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["demo", "--model", str(folder), "--source", "x"]) == 2
    assert "--source is an option for encoders, found the causal language model" in capsys.readouterr().err


def test_a_source_file_with_an_encoder_is_refused(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    for model in ([], ["--model", str(tiny_model)]):
        assert main(["demo", *model, "--source-file", "x"]) == 2
        assert "--source-file is an option for causal language models" in capsys.readouterr().err


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(OptionError, match="--shots must be at least 1, found 0"):
        LanguageConfig(model="x", shots=0)
    with pytest.raises(OptionError, match="--lr must be above 0"):
        LanguageConfig(model="x", lr=0.0)


def test_a_source_of_another_model_is_refused(data: Path, folder: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        other = StructuredSource.capture(llama(1), text(2), lambda model, batch: model(**batch).logits.mean(), rank=4)
    other.save(tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no source")
    for name, message in (("other", "--source-file does not fit: "), ("damaged", "--source-file cannot be loaded: ")):
        config = LanguageConfig(
            model=str(folder),
            data=data,
            steps=1,
            shots=2,
            out=tmp_path / "o",
            source_file=tmp_path / f"{name}.safetensors",
        )
        with pytest.raises(OptionError, match=message):
            run(config)


def test_a_source_file_that_cannot_be_written_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = LanguageConfig(model="no model", out=tmp_path / "o", source_file=tmp_path / "file" / "x.safetensors")
    with pytest.raises(OptionError, match=r"--source-file cannot be written, found .*x\.safetensors"):
        run(config)
