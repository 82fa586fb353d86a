"""Each scope is guided by itself, whatever the others hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gradguide import GradGuide
from tests.contract import kit


def trained(kind: str, scope: str) -> list[Tensor]:
    """Return the parameters after five steps."""
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd, kind, scope)
    for step in range(5):
        kit.give_gradients(model, step, scale=3.0)
        optimizer.step()
    return kit.parameters_of(model)


def train(models: Sequence[torch.nn.Module], optimizers: Sequence[GradGuide]) -> None:
    for step in range(5):
        for model in models:
            kit.give_gradients(model, step)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("kind", kit.KINDS)
def test_scopes_differ(kind: str) -> None:
    """Each scope gives other steps, so the tests below cannot pass with the scope ignored."""
    results = {scope: trained(kind, scope) for scope in kit.SCOPES}
    for index, one in enumerate(kit.SCOPES):
        for other in kit.SCOPES[index + 1 :]:
            assert kit.differ(results[one], results[other]), (one, other)


def test_scope_tensor_is_each_tensor_by_itself() -> None:
    """One GradGuide with scope="tensor" equals one GradGuide per tensor."""
    whole, parts = kit.net(), kit.net()
    one = kit.guide(whole, kit.sgd, scope="tensor")
    many = [
        kit.guide(torch.nn.ParameterList([p]), lambda groups: kit.sgd(groups[0]["params"])) for p in parts.parameters()
    ]
    train([whole, parts], [one, *many])
    kit.assert_same(kit.parameters_of(whole), kit.parameters_of(parts))
    coherences = [optimizer.metrics()["coherence"] for optimizer in many]
    assert one.metrics()["coherence"] == pytest.approx(sum(coherences) / len(coherences), rel=1e-9)


def test_scope_group_is_each_group_by_itself() -> None:
    whole, parts = kit.net(), kit.net()
    one = kit.guide(whole, kit.sgd, scope="group")
    parameters = list(parts.parameters())
    many = [
        kit.guide(torch.nn.ParameterList(held), lambda groups: kit.sgd(groups[0]["params"] + groups[1]["params"]))
        for held in (parameters[:1], parameters[1:])
    ]
    train([whole, parts], [one, *many])
    torch.testing.assert_close(kit.parameters_of(whole), kit.parameters_of(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", kit.KINDS)
def test_scopes_whose_parameters_alternate_are_each_by_itself(kind: str) -> None:
    """Passes reorder parameters by scope; sources, directions and param groups must follow that order."""

    def made(model: torch.nn.Module, scope: Any) -> GradGuide:
        # Each group has one parameter of each side.
        base = torch.optim.SGD([{"params": [p], "lr": 0.1 if p.shape[0] == 6 else 0.3} for p in model.parameters()])
        return GradGuide(base, **(kit.options(kind, model) | {"scope": scope}))

    whole, *halves = (kit.net() for _ in range(3))
    one = made(whole, {p: "odd" if i % 2 else "even" for i, p in enumerate(whole.parameters())})
    many = [made(half, "global") for half in halves]
    for step in range(5):
        for model in (whole, *halves):
            kit.give_gradients(model, step)
        for side, half in enumerate(halves):
            for parameter in list(half.parameters())[1 - side :: 2]:
                parameter.grad = None
        for optimizer in (one, *many):
            optimizer.step()
    even, odd = (list(half.parameters())[side::2] for side, half in enumerate(halves))
    found = list(whole.parameters())
    torch.testing.assert_close([*found[::2], *found[1::2]], [*even, *odd], rtol=1e-5, atol=1e-6)
