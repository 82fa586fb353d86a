from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from gradguide import SourceGradient
from gradguide.demo.compare import Prepared
from gradguide.demo.config import DemoConfig, OptionError
from gradguide.demo.model import encode, load_encoder
from gradguide.demo.run import prepare
from gradguide.demo.source import HEAD, capture_source, load_source, save_source

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(
    shared_data: Path, tiny_model: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Prepared, Path]:
    folder = tmp_path_factory.mktemp("saved") / "source"
    config = DemoConfig(data=shared_data, model=str(tiny_model), shots=2, seeds=1, save_source=folder)
    return prepare(config), folder


@pytest.fixture
def copy(saved: tuple[Prepared, Path], tmp_path: Path) -> Path:
    """A copy of the saved source that a test may damage."""
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


def test_training_fits_the_source_task(saved: tuple[Prepared, Path]) -> None:
    assert saved[0].source_accuracy > 0.9  # chance is 0.25
    assert saved[0].source_accuracy <= 1


def test_captured_gradient_is_that_of_the_source_loss(saved: tuple[Prepared, Path]) -> None:
    """Captured in small batches, it equals the gradient of the mean loss over all source rows."""
    prepared, _ = saved
    task = prepared.transfer.source
    _, tokenizer = load_encoder(prepared.config.model)
    rows = encode(task.train, task.labels, tokenizer, CPU)
    model = prepared.model.eval()
    parameters = [model.get_parameter(name) for name in prepared.adapter]
    expected = torch.autograd.grad(model.loss(HEAD, rows.batch(range(len(rows)))), parameters)
    row = prepared.source.row(list(prepared.adapter), parameters)
    assert row.offset is not None and row.scale is not None
    torch.testing.assert_close(list(row.offset), list(expected), rtol=1e-3, atol=1e-7)
    assert all(bool((fisher >= 0).all()) for fisher in row.scale)
    assert sum(float(fisher.sum()) for fisher in row.scale) > 0
    assert prepared.source.metadata["curvature"] == "true"


def test_capture_refuses_a_trainable_head(saved: tuple[Prepared, Path]) -> None:
    prepared, _ = saved
    prepared.model.heads[HEAD].requires_grad_(True)
    try:
        with pytest.raises(ValueError, match=r"found heads\.source\.bias, heads\.source\.weight"):
            capture_source(prepared.model, prepared.source_test, seed=0)
    finally:
        prepared.model.heads[HEAD].requires_grad_(False)


def test_a_saved_source_loads_unchanged(saved: tuple[Prepared, Path], tiny_model: Path) -> None:
    prepared, folder = saved
    encoder, _ = load_encoder(str(tiny_model))
    model, source = load_source(folder, encoder, prepared.transfer.source.labels, CPU)
    expected = prepared.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    parameters = [prepared.model.get_parameter(name) for name in prepared.adapter]
    found, wanted = (s.row(list(prepared.adapter), parameters) for s in (source, prepared.source))
    assert found.offset is not None and wanted.offset is not None
    assert all(torch.equal(a, b) for a, b in zip(found.offset, wanted.offset, strict=True))
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".md"}


@pytest.mark.parametrize(
    "name", ["head.safetensors", "source-gradient.safetensors", "adapter/adapter_model.safetensors"]
)
def test_missing_and_damaged_files(saved: tuple[Prepared, Path], copy: Path, tiny_model: Path, name: str) -> None:
    labels = saved[0].transfer.source.labels
    (copy / name).write_bytes(b"damaged")
    with pytest.raises(OptionError, match=r"--source-adapter .* does not fit or is damaged"):
        load_source(copy, load_encoder(str(tiny_model))[0], labels, CPU)
    (copy / name).unlink()
    with pytest.raises(OptionError, match=f"--source-adapter must be a folder with {name}, found"):
        load_source(copy, load_encoder(str(tiny_model))[0], labels, CPU)


def test_other_labels(saved: tuple[Prepared, Path], tiny_model: Path) -> None:
    message = r"has 4 labels \(palm, sand, snow, ...\), but the source task has 2 \(a, b\)"
    with pytest.raises(OptionError, match=message):
        load_source(saved[1], load_encoder(str(tiny_model))[0], ("a", "b"), CPU)


def test_other_model(saved: tuple[Prepared, Path]) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    encoder = BertModel(BertConfig(vocab_size=30, **sizes), add_pooling_layer=False)
    with pytest.raises(OptionError, match="does not fit or is damaged"):
        load_source(saved[1], encoder, saved[0].transfer.source.labels, CPU)


def test_a_source_gradient_of_other_parameters(saved: tuple[Prepared, Path], copy: Path, tiny_model: Path) -> None:
    SourceGradient({"other": torch.ones(2)}).save(copy / "source-gradient.safetensors")
    with pytest.raises(OptionError, match="holds a source gradient of other parameters"):
        load_source(copy, load_encoder(str(tiny_model))[0], saved[0].transfer.source.labels, CPU)


def test_a_failed_save_leaves_nothing(
    saved: tuple[Prepared, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, path: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(SourceGradient, "save", full)
    prepared, _ = saved
    with pytest.raises(OSError, match="disk full"):
        save_source(tmp_path / "new", prepared.model, prepared.source, prepared.transfer.source.labels)
    assert not any(tmp_path.iterdir())
