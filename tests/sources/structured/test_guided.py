"""Train with a structured source in GradGuide: the model stays near its base while an adapter learns."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradguide import Alignment, Direction, GradGuide
from gradguide.integrations.peft import lora_parameters
from gradguide.integrations.sampling import sampled_loss
from gradguide.sources.structured import StructuredSource
from tests.sources.structured.problems import adapted, llama, text


@pytest.fixture(scope="module")
def source() -> StructuredSource:
    return StructuredSource.capture(llama(), text(30), sampled_loss, rank=8)


def target() -> dict[str, Tensor]:
    """Return rows that always continue with token 7."""
    ids = text(1, rows=8, length=10, seed=5)[0]["input_ids"]
    ids[:, 5:] = 7
    return {"input_ids": ids, "labels": ids}


def trained(lr: float, steps: int = 12, **options: Any) -> tuple[nn.Module, GradGuide]:
    torch.manual_seed(0)
    model = adapted(llama())
    given = {key: value(model) if callable(value) else value for key, value in options.items()}
    optimizer = GradGuide(torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0), **given)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**target()).loss.backward()
        optimizer.step()
    return model, optimizer


def drift(model: nn.Module) -> float:
    """Return the KL from the base model on other text, in nats per token."""
    base, total, held = llama(), 0.0, text(10, seed=9)
    with torch.no_grad():
        for batch in held:
            before, after = (m(**batch).logits[:, :-1].log_softmax(-1) for m in (base, model))
            total += float((before.exp() * (before - after)).sum(-1).mean()) / len(held)
    return total


@pytest.mark.parametrize("names", [lambda model: model, lora_parameters], ids=["model", "lora_parameters"])
def test_it_keeps_the_base_model_and_the_target_is_learnt(source: StructuredSource, names: Any) -> None:
    plain, _ = trained(1e-2)
    kept, optimizer = trained(1e-2, alignment=Alignment(source), names=names)
    assert drift(kept) < 0.25 * drift(plain)
    with torch.no_grad():
        assert float(kept(**target()).loss) < float(llama()(**target()).loss) - 0.1
    assert optimizer.metrics()["source_drift"] > 0


def test_metrics_have_the_modelled_drift_of_each_source(source: StructuredSource) -> None:
    _, optimizer = trained(1e-3, 3, alignment=Alignment({"a": source, "b": source}), names=lambda model: model)
    found = optimizer.metrics()
    assert found["source_drift/a"] == found["source_drift/b"] == found["source_drift"] > 0
    _, plain = trained(1e-3, 3)
    assert math.isnan(plain.metrics()["source_drift"])


def test_two_sources_pull_as_one_of_twice_the_weight(source: StructuredSource) -> None:
    twice, _ = trained(1e-3, 4, alignment=Alignment(source, weight=40.0), names=lambda model: model)
    both, _ = trained(1e-3, 4, alignment=Alignment([source, source], weight=20.0), names=lambda model: model)
    for a, b in zip(twice.parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_model_is_needed(source: StructuredSource) -> None:
    model = adapted(llama())
    with pytest.raises(ValueError, match="pass names=model"):
        GradGuide(
            torch.optim.AdamW(model.parameters()),
            alignment=Alignment(source),
            names=list(model.named_parameters()),
            direction=Direction(),
        )


def test_another_base_model_is_refused(source: StructuredSource) -> None:
    model = adapted(llama(seed=1))
    with pytest.raises(ValueError, match="found another one"):
        GradGuide(
            torch.optim.AdamW(model.parameters()), alignment=Alignment(source), names=model, direction=Direction()
        )


def test_copies_and_pickles_go_on_alike(source: StructuredSource) -> None:
    model, optimizer = trained(1e-3, 3, alignment=Alignment(source), names=lambda model: model)
    pair = copy.deepcopy((model, optimizer))
    other = pickle.loads(pickle.dumps((model, optimizer)))
    for net, guide in ((model, optimizer), pair, other):
        guide.zero_grad()
        net(**target()).loss.backward()
        guide.step()
    for net in (pair[0], other[0]):
        for a, b in zip(model.parameters(), net.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_state_dict_resumes_bitwise(source: StructuredSource) -> None:
    model, optimizer = trained(1e-3, 3, alignment=Alignment(source), names=lambda model: model)
    again = adapted(llama())
    again.load_state_dict(model.state_dict())
    resumed = GradGuide(
        torch.optim.AdamW(again.parameters(), lr=1e-3, weight_decay=0.0),
        alignment=Alignment(source),
        names=again,
        direction=Direction(),
    )
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, guide in ((model, optimizer), (again, resumed)):
        guide.zero_grad()
        net(**target()).loss.backward()
        guide.step()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
