"""guided_loss: the objective as a function, alone and compared with GradGuide's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradguide import ReplaySource, SourceGradient, StructuredSource, guided_loss
from tests.contract import kit
from tests.regularizer.test_gradient import Case


@pytest.mark.parametrize("weights", [(0.3, 0.0, 0.0), (0.0, 0.2, 0.0), (0.0, 0.0, 0.4), (0.3, 0.2, 0.4)])
def test_its_gradient_is_the_one_that_gradguide_steps_with(weights: tuple[float, float, float]) -> None:
    case = Case(2, 3, weights, 2)
    optimizer = case.guide()
    case.step(optimizer)
    named = dict(case.model.named_parameters())
    direction = {name: optimizer._engine.directions[p].clone() for name, p in named.items()}
    found = guided_loss(
        case.loss(),
        named.items(),
        direction=direction,
        sources=case.sources,
        direction_weight=weights[0],
        magnitude_weight=weights[1],
        alignment_weight=weights[2],
    )
    gradients = torch.autograd.grad(found, list(named.values()))
    taken = case.step(optimizer)
    torch.testing.assert_close(taken, list(gradients), rtol=1e-4, atol=1e-7)


def loss_and_named(model: nn.Module) -> tuple[Tensor, Any]:
    return kit.loss_of(model, kit.batch(0)), model.named_parameters()


def test_without_weights_it_is_the_loss_itself() -> None:
    loss, named = loss_and_named(kit.net())
    assert guided_loss(loss, named) is loss


def test_a_vector_of_no_length_adds_nothing_but_its_constant() -> None:
    model = kit.net()
    loss, named = loss_and_named(model)
    zero = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    found = guided_loss(loss, named, direction=zero, direction_weight=0.5)
    found.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    plain = kit.net()
    kit.loss_of(plain, kit.batch(0)).backward()
    torch.testing.assert_close(gradients, [p.grad for p in plain.parameters()])
    assert float(found.detach()) == pytest.approx(float(loss.detach()))


def test_frozen_and_unused_parameters_are_left_out() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "frozen": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    model["frozen"].requires_grad_(False)
    x, y = kit.batch(0)
    loss = nn.functional.cross_entropy(model["frozen"](torch.tanh(model["used"](x))), y)
    found = guided_loss(loss, model.named_parameters(), magnitude_weight=0.5)
    found.backward()
    assert model["used"].weight.grad is not None
    assert model["unused"].weight.grad is None
    assert model["frozen"].weight.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction_weight": -1.0}, r"direction_weight must be in \[0, inf\), found -1.0"),
        ({"direction_weight": 1.0}, "needs a direction, found None"),
        ({"alignment_weight": 1.0}, "needs a source, found none"),
        ({"direction_weight": 1.0, "direction": {}}, r"direction lacks 4 of the parameters \(0.weight"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    loss, named = loss_and_named(kit.net())
    with pytest.raises(ValueError, match=message):
        guided_loss(loss, named, **options)


@pytest.mark.parametrize("norm", [False, True])
def test_a_replay_source_evaluates_its_next_batch(norm: bool) -> None:
    """In eval mode the graph of the loss holds the buffers of the norm, which the replay restores."""
    model = nn.Sequential(kit.net(), nn.BatchNorm1d(3).eval() if norm else nn.Identity())
    source = ReplaySource([kit.batch(7), kit.batch(8)], lambda batch: kit.loss_of(model, batch))
    for step in (7, 8):
        old = torch.autograd.grad(kit.loss_of(model, kit.batch(step)), list(model.parameters()))
        stored = SourceGradient(dict(zip(dict(model.named_parameters()), old, strict=True)))
        found = []
        for each in (source, stored):
            model.zero_grad()
            total = guided_loss(*loss_and_named(model), sources=each, alignment_weight=5.0)
            total.backward()
            found.append([total.detach(), *(p.grad for p in model.parameters())])
        kit.assert_same(found[0], found[1])
        assert total.item() > kit.loss_of(model, kit.batch(0)).item() + 0.1


def structured() -> tuple[nn.Module, StructuredSource]:
    """Return a model and a source that was captured before the model moved."""
    model = kit.net()
    source = StructuredSource.capture(model, [kit.batch(i) for i in range(3)], kit.loss_of, rank=None)
    bound = source.bound(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    return model, bound


def test_a_bound_structured_source_pulls_at_the_current_parameters() -> None:
    model, source = structured()
    weights = [(name, p) for name, p in model.named_parameters() if name in source.pulled]
    loss = kit.loss_of(model, kit.batch(0))
    found = guided_loss(loss, weights, sources=source, alignment_weight=5.0)
    source.refresh(dict(weights), [])
    row = source.row([name for name, _ in weights], [p for _, p in weights])
    pull = torch.cat([row.value(index, torch.float32) for index in range(len(weights))])
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [p for _, p in weights])])
    cosine = nn.functional.cosine_similarity(gradient, pull, dim=0)
    torch.testing.assert_close(found, loss + 5.0 * (1.0 - cosine))


def test_a_structured_source_that_pulls_none_of_the_parameters_is_refused() -> None:
    model, bound = structured()
    loss, named = loss_and_named(model)
    free = StructuredSource(bound._layers)
    with pytest.raises(ValueError, match=r"source 0 pulls none of the parameters.*pass source.bound\(model\)"):
        guided_loss(loss, named, sources=free, alignment_weight=1.0)
    renamed = [(f"other.{name}", p) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=r"pulls none of the parameters \(other\.0\.weight"):
        guided_loss(loss, renamed, sources=bound, alignment_weight=1.0)


def test_a_loss_without_parameters_is_refused() -> None:
    loss, _ = loss_and_named(kit.net())
    with pytest.raises(ValueError, match="depends on no trainable parameter"):
        guided_loss(loss.detach(), kit.net().named_parameters(), magnitude_weight=1.0)
    with pytest.raises(ValueError, match="depends on none of the parameters given"):
        guided_loss(loss, kit.net().named_parameters(), magnitude_weight=1.0)
