"""Backends make the same steps, in every scope."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradguide import GradGuide
from tests.conformance.bases import BASES, net_for
from tests.contract import kit


def run(backend: str, name: str, kind: str, scope: str, dtype: torch.dtype) -> tuple[Any, ...]:
    model = net_for(name, dtype)
    optimizer = kit.guide(model, BASES[name], kind, scope, backend=backend)
    history, guided = [], []
    for step in range(5):
        kit.give_gradients(model, step, scale=3.0)
        optimizer.step()
        history.append(optimizer.metrics())
        guided.append([p.grad.clone().double() for p in model.parameters() if p.grad is not None])
    return history, guided, kit.directions_of(optimizer), [p.double() for p in kit.parameters_of(model)]


@pytest.mark.parametrize("scope", kit.SCOPES)
@pytest.mark.parametrize("kind", kit.KINDS)
@pytest.mark.parametrize("name", ["SGD", "AdamW foreach"])
def test_backends_agree_over_steps(name: str, kind: str, scope: str) -> None:
    auto = run("auto", name, kind, scope, torch.float32)
    foreach = run("foreach", name, kind, scope, torch.float32)
    for mine, other in zip(auto[0], foreach[0], strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5, nan_ok=True)
    torch.testing.assert_close(auto[1:], foreach[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", kit.SCOPES)
def test_backends_agree_on_low_precision(scope: str) -> None:
    auto = run("auto", "SGD", "on gradient", scope, torch.bfloat16)
    foreach = run("foreach", "SGD", "on gradient", scope, torch.bfloat16)
    torch.testing.assert_close(auto[1:], foreach[1:], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("kind", kit.KINDS)
def test_scopes_differ(kind: str) -> None:
    """If scopes were ignored, the test above would compare equal runs."""
    results = {scope: run("auto", "SGD", kind, scope, torch.float32)[3] for scope in kit.SCOPES}
    for index, one in enumerate(kit.SCOPES):
        for other in kit.SCOPES[index + 1 :]:
            assert kit.differ(results[one], results[other]), (one, other)


@pytest.mark.parametrize("backend", ["auto", "foreach"])
def test_scope_tensor_is_each_tensor_by_itself(backend: str) -> None:
    """One GradGuide with scope="tensor" equals one GradGuide per tensor."""
    whole, parts = kit.net(), kit.net()
    one = kit.guide(whole, kit.sgd, scope="tensor", backend=backend)
    many = [
        kit.guide(torch.nn.ParameterList([p]), lambda groups: kit.sgd(groups[0]["params"]), backend=backend)
        for p in parts.parameters()
    ]
    for step in range(5):
        kit.give_gradients(whole, step)
        kit.give_gradients(parts, step)
        one.step()
        for optimizer in many:
            optimizer.step()
    kit.assert_same(kit.parameters_of(whole), kit.parameters_of(parts))
    coherences = [optimizer.metrics()["coherence"] for optimizer in many]
    assert one.metrics()["coherence"] == pytest.approx(sum(coherences) / len(coherences), rel=1e-9)


@pytest.mark.parametrize("backend", ["auto", "foreach"])
def test_scope_group_is_each_group_by_itself(backend: str) -> None:
    whole, parts = kit.net(), kit.net()
    one = kit.guide(whole, kit.sgd, scope="group", backend=backend)
    parameters = list(parts.parameters())
    many = [
        kit.guide(torch.nn.ParameterList(held), lambda groups: kit.sgd(groups[0]["params"] + groups[1]["params"]))
        for held in (parameters[:1], parameters[1:])
    ]
    for step in range(5):
        kit.give_gradients(whole, step)
        kit.give_gradients(parts, step)
        one.step()
        for optimizer in many:
            optimizer.step()
    torch.testing.assert_close(kit.parameters_of(whole), kit.parameters_of(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "foreach"])
@pytest.mark.parametrize("kind", kit.KINDS)
def test_scopes_whose_parameters_alternate_are_each_by_itself(kind: str, backend: str) -> None:
    """Passes reorder parameters by scope; sources, directions and param groups must follow that order."""

    def made(model: torch.nn.Module, scope: Any) -> GradGuide:
        # Each group has one parameter of each side.
        base = torch.optim.SGD([{"params": [p], "lr": 0.1 if p.shape[0] == 6 else 0.3} for p in model.parameters()])
        return GradGuide(base, **(kit.options(kind, model) | {"scope": scope, "backend": backend}))

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
