"""The measured drift is the KL from the base model, whatever wraps the model, and it changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from gradguide.integrations.transformers import drift
from tests.integrations.lora import QUIET
from tests.sources.structured.problems import adapted, gpt2, llama, spread, text

pytestmark = QUIET


def padded(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Exclude the last five tokens of each first row, and put other tokens there."""
    for batch in batches:
        batch["attention_mask"][0, -5:] = 0
        batch["input_ids"][0, -5:] = 3
    return batches


def expected(base: nn.Module, model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Return the drift in float64, position by position."""
    values = []
    with torch.no_grad():
        for batch in batches:
            p, q = (m.eval()(**batch).logits.double().softmax(-1) for m in (base, model))
            for row, column in batch["attention_mask"].nonzero().tolist():
                values.append(float((p[row, column] * (p[row, column] / q[row, column]).log()).sum()))
    return sum(values) / len(values)


def moved(**options: Any) -> nn.Module:
    model = adapted(llama(), **options)
    spread(model, 0.3)
    return model


@pytest.mark.parametrize("wrap", [False, True])
def test_it_is_the_mean_kl_over_the_positions_that_count(wrap: bool) -> None:
    model, batches = moved(), padded(text(3))
    whole: nn.Module = Wrapped(model) if wrap else model
    found = drift(whole, batches)
    assert found > 1e-3
    assert found == pytest.approx(expected(llama(), model, batches), rel=1e-4)
    assert found == pytest.approx(drift(model, batches, base=llama()), rel=1e-5)


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_a_fresh_adapter_has_none() -> None:
    assert drift(adapted(llama()), text(2)) == pytest.approx(0.0, abs=1e-7)


def test_labels_are_not_used() -> None:
    model, batches = moved(), text(2)
    labelled = [{**batch, "labels": torch.full_like(batch["input_ids"], -100)} for batch in batches]
    assert drift(model, labelled) == drift(model, batches)


def test_whole_weights_are_compared_with_a_base() -> None:
    base, model = llama(), llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert drift(model, text(2), base=base) == pytest.approx(expected(base, model, text(2)), rel=1e-4)


def test_nothing_changes() -> None:
    model = moved(lora_dropout=0.5)
    model.train()
    model(**text(1)[0]).logits.sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = drift(model, text(2))
    assert drift(model, text(2)) == first  # dropout is off
    assert all(module.training for module in model.modules() if "Dropout" in type(module).__name__)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert p.grad is None or gradient is None or torch.equal(p.grad, gradient)
    assert model.get_model_status().enabled is not False  # type: ignore[operator]


def test_modules_to_save_count() -> None:
    model = adapted(llama(), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2.0)  # type: ignore[union-attr, index]
    assert drift(model, text(2)) == pytest.approx(expected(llama(), model, text(2)), rel=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: llama(), "no PEFT adapters to disable: pass the model before training, base="),
        (lambda: adapted(gpt2(), bias="all", fan_in_fan_out=True), "not part of an adapter"),
        (lambda: merged(), "merged into the weights"),
        (
            lambda: get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
            "must have one shape",
        ),
    ],
)
def test_what_has_no_base_to_compare_with(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drift(model(), text(1))


def merged() -> nn.Module:
    model: Any = moved()
    model.merge_adapter()
    return model  # type: ignore[no-any-return]


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="at least one position, found none"):
        drift(adapted(llama()), [])
