"""Guide optimizers with 8-bit state: bitsandbytes, and torchao, which compiles its step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradguide import Direction, GradGuide
from tests.contract import kit

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = ("AdamW8bit", "PagedAdamW8bit", pytest.param("torchao", marks=pytest.mark.slow))


def net() -> nn.Sequential:
    """Return a model large enough for quantised state: tensors under 4,096 elements are not quantised."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))


def made(kind: str, model: nn.Module) -> Any:
    if kind == "torchao":
        return pytest.importorskip("torchao.optim").AdamW8bit(model.parameters(), lr=1e-2)
    return getattr(pytest.importorskip("bitsandbytes").optim, kind)(model.parameters(), lr=1e-2)


def in_8_bits(state: dict[str, Any]) -> bool:
    if "exp_avg" in state:
        return type(state["exp_avg"]).__name__ == "OptimState8bit"
    return bool(state["state1"].dtype == torch.uint8)


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


@pytest.mark.parametrize("kind", KINDS)
def test_rules_off_is_bitwise_the_8_bit_base(kind: str) -> None:
    model, plain = net(), net()
    optimizer = GradGuide(made(kind, model), direction=None, magnitude=None)
    train(model, optimizer, range(4))
    train(plain, made(kind, plain), range(4))
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_guided_8_bit_learns_and_resumes(kind: str, tmp_path: Path) -> None:
    model = net()
    optimizer = GradGuide(made(kind, model), direction=Direction())
    losses = train(model, optimizer, range(20))
    assert losses[-1] < 0.7 * losses[0]
    assert in_8_bits(optimizer.base.state[next(model.parameters())])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other_model = copy.deepcopy(model)
    other = GradGuide(made(kind, other_model), direction=Direction())
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert other.metrics()["steps"] == 20
    train(model, optimizer, range(20, 24))
    train(other_model, other, range(20, 24))
    kit.assert_same(kit.parameters_of(other_model), kit.parameters_of(model))
