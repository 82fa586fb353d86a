"""Compare the pull with autograd on the dense quadratic form in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradguide.integrations.sampling import sampled_loss
from gradguide.sources.structured import StructuredSource
from gradguide.sources.structured.layers import find_layers
from tests.sources.structured.problems import adapted, energy, gpt2, llama, spread, text, trained


def checked(source: StructuredSource, model: nn.Module, starts: dict[str, Tensor] | None = None) -> None:
    """Assert that the rows equal the gradient of the dense form up to float32 rounding."""
    if starts is None:
        source = source.bound(model)
    parameters = trained(model)
    values = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    total = energy(source, model, starts or {}, values)
    total.backward()
    source.refresh(parameters, [])
    names = list(parameters)
    rows = source.row(names, [parameters[n] for n in names])
    for index, name in enumerate(names):
        wanted = values[name].grad
        wanted = torch.zeros_like(values[name]) if wanted is None else wanted
        error = (rows.value(index, torch.float64) - wanted.reshape(-1)).norm()
        assert error <= 1e-5 * wanted.norm() + 1e-12, (name, float(error), float(wanted.norm()))


@pytest.fixture(scope="module")
def source() -> StructuredSource:
    return StructuredSource.capture(llama(), text(), sampled_loss, rank=None)


@pytest.mark.parametrize("rank", [None, 6])
@pytest.mark.parametrize("r", [1, 4])
def test_fresh_adapters_of_any_rank(rank: int | None, r: int) -> None:
    source = StructuredSource.capture(llama(), text(), sampled_loss, rank=rank)
    model = adapted(llama(), r)
    spread(model, 0.1)
    checked(source, model)


def test_autocast_around_a_step_does_not_change_the_pull(source: StructuredSource) -> None:
    model = adapted(llama())
    spread(model, 0.1)
    parameters = trained(model)
    rows = []
    for enabled in (False, True):
        bound = source.bound(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            bound.refresh(parameters, [])
            row = bound.row(list(parameters), list(parameters.values()))
        rows.append(torch.cat([row.value(index, torch.float32) for index in range(len(parameters))]))
    assert torch.equal(*rows)


def test_an_adapter_trained_before_the_capture_is_pulled_back_to_where_it_was() -> None:
    model = adapted(llama())
    spread(model, 0.05)
    source = StructuredSource.capture(model, text(), sampled_loss, rank=8)
    source = source.bound(model)
    source.refresh(trained(model), [])
    assert source.drift is not None
    assert abs(float(source.drift)) < 1e-6
    spread(model, 0.05, seed=4)
    checked(source, model)


def test_two_trained_adapters_count_together(source: StructuredSource) -> None:
    model = adapted(llama())
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))  # type: ignore[operator, index]
    model.base_model.set_adapter(["default", "second"])  # type: ignore[operator, union-attr]
    spread(model, 0.1)
    checked(source, model)


def test_a_frozen_adapter_counts_and_is_not_pulled(source: StructuredSource) -> None:
    model = adapted(llama())
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))  # type: ignore[operator, index]
    model.base_model.set_adapter(["default", "second"])  # type: ignore[operator, union-attr]
    spread(model, 0.1)
    for name, p in model.named_parameters():
        if ".default." in name:
            p.requires_grad_(False)
    checked(source, model)


def two_adapters() -> Any:
    """Return a model with a trained adapter "default" and a frozen, active one "second"."""
    model: Any = adapted(llama())
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    spread(model, 0.1)
    for name, p in model.named_parameters():
        if ".second." in name:
            p.requires_grad_(False)
    return model


def test_values_that_a_frozen_adapter_gets_later_count(source: StructuredSource) -> None:
    model = two_adapters()
    second = [p for name, p in model.named_parameters() if ".second." in name]
    values = [p.detach().clone() for p in second]
    torch._foreach_zero_([p.data for p in second])
    bound = source.bound(model)
    torch._foreach_copy_([p.data for p in second], values)
    bound.refresh(trained(model), [])
    fresh = source.bound(model)
    fresh.refresh(trained(model), [])
    assert bound.drift is not None
    assert fresh.drift is not None
    torch.testing.assert_close(bound.drift, fresh.drift)
    assert not any(".second." in name for name in bound.pulled)


def test_a_deleted_adapter_needs_the_sources_again(source: StructuredSource) -> None:
    model = two_adapters()
    bound = source.bound(model)
    model.delete_adapter("second")
    with pytest.raises(RuntimeError, match=r"'second' at .* is gone: it was deleted, after .* set_alignment"):
        bound.refresh(trained(model), [])


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_frozen_half_of_an_adapter_counts_and_the_other_is_pulled(source: StructuredSource, part: str) -> None:
    model = adapted(llama())
    spread(model, 0.1)
    for name, p in model.named_parameters():
        if part in name:
            p.requires_grad_(False)
    checked(source, model)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_whole_weights(make: type[nn.Module]) -> None:
    model = make()
    source = StructuredSource.capture(model, text(), sampled_loss, rank=8)
    source = source.bound(model)
    starts = {name: p.detach().clone() for name, p in trained(model).items()}
    spread(model, 0.02)
    checked(source, model, starts)


@pytest.mark.parametrize(("make", "options"), [(llama, {}), (gpt2, {"fan_in_fan_out": True})])
@pytest.mark.parametrize("later", [0.0, 0.05])
def test_weights_and_their_adapters_count_together(make: Any, options: dict[str, Any], later: float) -> None:
    """The source is captured with the adapter at another point than zero."""
    model = adapted(make(), **options)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))  # type: ignore[operator, index]
    model.base_model.set_adapter(["default", "second"])  # type: ignore[operator, union-attr]
    spread(model, 0.1)
    source = StructuredSource.capture(model, text(), sampled_loss, rank=8)
    for layer in find_layers(model).values():
        layer.weight.requires_grad_(layer.name in source.names())
    source = source.bound(model)
    starts = {name: p.detach().clone() for name, p in trained(model).items()}
    spread(model, 0.02)
    for name, p in model.named_parameters():
        if ".second.lora_B" in name:
            torch.nn.init.normal_(p.data, std=later)
    checked(source, model, starts)


def test_a_layer_whose_outputs_were_zero_has_no_floor() -> None:
    """The floor is relative to the length of the outputs."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    nn.init.zeros_(model.get_parameter("0.weight"))
    source = StructuredSource.capture(
        model, [torch.randn(6, 3)], lambda model, x: (model(x).exp().mean(), len(x)), rank=None
    )
    assert source._layers["0"].scale == 0.0
    source = source.bound(model)
    spread(model, 0.1)
    source.refresh(trained(model), [])
    s, g = (factor[1] for factor in source.factors("0"))
    torch.testing.assert_close(source._rows["0.weight"], g @ model.get_parameter("0.weight") @ s)


def test_adapters_on_transposed_weights() -> None:
    source = StructuredSource.capture(gpt2(), text(), sampled_loss, rank=8)
    model = adapted(gpt2(), fan_in_fan_out=True)
    spread(model, 0.1)
    checked(source, model)


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=15, deadline=None)
def test_the_value_is_the_same_for_every_factorisation(seed: int) -> None:
    source = StructuredSource.capture(llama(1), text(2), sampled_loss, rank=8)
    model = adapted(llama(1))
    spread(model, 0.1, seed)
    source = source.bound(model)
    parameters = trained(model)
    source.refresh(parameters, [])
    before = source.drift
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in [n for n in parameters if ".lora_A." in n]:
            rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
            mix = rotation * (0.5 + 1.5 * torch.rand(4, generator=generator))  # far from a singular matrix
            parameters[name].copy_(mix @ parameters[name])
            other = parameters[name.replace(".lora_A.", ".lora_B.")]
            other.copy_(other @ torch.linalg.inv(mix))
    source.refresh(parameters, [])
    assert before is not None
    assert source.drift is not None
    torch.testing.assert_close(source.drift, before, rtol=1e-3, atol=1e-6)


def test_it_is_zero_for_a_fresh_adapter_and_grows_along_its_own_direction(source: StructuredSource) -> None:
    model = adapted(llama())
    source = source.bound(model)
    parameters = trained(model)
    source.refresh(parameters, [])
    assert float(source.drift) == 0.0  # type: ignore[arg-type]
    spread(model, 0.05)
    values = []
    for _ in range(5):
        source.refresh(parameters, [])
        values.append(float(source.drift))  # type: ignore[arg-type]
        with torch.no_grad():
            for name in parameters:
                parameters[name] += 0.05 * source._rows[name] / source._rows[name].norm()
    assert values == sorted(values)
    assert values[-1] > values[0] > 0


def test_the_modelled_drift_is_that_of_the_model(source: StructuredSource) -> None:
    """The modelled KL is within a third of the true KL of a slightly changed model on other text."""
    model = adapted(llama())
    spread(model, 0.004)
    base = llama()
    source = source.bound(model)
    source.refresh(trained(model), [])
    total = 0.0
    held = text(20, seed=9)
    with torch.no_grad():
        for batch in held:
            before, after = (m(**batch).logits[:, :-1].log_softmax(-1) for m in (base, model))
            total += float((before.exp() * (before - after)).sum(-1).mean()) / len(held)
    assert source.drift is not None
    assert 0.67 < float(source.drift) / total < 1.5
