"""gradguide inspect of structured sources: compare its output with dense matrices in float64."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradguide import SourceGradient, StructuredSource
from gradguide.cli.inspect_structured import compare, describe, modelled_drift
from gradguide.cli.main import main
from gradguide.integrations.sampling import sampled_loss
from tests.cli.damage import flip_header_bits, loads
from tests.integrations.lora import QUIET
from tests.sources.structured.problems import adapted, llama, spread, text, trained

pytestmark = QUIET


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the files of a base model, of the same model on other text, and of a model with a trained adapter."""
    made = tmp_path_factory.mktemp("sources")
    model = adapted(llama(1))
    spread(model, 0.05)
    captured = {
        "base": StructuredSource.capture(llama(1), text(4), sampled_loss, rank=4),
        "other": StructuredSource.capture(llama(1), text(4, seed=8), sampled_loss, rank=6),
        "anchored": StructuredSource.capture(model, text(4), sampled_loss, rank=4),
        "whole": StructuredSource.capture(llama(1), text(4), sampled_loss, rank=None),
    }
    for name, source in captured.items():
        source.save(made / name)
    return {name: made / name for name in captured}


def dense(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    source = StructuredSource.load(path)
    return {name: (source.factors(name)[0].double(), source.factors(name)[1].double()) for name in source.names()}


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


def test_describe_gives_the_spectrum_kept_scale_and_anchor(sources: dict[str, Path]) -> None:
    found = describe(sources["base"])
    assert (found["kind"], len(found["layers"]), found["metadata"]["tokens"]) == ("structured", 7, 192)
    source = StructuredSource.load(sources["base"])
    for layer, (s, g) in zip(found["layers"], dense(sources["base"]).values(), strict=True):
        held = source._layers[layer["layer"]]
        assert layer["input_kept"] == pytest.approx(
            float(held.inputs.basis.double().square().sum() / s.diagonal(dim1=-2, dim2=-1).sum())
        )
        assert layer["output_kept"] == pytest.approx(
            float(held.outputs.basis.double().square().sum() / g.diagonal(dim1=-2, dim2=-1).sum())
        )
        assert (layer["rank"], layer["scale"], layer["anchored"]) == (4, held.scale, False)
    assert 0.2 < found["input_kept"] < 1.0
    assert all(layer["anchored"] for layer in describe(sources["anchored"])["layers"])
    whole = describe(sources["whole"])
    assert whole["input_kept"] == whole["output_kept"] == 1.0
    # Two pairs of rank 2 with their diagonals, for q, k, v, o, gate, up and down; and samples of their weights.
    sizes = [32, 24, 24, 32, 40, 40, 40]
    assert found["numbers"] == 2 * (2 + 1) * sum(sizes) + 5 * 256 + 2 * 128
    assert found["bytes"] == 4 * found["numbers"]


def test_compare_gives_the_cosine_of_the_matrices(sources: dict[str, Path]) -> None:
    found = compare(sources["base"], sources["other"])
    ours, theirs = dense(sources["base"]), dense(sources["other"])
    for layer in found["layers"]:
        pairs = list(zip(ours[layer["layer"]], theirs[layer["layer"]], strict=True))
        assert layer["input_cosine"] == pytest.approx(cosine(*pairs[0]))
        assert layer["output_cosine"] == pytest.approx(cosine(*pairs[1]))
    blocks = [torch.block_diag(*(s for layer in each.values() for s in layer[0])) for each in (ours, theirs)]
    assert found["input_cosine"] == pytest.approx(cosine(*blocks))
    assert found["input_cosine"] < 0.999
    same = compare(sources["base"], sources["base"])
    assert same["input_cosine"] == same["output_cosine"] == pytest.approx(1.0)


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def modelled(path: Path, model: nn.Module) -> float:
    """Return the drift of a bound source."""
    source = StructuredSource.load(path).bound(model)
    source.refresh(trained(model), [])
    assert source.drift is not None
    return float(source.drift)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True, "r": 3},
    {"alpha_pattern": {"q_proj": 3, "mlp.*": 5}, "rank_pattern": {"layers.0.self_attn.v_proj": 2}},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["base", "anchored"])
def test_drift_of_an_adapter_is_that_of_the_bound_source(
    sources: dict[str, Path], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    model = adapted(llama(1), **options)
    spread(model, 0.05, seed=4)
    found = modelled_drift(sources[name], saved(model, tmp_path))
    assert found["matched"] == 7
    assert found["modelled_kl"] == pytest.approx(modelled(sources[name], model), rel=1e-4)
    assert math.fsum(layer["modelled_kl"] for layer in found["layers"]) == pytest.approx(found["modelled_kl"])
    assert modelled_drift(sources[name], tmp_path / "adapter_model.safetensors")["layers"] == found["layers"]


def test_layers_outside_the_source_are_listed_and_not_counted(sources: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(llama(1))
    spread(model, 0.05)
    part = StructuredSource.capture(llama(1), text(4), sampled_loss, rank=4, modules=["q_proj", "down_proj"])
    part.save(tmp_path / "part")
    found = modelled_drift(tmp_path / "part", saved(model, tmp_path / "adapter"))
    assert found["matched"] == len(found["layers"]) == 2
    assert len(found["outside"]) == 5


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_whose_start_changed_the_weights_is_refused(
    sources: dict[str, Path], tmp_path: Path, start: str
) -> None:
    """``B A`` holds a part of the captured weights there, which was given as drift."""
    moved = saved(adapted(llama(1), init_lora_weights=start), tmp_path)
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}', which changed the base model's weights"):
        modelled_drift(sources["base"], moved)
    assert modelled_drift(sources["anchored"], moved)["matched"] == 7  # captured with an adapter


def test_what_an_adapter_changes_otherwise_is_listed(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = ["q_proj", "embed_tokens"]
    model = adapted(llama(1), target_modules=targets, modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        saved(model, tmp_path)
    found = modelled_drift(sources["base"], tmp_path)
    assert found["matched"] == 1
    assert sorted(found["others"]) == ["lm_head", "model.embed_tokens"]
    assert main(["inspect", str(sources["base"]), "--adapter", str(tmp_path)]) == 0
    assert "; not counted: " in capsys.readouterr().out


def test_the_base_weight_that_is_saved_with_a_head_is_no_change(sources: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(llama(1), target_modules=["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        saved(model, tmp_path)
    found = modelled_drift(sources["base"], tmp_path)
    assert (found["matched"], found["outside"], found["others"]) == (1, ["lm_head"], [])


def test_tables_json_and_picture(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "rich", None)
    model = adapted(llama(2))
    spread(model, 0.05)
    adapter = saved(model, tmp_path / "adapter")
    arguments = [str(sources["base"]), "--against", str(sources["other"]), "--adapter", str(adapter)]
    assert main(["inspect", *arguments, "--plot", str(tmp_path / "drift.png")]) == 0
    out = capsys.readouterr().out
    for part in ("structured", "base model", "self_attn.q_proj", "S kept", "anchor", "cosine with", "nats per token"):
        assert part in out, part
    assert "7 adapted layers are not in the source" in out
    assert (tmp_path / "drift.png").stat().st_size > 10_000
    assert main(["inspect", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "source": describe(sources["base"]),
        "against": compare(sources["base"], sources["other"]),
        "drift": modelled_drift(sources["base"], adapter),
    }


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["inspect", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gradguide: error: ")
    assert err.count("\n") == 1
    return err


def test_bad_input_is_one_line(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = sources["base"]
    SourceGradient({"w": torch.ones(3)}).save(tmp_path / "plain")
    for pair in ((base, tmp_path / "plain"), (tmp_path / "plain", base)):
        assert "give --against a file of the same kind" in refused(capsys, pair[0], "--against", pair[1])
        assert "PosixPath" not in refused(capsys, pair[0], "--against", pair[1])
    assert "--plot draws the drift of an adapter" in refused(capsys, base, "--plot", tmp_path / "a.png")
    assert "no adapter file" in refused(capsys, base, "--adapter", tmp_path / "none")
    model = saved(adapted(llama(1)), tmp_path / "adapter")
    assert "saved as one of" in refused(capsys, base, "--adapter", model, "--plot", tmp_path / "a.doc")
    config = model / "adapter_config.json"
    content = json.loads(config.read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"use_dora": True}, "of kind DoRA"),
        ({"kasa_config": {"beta": 1e-4}}, "of kind KaSA"),
        ({"alora_invocation_tokens": [3]}, "of kind aLoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "of kind BD-LoRA"),
        ({"peft_type": "LOHA"}, "of kind LOHA"),
        ({"lora_alpha": None}, "not the configuration"),
    ]
    for change, message in changes:
        config.write_text(json.dumps({**content, **change}))
        assert message in refused(capsys, base, "--adapter", model)
    config.unlink()
    assert "holds the adapter's scale" in refused(capsys, base, "--adapter", model)
    part = StructuredSource.capture(llama(2), text(2), sampled_loss, rank=4, modules="*.layers.1.*")
    part.save(tmp_path / "second")
    capsys.readouterr()  # the progress bar
    assert "share no layer" in refused(capsys, base, "--against", tmp_path / "second")
    config.write_text(json.dumps(content))
    assert "adapts none of the 7 layers" in refused(capsys, tmp_path / "second", "--adapter", model)
    config.write_text("{")
    assert "is not the configuration of an adapter" in refused(capsys, base, "--adapter", model)


def test_inspect_refuses_what_load_refuses_after_any_flipped_bit_of_the_header(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "flipped"
    refusals = 0
    for _ in flip_header_bits(path, sources["base"].read_bytes(), 150):
        if loads(StructuredSource.load, path):
            assert main(["inspect", str(path), "--json"]) == 0
            capsys.readouterr()
        else:
            refusals += 1
            refused(capsys, path, "--json")
    assert refusals > 50
