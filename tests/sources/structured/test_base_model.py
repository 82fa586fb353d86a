"""A structured source belongs to one base model, however that model is adapted, renamed or wrapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradguide import Alignment, Direction, GradGuide
from gradguide.integrations.peft import lora_parameters
from gradguide.integrations.sampling import sampled_loss
from gradguide.sources.structured import StructuredSource
from tests.sources.structured.problems import adapted, gpt2, llama, spread, text, trained


def bare(seed: int) -> nn.Module:
    """Return a model of which only the last block is trained."""
    model: nn.Module = llama(seed=seed)
    model.requires_grad_(False)
    model.get_submodule("model.layers.1").requires_grad_(True)
    return model


def renamed(seed: int) -> nn.Module:
    model: Any = adapted(llama(seed=seed))
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    model.delete_adapter("default")
    return model  # type: ignore[no-any-return]


def wrapped(seed: int) -> nn.Module:
    model = nn.Module()
    model.module = adapted(llama(seed=seed))
    return model


def low(seed: int) -> nn.Module:
    return adapted(llama(seed=seed).to(torch.bfloat16))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "bare": bare,
    "PEFT": lambda seed: adapted(llama(seed=seed)),
    "renamed adapter": renamed,
    "wrapped": wrapped,
    "bfloat16": low,
}


@pytest.fixture(scope="module", params=["bare", "PEFT", "trained PEFT", "merged"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StructuredSource:
    """Return a source of the base model with seed 0, after a file."""
    model: nn.Module = llama()
    if "PEFT" in request.param:
        model = adapted(model)
    if "trained" in request.param:
        spread(model, 0.01)
    made = StructuredSource.capture(model, text(2), sampled_loss, rank=4)
    if request.param == "merged":
        made = StructuredSource.merge([made, made])
    path = tmp_path_factory.mktemp("source") / "source.safetensors"
    made.save(path)
    return StructuredSource.load(path)


def guide(model: nn.Module, source: StructuredSource, names: Any) -> GradGuide:
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return GradGuide(base, alignment=Alignment(source), names=names, direction=Direction())


@pytest.mark.parametrize("kind", MODELS)
def test_another_base_model_is_refused_with_a_reason(source: StructuredSource, kind: str) -> None:
    forms: list[Callable[[nn.Module], Any]] = [lambda model: model]
    if kind in ("PEFT", "renamed adapter"):
        forms.append(lora_parameters)
    for form in forms:
        same = MODELS[kind](0)
        guide(same, source, form(same))
        other = MODELS[kind](1)
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(ValueError, match=r"is of base model llama \(.*, found another one.* capture a source with"):
            guide(other, source, form(other))
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
        unguided = GradGuide(torch.optim.SGD(other.parameters(), lr=0.1), names=form(other), direction=Direction())
        with pytest.raises(ValueError, match="found another one"):
            unguided.set_alignment(Alignment(source))


def test_an_adapter_whose_start_changes_the_base_needs_its_own_source() -> None:
    """PiSSA moves the largest singular values of a weight into the adapter: B A is not the change of the model."""
    torch.manual_seed(0)
    model = adapted(llama(), init_lora_weights="pissa", target_modules=["q_proj"])
    base = StructuredSource.capture(llama(), text(2), sampled_loss, rank=4)
    with pytest.raises(ValueError, match=r"q_proj under the adapter is not the weight at capture"):
        base.bound(model)
    own = StructuredSource.capture(model, text(2), sampled_loss, rank=4)
    bound = own.bound(model)
    bound.refresh(trained(model), [])
    assert bound.drift is not None
    assert abs(float(bound.drift)) < 1e-6


def test_a_merged_adapter_is_refused() -> None:
    """The adapter still counts as active, and its change is in the weight too."""
    base = StructuredSource.capture(llama(), text(2), sampled_loss, rank=4)
    model: Any = adapted(llama())
    spread(model, 0.05)
    model.merge_adapter()
    works: list[Callable[[], object]] = [
        lambda: base.bound(model),
        lambda: StructuredSource.capture(model, text(2), sampled_loss, rank=4),
    ]
    for work in works:
        with pytest.raises(ValueError, match=r"'default' is merged into the weight of .*call unmerge_adapter"):
            work()
    model.unmerge_adapter()
    base.bound(model)


def test_a_whole_model_of_another_base_is_refused(source: StructuredSource) -> None:
    with pytest.raises(ValueError, match="is not the weight at capture"):
        guide(model := llama(seed=1), source, model)


def test_another_base_model_on_purpose(source: StructuredSource) -> None:
    changed = StructuredSource(
        source._layers, {k: v for k, v in source.metadata.items() if k not in ("base", "merged")}
    )
    guide(model := adapted(llama(seed=1)), changed, model)


def test_a_model_of_other_sizes_or_layers_is_refused(source: StructuredSource) -> None:
    other = adapted(gpt2(), fan_in_fan_out=True)
    with (
        pytest.warns(UserWarning, match="could not be compared with this one"),
        pytest.raises(ValueError, match=r"no trained parameter of the model changes one of the source's 14 layers"),
    ):
        guide(other, source, other)


def test_the_file_names_its_base_model(source: StructuredSource, tmp_path: Path) -> None:
    metadata = source.metadata["merged"][0] if "merged" in source.metadata else source.metadata
    assert metadata["base"]["id"].startswith("llama (")
    assert len(metadata["base"]["weights"]) == 8
    assert not any("lora" in name or "base_layer" in name for name in metadata["base"]["weights"])
