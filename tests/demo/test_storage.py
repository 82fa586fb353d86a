from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradguide.demo.errors import OptionError
from gradguide.demo.files import replacing_folder
from gradguide.demo.model import load_encoder
from gradguide.demo.run import DemoConfig, Prepared, prepare
from gradguide.demo.storage import load_source

CPU = torch.device("cpu")


@pytest.fixture
def saved(data: Path, tiny_model: Path, tmp_path: Path) -> tuple[Prepared, Path]:
    folder = tmp_path / "kept"
    config = DemoConfig(data=data, model=str(tiny_model), shots=2, seeds=1, save_source=folder)
    return prepare(config), folder


def test_round_trip(saved: tuple[Prepared, Path], tiny_model: Path) -> None:
    prepared, folder = saved
    encoder, _ = load_encoder(str(tiny_model))
    model, source = load_source(folder, encoder, prepared.transfer.source.labels, CPU)
    mine = prepared.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, mine[name]), name
    assert list(source.names()) == list(prepared.source.names())
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".md"}


@pytest.mark.parametrize(
    "name", ["head.safetensors", "source-gradient.safetensors", "adapter/adapter_model.safetensors"]
)
def test_missing_and_damaged_files(saved: tuple[Prepared, Path], tiny_model: Path, name: str) -> None:
    prepared, folder = saved
    labels = prepared.transfer.source.labels
    (folder / name).write_bytes(b"damaged")
    with pytest.raises(OptionError, match=r"--source-adapter .* does not fit or is damaged"):
        load_source(folder, load_encoder(str(tiny_model))[0], labels, CPU)
    (folder / name).unlink()
    with pytest.raises(OptionError, match=f"--source-adapter must be a folder with {name}, found"):
        load_source(folder, load_encoder(str(tiny_model))[0], labels, CPU)


def test_other_labels(saved: tuple[Prepared, Path], tiny_model: Path) -> None:
    with pytest.raises(
        OptionError, match=r"knows 4 labels \(palm, sand, snow, ...\), but the source task has 2 \(a, b\)"
    ):
        load_source(saved[1], load_encoder(str(tiny_model))[0], ("a", "b"), CPU)


def test_other_model(saved: tuple[Prepared, Path]) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    encoder = BertModel(BertConfig(vocab_size=30, **sizes), add_pooling_layer=False)
    with pytest.raises(OptionError, match="does not fit or is damaged"):
        load_source(saved[1], encoder, saved[0].transfer.source.labels, CPU)


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "new") as partial:
        (partial / "half").touch()
        raise RuntimeError
    assert not any(tmp_path.iterdir())
