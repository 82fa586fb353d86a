"""torch.compile: of the model, and of a training step around GradGuide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract import kit


@pytest.mark.parametrize("kind", ["no source", "on gradient"])
@pytest.mark.parametrize("what", ["model", "step", "whole"])
def test_compiled_is_bitwise_the_same(what: str, kind: str) -> None:
    plain, model = kit.net(), kit.net()
    one, other = kit.guide(plain, kit.adamw, kind), kit.guide(model, kit.adamw, kind)
    # The eager backend runs the traced graph without a compiler.
    compiled: Any = torch.compile(model, backend="eager") if what == "model" else model
    step = torch.compile(other.step, backend="eager") if what == "step" else other.step

    def training_step(batch: tuple[Tensor, Tensor]) -> None:
        other.zero_grad()
        kit.loss_of(compiled, batch).backward()
        step()

    run = torch.compile(training_step, backend="eager") if what == "whole" else training_step
    for number in range(4):
        run(kit.batch(number))  # outside the graph: older versions of torch do not trace a generator
    kit.train(plain, one, range(4))
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(plain))
    kit.assert_same(other.state_dict(), one.state_dict())
