"""Train whole weights with a structured source: the pull is relative to the captured weights, or binding is refused."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradguide import Alignment, Direction, GradGuide
from gradguide.integrations.sampling import sampled_loss
from gradguide.sources.structured import StructuredSource
from gradguide.sources.structured.captured_weight import count_differences
from tests.sources.structured.problems import adapted, energy, gpt2, llama, spread, text, trained

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def source() -> StructuredSource:
    return StructuredSource.capture(llama(), text(6), sampled_loss, rank=8)


def guide(model: nn.Module, source: StructuredSource | list[StructuredSource]) -> GradGuide:
    base = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    return GradGuide(base, alignment=Alignment(source), names=model, direction=Direction())


def train(model: nn.Module, optimizer: GradGuide, steps: int = 3) -> None:
    for batch in text(steps, seed=5):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()


def check_pull(optimizer: GradGuide, source: StructuredSource, model: nn.Module, starts: dict[str, Tensor]) -> None:
    """Assert that the optimizer's source pulls to ``starts``."""
    (bound,) = optimizer._engine.planner.sources
    assert isinstance(bound, StructuredSource)
    parameters = trained(model)
    bound.refresh(parameters, [])
    values = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    energy(source, model, starts, values).backward()
    row = bound.row([WEIGHT], [parameters[WEIGHT]]).value(0, torch.float64)
    wanted = values[WEIGHT].grad
    assert wanted is not None
    torch.testing.assert_close(row, wanted.reshape(-1), rtol=1e-3, atol=1e-9)


def test_a_run_that_binds_at_the_captured_weights_resumes_bitwise(source: StructuredSource) -> None:
    model = llama()
    optimizer = guide(model, source)
    train(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer)
    again = llama()
    resumed = guide(again, source)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed)
    assert optimizer.metrics()["source_drift"] == resumed.metrics()["source_drift"] > 0
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_binding_at_trained_weights_is_refused(make: Any) -> None:
    source = StructuredSource.capture(make(), text(2), sampled_loss, rank=4)
    model = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), lr=1e-5).step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"is not the weight at capture: \d+ of 256 .* Create GradGuide while the"):
        guide(model, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_changed_layer_is_named(source: StructuredSource) -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.01)
    with pytest.raises(ValueError, match=r"the weight of model.layers.1.mlp.up_proj is trained"):
        guide(model, source)
    guide(adapted(llama()), source)


def test_sources_set_while_training_pull_to_the_captured_weights(source: StructuredSource) -> None:
    """Neither a new alignment nor a new group moves the point that the pull is relative to."""
    model = llama()
    starts = copy.deepcopy(trained(model))
    optimizer = guide(model, source)
    train(model, optimizer)
    optimizer.set_alignment(Alignment(source, weight=10.0))
    check_pull(optimizer, source, model, starts)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    check_pull(optimizer, source, model, starts)
    train(model, optimizer)
    second = StructuredSource.capture(model, text(2), sampled_loss, rank=8)
    drift = optimizer.metrics()["source_drift"]
    optimizer.set_alignment(Alignment({"first": source, "second": second}))
    train(model, optimizer, 1)
    found = optimizer.metrics()
    assert found["source_drift/first"] > 0.5 * drift
    assert found["source_drift/second"] == 0.0


def test_a_copy_and_a_move_of_dtype_keep_the_captured_weights(source: StructuredSource, tmp_path: Path) -> None:
    source.to_dtype(torch.bfloat16).save(tmp_path / "source.safetensors")
    loaded = StructuredSource.load(tmp_path / "source.safetensors")
    guide(llama(), loaded)
    guide(llama().to(torch.bfloat16), loaded)
    model = llama()
    spread(model, 1e-3)
    with pytest.raises(ValueError, match="is not the weight at capture"):
        guide(model, loaded)


@pytest.mark.parametrize("now", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("then", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_difference_and_training_is(then: torch.dtype, now: torch.dtype) -> None:
    weight = 0.05 * torch.randn(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for exact in (weight, weight.to(then).double()):
        assert count_differences(exact.to(then), exact.to(now)) == 0
    assert count_differences(weight.to(then), (weight + 1e-3 * weight.sign()).to(now)) > 0


def test_a_weight_that_was_quantised_at_capture_warns(source: StructuredSource) -> None:
    unknown = StructuredSource({n: replace(f, weight=None) for n, f in source._layers.items()}, source.metadata)
    model = llama()
    with pytest.warns(UserWarning, match=r"not have the captured weight of 14 trained layers \(first: .*\), so it"):
        optimizer = guide(model, unknown)
    starts = copy.deepcopy(trained(model))
    train(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.set_alignment(Alignment(unknown))
    check_pull(optimizer, unknown, model, starts)


def test_sources_of_different_weights_do_not_merge(source: StructuredSource) -> None:
    model = llama()
    spread(model, 0.01)
    other = StructuredSource.capture(model, text(2), sampled_loss, rank=8)
    with pytest.raises(ValueError, match=r"captured at different weights of model.layers.0.self_attn.q_proj"):
        StructuredSource.merge([source, other])
    guide(llama(), StructuredSource.merge([source, source]))


def test_the_captured_weights_are_held_once_however_often_a_source_is_bound(source: StructuredSource) -> None:
    model = llama()
    first = source.bound(model)
    held = [id(start) for binding in (first, first.bound(model), source.bound(model, [first]))
            if binding._binding is not None for _, start in binding._binding._starts]  # fmt: skip
    assert len(held) == 3 * len(set(held)) > 0


def test_two_layers_of_one_shape_may_share_a_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.second(torch.tanh(self.first(x)))
            return found

    model, rows = Tied(), torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    source = StructuredSource.capture(model, [rows], lambda m, x: (m(x).square().mean(), len(x)), rank=None)
    starts = {name: p.detach().clone() for name, p in trained(model).items()}
    bound = source.bound(model)
    spread(model, 0.1)
    bound.refresh(trained(model), list(model.parameters()))
    name = "first.weight"
    values = {n: p.detach().double().requires_grad_() for n, p in trained(model).items()}
    (wanted,) = torch.autograd.grad(energy(source, model, starts, values), values[name])
    found = bound.row([name], [model.first.weight]).tensors[0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
