"""Find LoRA parameters by name and by layer, and change adapters during training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from gradguide import Alignment, Direction, GradGuide, Magnitude
from gradguide.integrations.peft import lora_parameters, lora_scopes

from .lora import QUIET, Classifier, adapters, bert, capture, cross_entropy, examples, llama, move

pytestmark = QUIET


def owned(model: nn.Module, adapter: str = "default") -> set[nn.Parameter]:
    return {p for parts in adapters(model, adapter).values() for p in parts}


@pytest.mark.parametrize("kind", ["bert", "llama", "dora", "embedding", "with a trained head"])
def test_parameters_are_exactly_the_trainable_ones(kind: str) -> None:
    makers: dict[str, Callable[[], nn.Module]] = {
        "bert": bert,
        "llama": llama,
        "dora": lambda: bert(use_dora=True),
        "embedding": lambda: bert(target_modules=["word_embeddings", "query"]),
        "with a trained head": lambda: llama(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }
    model = makers[kind]()
    found = lora_parameters(model)
    assert {p for _, p in found} == owned(model)
    assert len(found) == len(owned(model))
    order = [(name, p) for name, p in model.named_parameters() if p in owned(model)]
    assert [name for name, _ in found] == [name for name, _ in order]
    assert all(p is q for (_, p), (_, q) in zip(found, order, strict=True))
    if kind == "llama":
        assert found[0][0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
        assert len(found) == 2 * 2 * 7
    if kind == "with a trained head":
        assert any(p.requires_grad and p not in owned(model) for p in model.parameters())


def test_names_are_canonical() -> None:
    model = bert()
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": model})})
    assert [name for name, _ in lora_parameters(wrapped)] == [name for name, _ in lora_parameters(model)]


def test_frozen_and_inactive_adapters_take_no_part() -> None:
    model = bert()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["query"]))
    assert {p for _, p in lora_parameters(model)} == owned(model)
    model.set_adapter("second")
    assert {p for _, p in lora_parameters(model)} == owned(model, "second")
    assert len(owned(model, "second")) == 4
    model.base_model.set_adapter(["default", "second"])
    assert {p for _, p in lora_parameters(model)} == owned(model) | owned(model, "second")


def test_no_lora_at_all() -> None:
    for model in (nn.Linear(2, 2), bert().requires_grad_(False)):
        for ask in (lora_parameters, lora_scopes):
            with pytest.raises(ValueError, match=r"no trainable LoRA parameter.*get_peft_model.*set_adapter"):
                ask(model)


@pytest.mark.parametrize("dora", [False, True])
def test_scopes_put_the_parts_of_a_layer_together(dora: bool) -> None:
    model = bert(use_dora=dora)
    scopes = lora_scopes(model)
    layers = adapters(model)
    assert scopes.keys() == owned(model)
    labels = [{scopes[p] for p in parts} for parts in layers.values()]
    assert all(len(label) == 1 for label in labels)
    assert len(set.union(*labels)) == len(layers) == 13
    assert set(Counter(scopes.values()).values()) == {3 if dora else 2}
    # A label is the name of its layer.
    for module, parts in layers.items():
        assert model.get_submodule(scopes[parts[0]]) is module


def test_scopes_equal_scope_module() -> None:
    """Both scopes give equal results bit for bit, different from one global scope."""
    ends: dict[str, list[Tensor]] = {}
    for kind in ("mapping", "module", "global"):
        model = Classifier(bert())
        move(model)
        scope = lora_scopes(model) if kind == "mapping" else kind
        trained = [p for _, p in lora_parameters(model)]
        optimizer = GradGuide(
            AdamW(trained, lr=1e-2),
            direction=Direction(decay=0.5),
            magnitude=Magnitude(max_norm=0.05),
            scope=scope,
            names=lora_parameters(model),
        )
        for batch in examples(1):
            cross_entropy(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends[kind] = [p.detach() for p in trained]
    assert all(torch.equal(a, b) for a, b in zip(ends["mapping"], ends["module"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ends["mapping"], ends["global"], strict=True))


def test_adapter_added_later_is_guided_without_the_source() -> None:
    model = Classifier(bert())
    move(model)
    source = capture(model)
    first = dict(lora_parameters(model))
    weight = 5.0
    optimizer = GradGuide(
        SGD([*first.values()], lr=0.01),
        direction=None,
        alignment=Alignment(source, weight=weight, project=False),
        magnitude=None,
        names=lora_parameters(model),
    )
    cross_entropy(model, examples(2)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()

    model.encoder.add_adapter("second", LoraConfig(r=3, target_modules=["query"]))
    model.encoder.base_model.set_adapter(["default", "second"])
    move(model)
    second = [p for _, p in lora_parameters(model) if p not in set(first.values())]
    assert len(second) == 4
    optimizer.add_param_group({"params": (p for p in second), "lr": 0.5})
    for batch in examples(3):
        cross_entropy(model, batch).backward()
        trained = [*first.values(), *second]
        received = {p: p.grad.clone() for p in trained if p.grad is not None}
        values = {p: p.detach().clone() for p in trained}
        pulled = source.row(list(first), [p.detach() for p in first.values()])
        s = [pulled.value(i, torch.float32).reshape(p.shape).clone() for i, p in enumerate(first.values())]
        optimizer.step()
        for p, pull in zip(first.values(), s, strict=True):
            torch.testing.assert_close(p.grad, received[p] + weight * pull, rtol=1e-4, atol=1e-6)
        for p in second:
            torch.testing.assert_close(p.grad, received[p], rtol=0, atol=0)
            assert received[p].any()
            torch.testing.assert_close(p.detach(), values[p] - 0.5 * received[p], rtol=1e-6, atol=1e-7)
        optimizer.zero_grad()
    assert optimizer.metrics()["steps"] == 1 + len(examples(3))


def test_adapter_added_under_a_name_that_the_source_lacks() -> None:
    model = Classifier(bert())
    move(model)
    optimizer = GradGuide(
        SGD([p for _, p in lora_parameters(model)], lr=0.01),
        alignment=Alignment(capture(model)),
        names=lora_parameters(model),
        direction=Direction(),
    )
    model.encoder.add_adapter("second", LoraConfig(r=3, target_modules=["query"]))
    model.encoder.set_adapter("second")
    with pytest.raises(ValueError, match=r"4 missing from the source \(.*lora_A\.second\.weight"):
        optimizer.add_param_group({"params": lora_parameters(model)})
    assert len(optimizer.param_groups) == 1
    # By bare parameters it works.
    optimizer.add_param_group({"params": [p for _, p in lora_parameters(model)]})
    assert len(optimizer.param_groups) == 2


def test_adapter_frozen_later_stays_untouched() -> None:
    model = Classifier(bert())
    model.encoder.add_adapter("second", LoraConfig(r=3, target_modules=["query"]))
    model.encoder.base_model.set_adapter(["default", "second"])
    move(model)
    optimizer = GradGuide(
        AdamW([p for _, p in lora_parameters(model)], lr=1e-2, weight_decay=0.1),
        alignment=Alignment(capture(model)),
        names=lora_parameters(model),
        direction=Direction(),
    )

    def step(seed: int) -> None:
        for batch in examples(seed)[:3]:
            cross_entropy(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    start = {p: p.detach().clone() for _, p in lora_parameters(model)}
    step(2)
    assert not any(torch.equal(p, value) for p, value in start.items())
    model.encoder.set_adapter("default")
    kept = {p: p.detach().clone() for p in owned(model, "second")}
    others = {p: p.detach().clone() for p in owned(model)}
    step(3)
    assert all(torch.equal(p, value) for p, value in kept.items())
    assert not any(torch.equal(p, value) for p, value in others.items())
    metrics = optimizer.metrics()
    assert metrics["steps"] == 6
    assert metrics["update_norm"] > 0
    # And unfrozen again.
    model.encoder.base_model.set_adapter(["default", "second"])
    step(4)
    assert not any(torch.equal(p, value) for p, value in kept.items())
