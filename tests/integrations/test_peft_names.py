"""Match names of PEFT models: the README's example for every kind of head, other adapter names, and mismatches."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from gradguide import Alignment, Direction, GradGuide, SourceGradient
from gradguide.integrations.peft import lora_parameters, lora_scopes
from gradguide.utils.names import adapter_of

from .lora import QUIET, SIZES, move

pytestmark = QUIET

Batch = dict[str, Tensor]


def causal(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return moved(get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(**options)))


def classifying(kind: str = "bert", **options: Any) -> PeftModel:
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": "all-linear", "task_type": "SEQ_CLS", **options}
    model = (
        BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
        if kind == "bert"
        else LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, pad_token_id=0))
    )
    return moved(get_peft_model(model, LoraConfig(**options)))


def moved(model: PeftModel) -> PeftModel:
    move(model)
    return model


MODELS: dict[str, Callable[[], PeftModel]] = {
    "CAUSAL_LM": causal,
    "CAUSAL_LM, modules_to_save": lambda: causal(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
    "CAUSAL_LM, embeddings adapted": lambda: causal(target_modules=["q_proj", "embed_tokens"]),
    "CAUSAL_LM, DoRA": lambda: causal(use_dora=True),
    "SEQ_CLS": classifying,
    "SEQ_CLS, modules_to_save": lambda: classifying(modules_to_save=["classifier"]),
    "SEQ_CLS, causal": lambda: classifying("llama"),
}


def batches(model: PeftModel, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (3, 2, 6), generator=generator)
    if model.peft_config["default"].task_type == "CAUSAL_LM":
        return [{"input_ids": part, "labels": part} for part in ids]
    return [{"input_ids": part, "labels": torch.randint(3, (2,), generator=generator)} for part in ids]


def capture(model: PeftModel, **options: Any) -> SourceGradient:
    """Capture as in the README, with changed ``options``."""
    options = {"names": lora_parameters(model), **options}
    return SourceGradient.capture(model, batches(model), lambda model, batch: model(**batch).loss, **options)


def guide(model: nn.Module, source: SourceGradient, names: Any) -> GradGuide:
    base = AdamW(model.parameters(), lr=1e-3)
    return GradGuide(base, alignment=Alignment(source), names=names, direction=Direction())


def refused(model: nn.Module, source: SourceGradient, names: Any) -> str:
    base = AdamW(model.parameters())
    with pytest.raises(ValueError) as caught:
        GradGuide(base, alignment=Alignment(source), names=names, direction=Direction())
    assert base.state == {}
    return str(caught.value)


def follow(message: str, model: nn.Module, source: SourceGradient) -> str:
    """Guide with the ``names`` that a message advises, and return that expression."""
    found = re.search(r"names=(.*[)\]])$", message)
    assert found is not None
    guide(model, source, eval(found[1], {"lora_parameters": lora_parameters, "model": model}))
    return found[1]


@pytest.mark.parametrize("kind", MODELS)
def test_the_example_of_the_readme_works(kind: str) -> None:
    model = MODELS[kind]()
    source = capture(model)
    assert source.names() == [name for name, _ in lora_parameters(model)]
    assert source.metadata["adapter"] is not None
    optimizer = guide(model, source.anchored(), lora_parameters(model))
    for batch in batches(model, seed=1):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    metrics = optimizer.metrics()
    assert metrics["steps"] == 3
    assert -1 <= metrics["source_cosine"] <= 1


@pytest.mark.parametrize("kind", MODELS)
def test_everything_captured_and_a_model_as_names(kind: str) -> None:
    model = MODELS[kind]()
    source = capture(model, names=None)
    assert set(source.names()) == {name for name, p in model.named_parameters() if p.requires_grad}
    guide(model, source, model)


def test_i35_a_source_with_the_classifier_says_how_to_capture_without() -> None:
    model = classifying()
    message = refused(model, capture(model, names=None), lora_parameters(model))
    assert "2 unexpected in the source (base_model.model.classifier.modules_to_save.default.weight" in message
    assert "`names` or the optimizer leaves them out" in message
    assert "SourceGradient.capture(model, batches, loss, names=lora_parameters(model))" in message
    assert "new head" not in message


def test_i35_a_classifier_that_the_source_lacks_says_how_to_leave_it_out() -> None:
    model = classifying()
    source = capture(model)
    message = refused(model, source, model)
    assert "2 missing from the source (base_model.model.classifier.modules_to_save.default.weight" in message
    assert "a new head" in message
    assert follow(message, model, source) == "lora_parameters(model)"


def test_i35_a_head_beside_plain_layers_says_how_to_leave_it_out() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    source = SourceGradient({name: torch.ones_like(p) for name, p in model.named_parameters() if "body" in name})
    message = refused(model, source, model)
    assert "2 missing from the source" in message
    follow(message, model, source)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "embed_tokens"]])
def test_i35_another_rank_is_named(rank: int, targets: list[str]) -> None:
    source = capture(causal(r=rank, target_modules=targets))
    model = causal(target_modules=targets)
    message = refused(model, source, lora_parameters(model))
    assert f"adapter of rank {rank}, found one of rank 2: create the adapter with LoraConfig(r={rank})" in message


def test_i35_other_target_modules_are_named() -> None:
    source = capture(causal(target_modules=["q_proj", "k_proj"]))
    model = causal(target_modules=["q_proj", "v_proj"])
    message = refused(model, source, lora_parameters(model))
    assert "other layers" in message
    found = re.search(r"target_modules=(\[.*?\])", message)
    assert found is not None
    assert eval(found[1]) == ["k_proj", "q_proj"]


def test_i35_another_kind_of_model_is_named() -> None:
    model = causal()
    message = refused(model, capture(classifying()), lora_parameters(model))
    assert "base_model.model.bert.encoder" in message
    assert "base_model.model.model.layers" in message


def test_i35_another_size_of_model_is_named() -> None:
    torch.manual_seed(0)
    wide = moved(
        get_peft_model(
            LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 32})),
            LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    )
    model = causal()
    assert "of a model of another size" in refused(model, capture(wide), lora_parameters(model))


def two_adapters(first: Callable[[], PeftModel]) -> PeftModel:
    model = first()
    model.add_adapter("b", copy.copy(model.peft_config["default"]))
    model.set_adapter("b")
    move(model)
    return model


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["q_proj"]),
        LoKrConfig(r=2, target_modules=["q_proj"]),
        OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
        VeraConfig(r=2, target_modules=["q_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_i35_a_source_of_another_method_s_adapter_serves_one_of_another_name(config: PeftConfig) -> None:
    """The names differ in the adapter alone, and each parameter is pulled by its own entry."""
    models = [
        get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), copy.copy(config), adapter_name=name)
        for name in ("default", "news")
    ]
    first, second = ([(n, p) for n, p in model.named_parameters() if p.requires_grad] for model in models)
    source = SourceGradient({name: torch.full_like(p, place + 1.0) for place, (name, p) in enumerate(first)})
    alignment = Alignment(source, weight=3.0, project=False)
    base = SGD([p for _, p in second], lr=0.0)
    optimizer = GradGuide(base, magnitude=None, alignment=alignment, names=models[1])
    for _, p in second:
        p.grad = torch.zeros_like(p)
        p.grad.view(-1)[0] = 1e-3  # a step with only zeros is not guided
    optimizer.step()
    for place, (_, p) in enumerate(second):
        assert p.grad is not None
        torch.testing.assert_close(p.grad.view(-1)[1:], torch.full_like(p.grad.view(-1)[1:], 3.0 * (place + 1)))


@pytest.mark.parametrize("kind", MODELS)
def test_i35_a_source_of_one_adapter_serves_another(kind: str) -> None:
    """Each parameter is pulled by the entry that is equal up to the adapter's name."""
    source = capture(MODELS[kind](), names=None)
    model = two_adapters(MODELS[kind])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {adapter_of(name) for name in trained} == {"b"}
    names = [f"{name}.".replace(".b.", ".default.").removesuffix(".") for name in trained]
    assert set(names) == set(source.names())
    optimizer = GradGuide(
        SGD([p for p in model.parameters() if p.requires_grad], lr=0.0),
        direction=None,
        magnitude=None,
        alignment=Alignment(source, weight=3.0, project=False),
        names=model,
    )
    for p in trained.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    row = source.row(names, [p.detach() for p in trained.values()])
    for i, p in enumerate(trained.values()):
        assert p.grad is not None
        torch.testing.assert_close(p.grad.reshape(-1), 1.0 + 3.0 * row.value(i, torch.float32), rtol=1e-4, atol=1e-6)
    assert optimizer.metrics()["source_cosine"] == optimizer.metrics()["source_cosine"]


def test_i35_the_adapter_that_was_captured_keeps_its_source() -> None:
    """The optimizer has both adapters, one frozen. A source of the frozen one is ambiguous and raises."""
    source = capture(causal())
    model = two_adapters(causal)
    message = refused(model, source, model)
    assert "missing from the source" in message
    assert "The source is of adapter 'default', which the optimizer trains together with 'b'" in message
    follow(message, model, source)


def test_i35_two_adapters_trained_at_once_are_kept_apart() -> None:
    model = two_adapters(causal)
    model.base_model.set_adapter(["default", "b"])
    both = capture(model)
    assert len(both.names()) == 2 * len(capture(causal()).names())
    first = {name: t for name, t in both.anchor.items() if ".default." in name}
    guide(model, both, lora_parameters(model))
    # Names of one adapter only: the other one has no source.
    source = capture(causal())
    message = refused(model, source, lora_parameters(model))
    assert f"{len(first)} missing from the source" in message
    assert ".b." in message
    # A source of a third adapter could belong to either.
    third = source.renamed({name: name.replace(".default.", ".c.") for name in source.names()})
    message = refused(model, third, lora_parameters(model))
    assert "The source has adapter 'c', the optimizer 'b' and 'default'" in message
    follow(message, model, third)


def test_i35_an_adapter_added_after_the_optimizer_has_names() -> None:
    model = causal()
    optimizer = GradGuide(SGD([p for _, p in lora_parameters(model)], lr=0.1), names=model, direction=Direction())
    source = capture(model)
    model.add_adapter("b", copy.copy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "b"])
    move(model)
    new = [p for name, p in lora_parameters(model) if adapter_of(name) == "b"]
    optimizer.add_param_group({"params": new})
    with pytest.raises(ValueError, match=f"{len(new)} missing from the source"):
        optimizer.set_alignment(Alignment(source))
    optimizer.set_alignment(Alignment(capture(model)))
    model(**batches(model)[0]).loss.backward()
    optimizer.step()
    assert optimizer.metrics()["source_cosine"] == optimizer.metrics()["source_cosine"]


def test_lora_scopes_are_of_lora_parameters() -> None:
    model = classifying()
    scopes = lora_scopes(model)
    assert set(scopes) == {p for _, p in lora_parameters(model)}
    assert len(set(scopes.values())) == len(scopes) / 2
