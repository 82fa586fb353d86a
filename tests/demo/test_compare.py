from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from gradguide import GradGuide, SourceGradient
from gradguide.demo.compare import Coherence, Prepared, compare, default_methods, trainable, unit_gradient
from gradguide.demo.config import DemoConfig
from gradguide.demo.run import prepare


@pytest.fixture(scope="module")
def prepared(shared_data: Path, tiny_model: Path, one_thread: None) -> Prepared:
    """Shared by the tests of this file: every run resets what the last one changed."""
    return prepare(DemoConfig(data=shared_data, model=str(tiny_model), shots=2, seeds=2, steps=2, batch=3))


def with_gradient(*values: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


def test_unit_gradient_joins_all_gradients() -> None:
    without = nn.Parameter(torch.zeros(7))
    assert unit_gradient([with_gradient(3.0, 0.0), without, with_gradient(-4.0)]).tolist() == pytest.approx(
        [0.6, 0, -0.8]
    )


def test_coherence_is_one_while_gradients_agree() -> None:
    observer = Coherence()
    for scale in (1.0, 1e-6, 1e6):
        assert observer.update([with_gradient(scale), with_gradient(-scale)]) == pytest.approx(1.0, abs=1e-5)


def test_coherence_of_opposite_gradients() -> None:
    observer = Coherence(decay=0.5)
    observer.update([with_gradient(3.0)])
    assert observer.update([with_gradient(-3.0)]) == pytest.approx(abs(0.25 - 0.5) / 0.75)


def test_coherence_of_zero_gradients_is_zero() -> None:
    assert Coherence().update([with_gradient(0.0, 0.0)]) == 0.0


def test_every_method_starts_from_the_same_point_and_gets_the_same_rows(prepared: Prepared) -> None:
    """Two equal methods give equal runs, so nothing carries over from one run to the next."""

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
    calls: list[tuple[set[str], SourceGradient]] = []

    def method(model: nn.Module, source: SourceGradient) -> Optimizer:
        calls.append(({name for name, p in model.named_parameters() if p.requires_grad}, source))
        for name, start in prepared.adapter.items():
            assert torch.equal(model.get_parameter(name), start)
        return AdamW(trainable(model), lr=0.05)

    outcome = compare(prepared, {"spy": method})[0]
    names, source = calls[0]
    assert names == {*prepared.adapter, "heads.target.weight", "heads.target.bias"}
    assert source is prepared.source
    assert set(source.names()) == set(prepared.adapter)
    assert len(outcome.coherence) == 2
    assert outcome.coherence[0] == pytest.approx(1.0, abs=1e-5)
    assert outcome.mean_coherence == pytest.approx(sum(outcome.coherence) / 2)
    assert outcome.seconds_per_step > 0


def test_the_default_methods_share_their_base(prepared: Prepared) -> None:
    methods = default_methods(0.25)
    assert list(methods) == ["AdamW", "GradGuide"]
    plain, guided = (method(prepared.model, prepared.source) for method in methods.values())
    assert type(plain) is AdamW
    assert isinstance(guided, GradGuide)
    assert type(guided.base) is AdamW
    for optimizer in (plain, guided):
        (group,) = optimizer.param_groups
        assert group["lr"] == 0.25
        assert [id(p) for p in group["params"]] == [id(p) for p in trainable(prepared.model)]
