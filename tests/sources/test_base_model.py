"""Check the base model of a source: another model of equal shapes raises, the same model in another form does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import SGD
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from gradguide import Alignment, Direction, GradGuide, SourceGradient
from gradguide.integrations.peft import lora_parameters
from gradguide.sources.base_model import base_of
from tests.integrations.lora import QUIET, SIZES, Classifier, bert, cross_entropy, examples, llama, move

pytestmark = QUIET


def adapted(seed: int = 0, **sizes: int) -> PeftModel:
    """Return a language model with an adapter that does not depend on the seed of the base model."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))
    torch.manual_seed(100)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    move(model)
    return model


def causal(model: nn.Module, batch: Tensor) -> Tensor:
    value: Tensor = model(input_ids=batch, labels=batch).loss
    return value


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(40, (2, 6), generator=generator) for _ in range(3))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceGradient:
    """Return a source that was saved and loaded."""
    path = tmp_path_factory.mktemp("source") / "s.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = adapted()
    SourceGradient.capture(model, batches(), causal, names=lora_parameters(model)).save(path)
    return SourceGradient.load(path)


def guide(model: nn.Module, source: Any, names: Any = None) -> GradGuide:
    base = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return GradGuide(
        base,
        alignment=Alignment(source),
        names=lora_parameters(model) if names is None else names,
        direction=Direction(),
    )


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "lora_parameters": lora_parameters,
    "model": lambda model: model,
    "pairs": lambda model: list(model.named_parameters()),
    "by name": lambda model: dict(model.named_parameters()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [lambda s: s, lambda s: s.anchored(), lambda s: SourceGradient.merge([s, s])])
def test_i36_another_base_model_is_refused(source: SourceGradient, form: str, make: Callable[[Any], Any]) -> None:
    made = make(source)
    same = adapted()
    guide(same, made, FORMS[form](same))
    other = adapted(seed=1)
    with pytest.raises(ValueError, match=r"of base model llama \(.* parameters\), found another one") as caught:
        guide(other, made, FORMS[form](other))
    message = str(caught.value)
    assert "8 of 8 frozen weights that were compared differ (" in message
    assert "Load the base model that the source was captured from" in message
    optimizer = GradGuide(SGD(other.parameters(), lr=0.1), names=FORMS[form](other), direction=Direction())
    with pytest.raises(ValueError, match="found another one"):
        optimizer.set_alignment(Alignment(made))
    optimizer.set_alignment(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_i36_the_same_base_in_another_precision_is_the_same(source: SourceGradient, dtype: torch.dtype) -> None:
    def cast(model: PeftModel) -> PeftModel:
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.to(dtype)
        return model

    guide(cast(adapted()), source)
    with pytest.raises(ValueError, match="8 of 8 frozen weights"):
        guide(cast(adapted(seed=1)), source)
    if dtype != torch.float64:  # and the other way round, and both in one
        low = cast(adapted())
        stored = SourceGradient(
            {n: torch.zeros_like(p) for n, p in lora_parameters(low)}, metadata={"base": base_of(low)}
        )
        guide(adapted(), stored)
        guide(cast(adapted()), stored)
        guide(adapted().to(torch.float16 if dtype == torch.bfloat16 else torch.bfloat16), stored)


def test_i36_a_base_with_a_merged_adapter_is_another_one(source: SourceGradient) -> None:
    torch.manual_seed(0)
    merged = LlamaForCausalLM(LlamaConfig(**SIZES))
    for name, p in merged.named_parameters():
        if "_proj" in name:
            p.data += 1e-3 * torch.randn_like(p)
    model = get_peft_model(merged, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"[2-7] of 8 frozen weights that were compared differ"):
        guide(model, source)


def test_i36_rows_added_to_the_embedding_make_no_other_base_of(source: SourceGradient) -> None:
    model = adapted()
    model.get_base_model().resize_token_embeddings(48, mean_resizing=False)
    for p in model.get_input_embeddings().parameters():
        p.requires_grad_(False)
    guide(model, source)


def test_i36_a_single_layer_that_is_initialised_anew_makes_no_other_base_of() -> None:
    """One random layer, such as a pooler that a checkpoint lacks, is accepted."""

    def model_of(pooler: int) -> PeftModel:
        torch.manual_seed(0)
        model = BertModel(BertConfig(**SIZES))
        torch.manual_seed(pooler)
        assert model.pooler is not None
        model.pooler.dense.reset_parameters()
        return get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))

    first, second = model_of(1), model_of(2)
    base = base_of(first)
    assert "pooler.dense.weight" in base["weights"]
    guide(second, SourceGradient({n: torch.ones_like(p) for n, p in lora_parameters(first)}, metadata={"base": base}))


def test_i36_the_other_target_modules_of_an_adapter_hide_no_weight() -> None:
    narrow, wide = llama(target_modules=["q_proj"]), llama()
    assert base_of(narrow) == base_of(wide) | {"id": base_of(narrow)["id"]}


def test_i36_old_heads_are_not_compared() -> None:
    """Heads are not compared: one frozen during capture, and one that PEFT trains a copy of."""
    model = Classifier(bert())
    move(model)
    model.head.requires_grad_(False)
    source = SourceGradient.capture(model, examples(1), cross_entropy, curvature=False, names=lora_parameters(model))
    assert len(source.metadata["base"]["weights"]) == 8
    assert not any("head" in name for name in source.metadata["base"]["weights"])
    model.head = nn.Linear(16, 3)
    guide(model, source)


def test_i36_quantised_weights_are_left_out(source: SourceGradient) -> None:
    def packed(model: PeftModel) -> PeftModel:
        for name, p in model.named_parameters():
            if "_proj" in name and not p.requires_grad:
                p.data = torch.zeros(p.numel() // 2, 1, dtype=torch.uint8)
        return model

    guide(packed(adapted()), source)  # embedding and output layer are left to compare
    with pytest.raises(ValueError, match=r"2 of 2 frozen weights"):
        guide(packed(adapted(seed=1)), source)
    assert len(base_of(packed(adapted()))["weights"]) == 2


def test_i36_what_cannot_be_compared_warns(source: SourceGradient) -> None:
    model = adapted(seed=1)
    with pytest.warns(UserWarning, match=r"could not be compared.*names=lora_parameters\(model\)") as caught:
        GradGuide(
            SGD(model.parameters(), lr=0.1),
            alignment=Alignment(source),
            names=dict(lora_parameters(model)),
            direction=Direction(),
        )
    assert caught[0].filename == __file__
    meta = adapted(seed=1)
    for module in meta.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                setattr(module, name, nn.Parameter(p.to("meta"), requires_grad=False))
    with pytest.warns(UserWarning, match="could not be compared"):
        guide(meta, source)


def test_i36_another_base_can_be_allowed(source: SourceGradient, tmp_path: Path) -> None:
    source.save(tmp_path / "s.safetensors")
    mine = SourceGradient.load(tmp_path / "s.safetensors")
    del mine.metadata["base"]
    guide(adapted(seed=1), mine)


def test_i36_a_frozen_body_without_peft() -> None:
    def model_of(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
        model[:2].requires_grad_(False)
        return model

    source = SourceGradient.capture(model_of(0), [torch.ones(2, 4)] * 2, lambda m, b: m(b).mean())
    assert set(source.metadata["base"]["weights"]) == {"0.weight", "1.weight"}
    assert source.metadata["base"]["id"] == "Sequential (45 parameters)"
    same, other = model_of(0), model_of(1)
    guide(same, source, names=same)
    with pytest.raises(ValueError, match="2 of 2 frozen weights"):
        guide(other, source, names=other)


def test_i36_without_frozen_weights_nothing_is_compared() -> None:
    """Training starts at the anchor, and a large distance from it is normal later."""
    torch.manual_seed(0)
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    source = SourceGradient.capture(model, [torch.ones(2, 4)] * 2, lambda m, b: m(b).mean())
    assert source.metadata["base"] == {"id": "Linear (10 parameters)", "weights": {}}
    guide(other, source, names=other)


def test_i36_the_id_is_that_of_the_base_model() -> None:
    model = adapted()
    assert base_of(model)["id"].startswith("llama (")
    model.config._name_or_path = "someone/some-model"
    assert base_of(model)["id"].startswith("someone/some-model (")
    assert base_of(nn.Sequential(model))["id"].startswith("someone/some-model (")
    compiled: Any = torch.compile(model, backend="eager")
    assert base_of(compiled)["id"].startswith("someone/some-model (")


def test_i36_the_adapter_s_digest_is_never_null() -> None:
    for model in (Classifier(bert()), nn.Sequential(bert())):
        source = SourceGradient.capture(
            model, [torch.zeros(1)], lambda m, b: sum_of(m), curvature=False, names=lora_parameters(model)
        )
        assert len(source.metadata["adapter"]) == 64


def sum_of(model: nn.Module) -> Tensor:
    return torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum()
