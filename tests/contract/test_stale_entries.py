"""Own entries that a base loaded and carried on with: they are stale, and never taken for present ones (row 3)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from gradguide import Direction, GradGuide
from gradguide.checkpoint import entries
from gradguide.checkpoint.entries import COUNTERS, DIRECTION
from tests.conformance.bases import BASES
from tests.contract import kit


@pytest.mark.parametrize("base", ["Adam", "SGD"])
def test_i03_a_base_that_loaded_the_state_itself_is_named_and_its_stale_entries_are_not_saved(base: str) -> None:
    model, twin = kit.net().bfloat16(), kit.net().bfloat16()
    optimizer = GradGuide(BASES[base](list(model.parameters())), direction=Direction())
    kit.train(model, optimizer, range(3))
    inner = BASES[base](list(twin.parameters()))
    inner.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="loaded the state dict of a GradGuide.*call load_state_dict on the GradGuide"):
        wrapped = GradGuide(inner, direction=Direction())
    assert not any(map(entries.own_names, wrapped.state_dict()["state"].values()))
    for _, parameter in list(twin.named_parameters())[:1]:  # the others have no gradient, and so no direction
        parameter.grad = torch.ones_like(parameter)
    wrapped.step()
    saved = wrapped.state_dict()["state"].values()
    assert sum(DIRECTION in entry for entry in saved) == 1
    assert all(entry[COUNTERS].dtype == torch.float64 and entry[COUNTERS][1] == 1 for entry in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_i03_a_state_of_a_base_that_went_on_alone_is_that_of_a_plain_base(dtype: torch.dtype) -> None:
    """It has the direction and the counts of the steps before, which were taken for the present ones."""
    model = kit.net(dtype=dtype)
    optimizer = GradGuide(kit.adamw(model.parameters()), direction=Direction())
    kit.train(model, optimizer, range(3))
    inner = kit.adamw(model.parameters())
    inner.load_state_dict(optimizer.state_dict())
    kit.train(model, inner, range(3, 6))
    other = GradGuide(kit.adamw(model.parameters()), direction=Direction())
    with pytest.warns(UserWarning, match="the state of a plain base optimizer"):
        other.load_state_dict(inner.state_dict())
    assert other.metrics()["steps"] == 0
    assert not kit.directions_of(other)
    assert not any(map(entries.own_names, other.base.state.values()))
    assert [entry["step"] for entry in other.base.state.values()] == [6] * 4


@pytest.mark.parametrize("base", ["AdamW", "SGD"])
def test_i03_one_entry_that_passed_through_a_base_makes_the_whole_state_that_of_a_plain_base(base: str) -> None:
    """The base's loader leaves entries of float64 parameters as they are. SGD without momentum keeps no other state."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3).double())

    def make() -> Optimizer:
        parameters = list(model.parameters())
        return kit.adamw(parameters) if base == "AdamW" else torch.optim.SGD(parameters, lr=0.1)

    def step(optimizer: Optimizer) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    optimizer, inner, other = GradGuide(make(), direction=Direction()), make(), GradGuide(make(), direction=Direction())
    step(optimizer)
    inner.load_state_dict(optimizer.state_dict())
    step(inner)
    with pytest.warns(UserWarning, match="the state of a plain base optimizer"):
        other.load_state_dict(inner.state_dict())
    assert other.metrics()["steps"] == 0
    assert not kit.directions_of(other)


def test_i33_a_base_with_state_before_its_first_step_is_loaded_without_a_warning() -> None:
    """Adagrad has such a state. Accelerate loads each optimizer's own state dict when it prepares the optimizer."""
    model = kit.net()
    optimizer = GradGuide(torch.optim.Adagrad(model.parameters(), lr=0.1))
    optimizer.load_state_dict(optimizer.state_dict())
    inner = torch.optim.Adagrad(model.parameters(), lr=0.1)
    kit.train(model, inner, range(2))
    with pytest.warns(UserWarning, match="the state of a plain base optimizer"):
        optimizer.load_state_dict(inner.state_dict())
