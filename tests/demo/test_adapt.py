from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from gradguide import SourceGradient
from gradguide.demo.adapt import Coherence
from gradguide.demo.run import DemoConfig, Prepared, compare, prepare, trainable


@pytest.fixture
def prepared(data: Path, tiny_model: Path) -> Prepared:
    return prepare(DemoConfig(data=data, model=str(tiny_model), shots=2, seeds=2, steps=2, batch=3))


def with_gradient(*values: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


def test_coherence_is_one_while_gradients_agree() -> None:
    observer = Coherence()
    for scale in (1.0, 1e-6, 1e6):
        assert observer.update([with_gradient(scale), with_gradient(-scale)]) == pytest.approx(1.0, abs=1e-5)


def test_coherence_of_opposite_gradients() -> None:
    observer = Coherence(decay=0.5)
    observer.update([with_gradient(3.0)])
    assert observer.update([with_gradient(-3.0)]) == pytest.approx(abs(0.25 - 0.5) / 0.75)


def test_coherence_without_gradients() -> None:
    assert Coherence().update([with_gradient(0.0, 0.0)]) == 0.0


def test_every_method_starts_from_the_same_point_and_sees_the_same_rows(prepared: Prepared) -> None:
    """Two methods that are the same give the same runs: nothing leaks from one run to the next."""

    def method(model: nn.Module, source: SourceGradient) -> Optimizer:
        return AdamW(trainable(model), lr=0.05)

    outcomes = compare(prepared, {"first": method, "second": method})
    assert [(o.method, o.seed) for o in outcomes] == [("first", 0), ("second", 0), ("first", 1), ("second", 1)]
    for first, second in (outcomes[:2], outcomes[2:]):
        assert first.coherence == second.coherence
        assert first.target_accuracy == second.target_accuracy
        assert first.source_accuracy == second.source_accuracy
    assert outcomes[0].coherence != outcomes[2].coherence


def test_a_method_gets_the_adapter_the_new_head_and_the_source(prepared: Prepared) -> None:
    seen: list[tuple[set[str], SourceGradient]] = []

    def method(model: nn.Module, source: SourceGradient) -> Optimizer:
        seen.append(({name for name, p in model.named_parameters() if p.requires_grad}, source))
        for name, start in prepared.adapter.items():
            assert torch.equal(model.get_parameter(name), start)
        return AdamW(trainable(model), lr=0.05)

    outcome = compare(prepared, {"spy": method})[0]
    names, source = seen[0]
    assert names == {*prepared.adapter, "heads.target.weight", "heads.target.bias"}
    assert source is prepared.source
    assert set(source.names()) == set(prepared.adapter)
    assert len(outcome.coherence) == 2
    assert outcome.coherence[0] == pytest.approx(1.0, abs=1e-5)
    assert outcome.seconds_per_step > 0


def test_captured_gradient_is_that_of_the_source_loss(prepared: Prepared) -> None:
    """From small batches, s0 is the gradient of the mean loss over all source rows; the curvature is not zero."""
    from gradguide.demo.encoded import encode
    from gradguide.demo.model import load_encoder
    from gradguide.demo.source import HEAD

    task = prepared.transfer.source
    _, tokenizer = load_encoder(prepared.config.model)
    rows = encode(task.train, task.labels, tokenizer, torch.device("cpu"))
    model = prepared.model.eval()
    parameters = [model.get_parameter(name) for name in prepared.adapter]
    expected = torch.autograd.grad(model.loss(HEAD, rows.batch(range(len(rows)))), parameters)
    row = prepared.source.row(list(prepared.adapter), parameters)
    assert row.offset is not None and row.scale is not None
    torch.testing.assert_close(list(row.offset), list(expected), rtol=1e-3, atol=1e-7)
    assert all(bool((fisher >= 0).all()) for fisher in row.scale)
    assert sum(float(fisher.sum()) for fisher in row.scale) > 0
    assert prepared.source.metadata["curvature"] == "true"
