"""A step does not depend on torch's default dtype, which training loops may set to bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gradguide import Alignment, Direction, Magnitude, Regularizer, SourceGradient
from tests.contract import kit


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def outcome(dtype: torch.dtype, on: str, scope: str) -> tuple[object, ...]:
    model = kit.net()
    source = kit.source_of(model)
    with default(dtype):
        optimizer = kit.guide(
            model, kit.adamw, scope=scope, names=model.named_parameters(),
            direction=Direction(decay=0.9, damping=0.7),
            alignment=Alignment([source, source.anchored()], on=on, weight=0.3, project=True),
            magnitude=Magnitude(max_norm=0.3, max_update=1e-3),
        )  # fmt: skip
    metrics = []
    for step in range(5):
        kit.give_gradients(model, step, scale=3.0)
        with default(dtype):
            optimizer.step()
            metrics.append(optimizer.metrics())
    return kit.parameters_of(model), metrics, kit.directions_of(optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("on", ["gradient", "update"])
def test_steps_are_the_same(on: str, scope: str, dtype: torch.dtype) -> None:
    kit.assert_same(outcome(dtype, on, scope), outcome(torch.float32, on, scope))


def after_closures(dtype: torch.dtype) -> list[torch.Tensor]:
    model = kit.net()
    regularizer = Regularizer(direction=0.3, alignment=0.3, source=kit.source_of(model))
    optimizer = kit.guide(model, kit.sgd, regularizer=regularizer)
    for step in range(4):
        x, y = kit.batch(step)

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = kit.loss_of(model, (x, y))
            loss.backward()
            return loss

        with default(dtype):
            optimizer.step(closure)
    return kit.parameters_of(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_steps_by_the_exact_objective_are_the_same(dtype: torch.dtype) -> None:
    kit.assert_same(after_closures(dtype), after_closures(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sources_are_the_same(dtype: torch.dtype) -> None:
    def found(dtype: torch.dtype) -> str:
        model, batches = kit.net(), [kit.batch(step) for step in range(3)]
        with default(dtype):
            source = SourceGradient.capture(model, batches, kit.loss_of)
            merged = SourceGradient.merge([source, source], [0.3, 0.7])
        return source.fingerprint() + source.anchored().fingerprint() + merged.fingerprint()

    assert found(dtype) == found(torch.float32)
