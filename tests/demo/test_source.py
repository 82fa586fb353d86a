from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradguide.demo.compare import Prepared
from gradguide.demo.config import DemoConfig
from gradguide.demo.model import encode, load_encoder
from gradguide.demo.run import prepare
from gradguide.demo.source import HEAD, capture_source

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prepared(shared_data: Path, tiny_model: Path, one_thread: None) -> Prepared:
    return prepare(DemoConfig(data=shared_data, model=str(tiny_model), shots=2, seeds=1))


def test_training_fits_the_source_task(prepared: Prepared) -> None:
    assert prepared.source_accuracy > 0.9  # chance is 0.25
    assert prepared.source_accuracy <= 1


def test_captured_gradient_is_that_of_the_source_loss(prepared: Prepared) -> None:
    """Captured in small batches, it equals the gradient of the mean loss over all source rows."""
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


def test_capture_refuses_a_trainable_head(prepared: Prepared) -> None:
    prepared.model.heads[HEAD].requires_grad_(True)
    try:
        with pytest.raises(ValueError, match=r"found heads\.source\.bias, heads\.source\.weight"):
            capture_source(prepared.model, prepared.source_test, seed=0)
    finally:
        prepared.model.heads[HEAD].requires_grad_(False)
