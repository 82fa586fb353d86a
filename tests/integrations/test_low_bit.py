"""Optimizers that keep their state in 8 bits, as torchao's; each compiles its step, which takes a while."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradguide import GradGuide
from tests.contract import kit

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def net() -> nn.Sequential:
    """Large enough for quantised state: torchao keeps tensors under 4,096 elements whole."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))


def adamw8bit(model: nn.Module) -> Any:
    optim = pytest.importorskip("torchao.optim")
    return optim.AdamW8bit(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 64, generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), x[:, 0].gt(0).long())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_rules_off_is_bitwise_the_8_bit_base() -> None:
    model, plain = net(), net()
    optimizer = GradGuide(adamw8bit(model), direction=None, magnitude=None)
    train(model, optimizer, range(4))
    train(plain, adamw8bit(plain), range(4))
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(plain))


def test_guided_8_bit_learns_and_resumes(tmp_path: Path) -> None:
    model = net()
    optimizer = GradGuide(adamw8bit(model))
    losses = train(model, optimizer, range(20))
    assert losses[-1] < 0.7 * losses[0]
    state = optimizer.base.state[next(model.parameters())]
    assert type(state["exp_avg"]).__name__ == "OptimState8bit"
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other_model = copy.deepcopy(model)
    other = GradGuide(adamw8bit(other_model))
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert other.metrics()["steps"] == 20
    train(model, optimizer, range(20, 24))
    train(other_model, other, range(20, 24))
    kit.assert_same(kit.parameters_of(other_model), kit.parameters_of(model))
