"""Parameters that are frozen, unfrozen, added or left out while a structured source is in use."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM

from gradguide import Alignment, GradGuide, SourceGradient
from gradguide.integrations.peft import lora_parameters
from gradguide.integrations.sampling import sampled_loss
from gradguide.sources.structured import StructuredSource
from gradguide.utils.names import NamedParameters
from tests.sources.structured.problems import VOCABULARY, adapted, energy, llama, spread, text, trained


@pytest.fixture(scope="module")
def source() -> StructuredSource:
    return StructuredSource.capture(llama(), text(), sampled_loss, rank=6)


def guide(model: nn.Module, source: StructuredSource, parameters: Any = None, **options: Any) -> GradGuide:
    given = [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
    base = torch.optim.SGD(given, lr=1e-3)
    return GradGuide(base, alignment=Alignment(source), **{"names": model, **options})


def step(model: nn.Module, optimizer: GradGuide) -> None:
    optimizer.zero_grad()
    model(**text(1)[0]).logits.square().mean().backward()
    optimizer.step()


def check_pull(source: StructuredSource, model: nn.Module, optimizer: GradGuide, count: int) -> None:
    """Assert that the pull on ``count`` trained parameters is the gradient of the dense form at the present values."""
    bound = optimizer._engine.planner.sources[0]
    planner = optimizer._engine.planner
    planner.refresh(optimizer.base)
    values = {name: p.detach().double().requires_grad_() for name, p in trained(model).items()}
    energy(source, model, {}, values).backward()
    wanted = {name: value.grad for name, value in values.items() if value.grad is not None}
    assert len(wanted) == count
    row = bound.row(list(wanted), [values[name] for name in wanted])
    for index, gradient in enumerate(wanted.values()):
        error = (row.value(index, torch.float64) - gradient.reshape(-1)).norm()
        assert error <= 1e-5 * gradient.norm()


def test_a_matrix_that_is_frozen_while_training_counts_on(source: StructuredSource) -> None:
    """In turns, A and B of all layers are frozen."""
    model = adapted(llama())
    spread(model, 0.1)
    optimizer = guide(model, source)
    matrices = trained(model)
    for turn in ("lora_A", "lora_B", "lora_A"):
        for name, p in matrices.items():
            p.requires_grad_(turn not in name)
        step(model, optimizer)
        check_pull(source, model, optimizer, len(matrices) // 2)
    again = copy.deepcopy((model, optimizer))
    for each in ((model, optimizer), again):
        step(*each)
    for one, other in zip(model.parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)


def unfreeze(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)


def second_adapter(model: nn.Module) -> None:
    model.set_adapter("second")  # type: ignore[operator]


@pytest.mark.parametrize("change", [unfreeze, second_adapter])
def test_a_parameter_that_is_trained_later_needs_the_sources_again(source: StructuredSource, change: Any) -> None:
    model = adapted(llama())
    if change is second_adapter:
        model.add_adapter("second", model.peft_config["default"])  # type: ignore[operator, index]
    else:
        for name, p in model.named_parameters():
            p.requires_grad_("lora" in name and ".0." in name)
    optimizer = guide(model, source, model.parameters())
    step(model, optimizer)
    change(model)
    spread(model, 0.1)
    message = r"lora_A.*is trained, but it was frozen or in an inactive adapter.*set_align"
    check_needs_alignment(model, optimizer, source, message)


def check_needs_alignment(model: Any, optimizer: GradGuide, source: StructuredSource, message: str) -> None:
    """Check that a step is refused and changes nothing, and that ``set_alignment`` with the source is the way out."""
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=message):
        step(model, optimizer)
    for p, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value)
    optimizer.set_alignment(Alignment(source))
    step(model, optimizer)
    check_pull(source, model, optimizer, 28)


def test_an_adapter_that_becomes_inactive_needs_the_sources_again(source: StructuredSource) -> None:
    """Its change of the weights is gone, and the pull would work against it."""
    model: Any = adapted(llama())
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    spread(model, 0.1)
    optimizer = guide(model, source)
    step(model, optimizer)
    model.set_adapter("second")
    message = r"changed from \['default', 'second'\] to \['second'\] .* set_alignment"
    check_needs_alignment(model, optimizer, source, message)


def test_a_frozen_adapter_that_becomes_active_needs_the_sources_again(source: StructuredSource) -> None:
    """The pull and the drift would lack its change of the weights."""
    model: Any = adapted(llama())
    model.add_adapter("second", model.peft_config["default"])
    spread(model, 0.1)
    optimizer = guide(model, source)
    step(model, optimizer)
    model.base_model.set_adapter(["default", "second"])
    for name, p in model.named_parameters():
        p.requires_grad_(".default." in name and p.requires_grad)
    message = r"changed from \['default'\] to \['default', 'second'\] .* set_alignment"
    check_needs_alignment(model, optimizer, source, message)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_optimizer_of_half_an_adapter_is_refused_unless_the_other_half_is_frozen(
    source: StructuredSource, part: str
) -> None:
    model = adapted(llama())
    spread(model, 0.1)
    half = {name: p for name, p in model.named_parameters() if part in name}
    with pytest.raises(ValueError, match=r"q_proj is changed by .* not a named parameter of this optimizer: give both"):
        guide(model, source, half.values())
    with pytest.raises(ValueError, match=r"q_proj is changed by .* not a named parameter of this optimizer: give both"):
        guide(model, source, names=NamedParameters(half.items(), model))
    for name, p in trained(model).items():
        p.requires_grad_(name in half)
    optimizer = guide(model, source, half.values())
    step(model, optimizer)
    check_pull(source, model, optimizer, len(half))


def classifier(labels: int = 2) -> nn.Module:
    config = llama().config
    config.pad_token_id = 0
    config.num_labels = labels
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    wrapped: nn.Module = get_peft_model(LlamaForSequenceClassification(config), LoraConfig(**options))
    return wrapped


def test_a_head_outside_the_names_is_not_pulled() -> None:
    model = classifier()
    source = StructuredSource.capture(model, text(), sampled_loss, rank=4)
    spread(model, 0.1)
    assert "score" in source.names()
    optimizer = guide(model, source, names=lora_parameters(model))
    step(model, optimizer)
    head = model.get_parameter("base_model.model.score.modules_to_save.default.weight")
    bound = optimizer._engine.planner.sources[0]
    assert isinstance(bound, StructuredSource)
    assert bound._binding is not None
    assert bound._binding.names == {name for name, _ in lora_parameters(model)}
    head.requires_grad_(False)
    check_pull(source, model, optimizer, 28)


def test_a_new_head_is_refused_with_a_way_out_unless_it_is_outside_the_names() -> None:
    source = StructuredSource.capture(classifier(), text(), sampled_loss, rank=4)
    model = classifier(labels=7)
    assert "score" in source.names()
    guide(model, source, names=lora_parameters(model))
    same: Any = classifier()
    nn.init.normal_(same.get_parameter("base_model.model.score.modules_to_save.default.weight"))
    with pytest.raises(ValueError, match=r"the weight of score is trained.*If the layer is a new head"):
        guide(same, source, names=same)
    with pytest.raises(ValueError, match=r"layer score has shape \(7, 16\), the source has \(2, 16\).*a new head"):
        guide(model, source, names=model)


@pytest.mark.parametrize("where", ["wrapper", "base"])
def test_layers_of_a_group_that_is_added_later_are_pulled_from_then_on(source: StructuredSource, where: str) -> None:
    model = adapted(llama())
    spread(model, 0.1)
    parts: list[list[Tensor]] = [[], []]
    for name, p in trained(model).items():
        parts["layers.1." in name].append(p)
    optimizer = guide(model, source, parts[0])
    step(model, optimizer)
    (optimizer if where == "wrapper" else optimizer.base).add_param_group({"params": parts[1]})
    step(model, optimizer)
    check_pull(source, model, optimizer, 28)


def test_a_scale_that_changes_later_needs_the_sources_again(source: StructuredSource) -> None:
    model = adapted(llama())
    spread(model, 0.1)
    optimizer = guide(model, source)
    step(model, optimizer)
    for module in model.modules():
        scale: Any = getattr(module, "scale_layer", None)
        if scale is not None:
            scale(2.0)
    with pytest.raises(RuntimeError, match=r"changed from [\d.]+ to [\d.]+, after .* set_alignment"):
        step(model, optimizer)
    optimizer.set_alignment(Alignment(source))
    step(model, optimizer)
    check_pull(source, model, optimizer, len(trained(model)))


def test_adapters_outside_the_layers_warn(source: StructuredSource) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    with pytest.warns(UserWarning, match=r"no source pulls 2 adapter matrices .*embed_tokens.lora_embedding_A"):
        optimizer = guide(model, source)
    step(model, optimizer)
    check_pull(source, model, optimizer, 4)
    gradient = SourceGradient.capture(model, text(4), lambda model, batch: sampled_loss(model, batch)[0], names=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.set_alignment(Alignment([source, gradient.anchored()]))


def with_stacked_experts() -> Any:
    """Return a model whose experts are stored as one tensor. Skip the test if transformers has layers instead."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["num_key_value_heads"] = 2
    model: Any = MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, num_local_experts=2, **sizes))
    if not any(p.dim() == 3 for p in model.parameters()):
        pytest.skip("this version of transformers has linear layers as experts")
    return model


@pytest.mark.parametrize("adapter", [True, False])
def test_experts_that_are_stored_as_one_tensor_warn(adapter: bool) -> None:
    model = with_stacked_experts()
    source = StructuredSource.capture(model, text(), sampled_loss, rank=4, modules="q_proj")
    if adapter:
        options: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
        model = get_peft_model(model, LoraConfig(r=2, **options))
    with pytest.warns(UserWarning, match=r"no source pulls 4 adapter matrices or stacked weights.*experts"):
        guide(model, source)


def test_adapters_of_two_parameters_of_one_module_warn() -> None:
    """PEFT nests their wrappers."""
    model = with_stacked_experts()
    source = StructuredSource.capture(model, text(), sampled_loss, rank=4, modules="q_proj")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts))
    with pytest.warns(UserWarning, match=r"no source pulls 8 adapter matrices or stacked weights.*experts"):
        optimizer = guide(model, source)
    step(model, optimizer)


def test_matrices_of_an_adapter_are_no_layers() -> None:
    """PEFT adapts both parameters of the experts with ``target_modules="all-linear"``, in nested wrappers."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "target_parameters": experts}
    model = get_peft_model(with_stacked_experts(), LoraConfig(r=2, **options))
    found = StructuredSource.capture(model, text(), sampled_loss, rank=4).names()
    assert found == [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in ("q", "v")]


def test_what_has_no_pull_by_design_does_not_warn(source: StructuredSource) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    whole = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide(model, source)
        guide(whole, source)
