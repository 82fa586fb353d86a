"""gradguide inspect: compare its output with sums computed by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from gradguide import SourceGradient
from gradguide.cli.inspect_stored import compare, describe, modelled_drift
from gradguide.cli.main import main

NAMES = [
    "model.base_model.layer.0.query.lora_A.default.weight",
    "model.base_model.layer.0.query.lora_B.default.weight",
    "model.base_model.layer.1.query.lora_A.default.weight",
]


def table(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 3, generator=generator) for name in NAMES}


def source(seed: int, *, curvature: bool = True) -> SourceGradient:
    fisher = {name: t.abs() for name, t in table(seed + 1).items()} if curvature else None
    anchor = table(seed + 2) if curvature else None
    about = {"examples": 7, "loss": 0.5, "curvature": "true", "versions": {"torch": "2"}}
    return SourceGradient(table(seed), fisher=fisher, anchor=anchor, metadata=about)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    source(0).save(path)
    return path


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.double().reshape(-1) for t in tensors.values()])


def test_describe_sums_up_and_splits_by_layer(file: Path) -> None:
    found = describe(file)
    assert (found["kind"], found["tensors"], found["numbers"], found["bytes"]) == ("moving", 3, 18, 18 * 4 * 3)
    assert found["gradient_norm"] == pytest.approx(float(flat(table(0)).norm()))
    assert found["fisher_trace"] == pytest.approx(float(flat(table(1)).abs().sum()))
    assert found["metadata"]["examples"] == 7
    assert [layer["layer"] for layer in found["layers"]] == [
        "model.base_model.layer.0.query",
        "model.base_model.layer.1.query",
    ]
    assert math.hypot(*(layer["gradient_norm"] for layer in found["layers"])) == pytest.approx(found["gradient_norm"])


def test_kinds(tmp_path: Path) -> None:
    source(0, curvature=False).save(tmp_path / "fixed")
    source(0).anchored().save(tmp_path / "anchored")
    assert describe(tmp_path / "fixed")["kind"] == "fixed"
    assert describe(tmp_path / "fixed")["fisher_trace"] is None
    assert describe(tmp_path / "anchored")["kind"] == "anchored"
    assert describe(tmp_path / "anchored")["gradient_norm"] is None


def test_compare_gives_cosines(file: Path, tmp_path: Path) -> None:
    source(5).save(tmp_path / "other")
    found = compare(file, tmp_path / "other")
    expected = torch.nn.functional.cosine_similarity(flat(table(0)), flat(table(5)), dim=0)
    assert found["gradient_cosine"] == pytest.approx(float(expected))
    assert found["shared"] == 3
    same = compare(file, file)
    assert same["gradient_cosine"] == pytest.approx(1.0)
    assert all(layer["fisher_cosine"] == pytest.approx(1.0) for layer in same["layers"])


@pytest.mark.parametrize("kind", ["peft", "folder", "full"])
def test_drift_of_an_adapter_as_peft_names_it(file: Path, tmp_path: Path, kind: str) -> None:
    moved = {name: t + 0.1 for name, t in table(2).items()}
    keys = {n: n if kind == "full" else n.replace(".default", "").removeprefix("model.") for n in NAMES}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({keys[name]: t for name, t in moved.items()}, folder / "adapter_model.safetensors")
    found = modelled_drift(file, folder if kind == "folder" else folder / "adapter_model.safetensors")
    move = flat(moved) - flat(table(2))
    rise = float(flat(table(0)) @ move + 0.5 * (flat(table(1)).abs() * move.square()).sum())
    assert found["matched"] == 3
    assert found["distance"] == pytest.approx(float(move.norm()))
    assert found["relative"] == pytest.approx(float(move.norm() / flat(table(2)).norm()))
    assert found["modelled_rise"] == pytest.approx(rise)
    assert math.fsum(layer["modelled_rise"] for layer in found["layers"]) == pytest.approx(rise)


def test_json_is_what_the_functions_give(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file), "--against", str(file), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found == {"source": describe(file), "against": compare(file, file)}


def test_rich_is_not_needed(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["inspect", str(file), "--against", str(file)]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert out.splitlines()[0].split() == ["file", str(file)]
    assert out.isascii() and "\x1b" not in out


def test_tables_for_people(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "a.safetensors"
    save_file(table(2), adapter)
    assert main(["inspect", str(file), "--against", str(file), "--adapter", str(adapter)]) == 0
    out = capsys.readouterr().out
    for text in ("moving", "1.query", "cosine with", "drift of", "modelled rise"):
        assert text in out, text
    assert "lora_A" not in out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_bad_files(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no source file" in refused(capsys, "inspect", str(tmp_path / "none"))
    other = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(2)}, other)
    assert "no source of gradguide" in refused(capsys, "inspect", str(other))
    assert "no tensor" in refused(capsys, "inspect", str(file), "--adapter", str(other))
    assert "no adapter file" in refused(capsys, "inspect", str(file), "--adapter", str(tmp_path / "none"))
    source(0, curvature=False).save(tmp_path / "fixed")
    assert "no curvature" in refused(capsys, "inspect", str(tmp_path / "fixed"), "--adapter", str(other))
    SourceGradient({"x": torch.ones(2)}).save(tmp_path / "x")
    assert "share no parameter" in refused(capsys, "inspect", str(file), "--against", str(tmp_path / "x"))
    (tmp_path / "cut").write_bytes(file.read_bytes()[:100])
    assert "not a readable safetensors file" in refused(capsys, "inspect", str(tmp_path / "cut"))


class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(6, 6)
        self.classifier = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.classifier(self.body(x))
        return found


@pytest.mark.parametrize("adapter", ["default", "b"])
def test_drift_counts_every_tensor_that_peft_saves(tmp_path: Path, adapter: str) -> None:
    """The trained copy of a head was left out, and adapters of other names were not found."""
    config = LoraConfig(target_modules=["body"], r=2, modules_to_save=["classifier"], init_lora_weights=False)
    model = get_peft_model(Tagger(), config, adapter_name=adapter)
    SourceGradient.capture(
        model, [torch.randn(2, 6) for _ in range(4)], lambda m, x: m(x).square().mean(), curvature=True
    ).save(tmp_path / "source")
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    model.save_pretrained(str(tmp_path))
    found = modelled_drift(tmp_path / "source", tmp_path if adapter == "default" else tmp_path / adapter)
    assert found["matched"] == len(trained) == 4
    assert found["distance"] == pytest.approx(0.1 * math.sqrt(sum(p.numel() for p in trained)))


def test_drift_takes_the_longest_name_that_fits(tmp_path: Path) -> None:
    anchor = {name: torch.zeros(4) for name in ("block.norm.weight", "norm.weight")}
    SourceGradient(None, fisher=anchor, anchor=anchor).save(tmp_path / "source")
    save_file({"block.norm.weight": torch.zeros(4), "norm.weight": torch.ones(4)}, tmp_path / "model")
    found = modelled_drift(tmp_path / "source", tmp_path / "model")
    assert {layer["layer"]: layer["distance"] for layer in found["layers"]} == {"block.norm": 0.0, "norm": 2.0}


def test_drift_from_zero_is_valid_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    anchor = {"x.lora_B.default.weight": torch.zeros(3, 2)}
    SourceGradient(None, fisher=anchor, anchor=anchor).save(tmp_path / "source")
    save_file({"x.lora_B.weight": torch.ones(3, 2)}, tmp_path / "adapter")
    arguments = ("inspect", str(tmp_path / "source"), "--adapter", str(tmp_path / "adapter"))
    assert main([*arguments, "--json"]) == 0
    assert "Infinity" not in (out := capsys.readouterr().out)
    assert json.loads(out)["drift"]["relative"] is None
    assert main(arguments) == 0
    save_file({"x.lora_B.weight": torch.full((3, 2), math.nan)}, tmp_path / "adapter")
    assert "holds NaN or Inf in x.lora_B.weight" in refused(capsys, *arguments)


def test_compare_matches_sources_of_other_adapter_names(tmp_path: Path) -> None:
    source(0).save(tmp_path / "default")
    source(0).renamed({name: name.replace("default", "b") for name in NAMES}).save(tmp_path / "b")
    found = compare(tmp_path / "default", tmp_path / "b")
    assert found["shared"] == 3
    assert found["fisher_cosine"] == pytest.approx(1.0)


def test_an_anchored_source_has_no_modelled_rise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """H is not the Fisher information. It was taken for it, and the rise was wrong by any factor."""
    anchored = source(0).anchored()
    anchored.save(tmp_path / "anchored")
    SourceGradient.merge([anchored, anchored]).save(tmp_path / "merged")
    of_merged = SourceGradient.merge([source(1), source(2)]).anchored()
    SourceGradient.merge([of_merged, of_merged]).save(tmp_path / "again")
    save_file(table(1), tmp_path / "adapter")
    for name in ("anchored", "merged", "again"):
        found = modelled_drift(tmp_path / name, tmp_path / "adapter")
        assert found["modelled_rise"] is None
        assert found["distance"] > 0
    arguments = ("inspect", str(tmp_path / "anchored"), "--adapter", str(tmp_path / "adapter"))
    assert main(arguments) == 0
    assert "modelled rise" not in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert "give the file of its origin" in refused(capsys, *arguments, "--plot", str(tmp_path / "x.png"))
    ewc = SourceGradient(None, fisher=source(0).fisher, anchor=source(0).anchor)
    ewc.save(tmp_path / "ewc")
    assert modelled_drift(tmp_path / "ewc", tmp_path / "adapter")["modelled_rise"] > 0
