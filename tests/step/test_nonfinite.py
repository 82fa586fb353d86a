"""Steps with a NaN or Inf gradient: skipped by the host or by a flag on the device, and warned of after five."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from gradguide import Alignment, Direction, GradGuide, SourceGradient
from gradguide.step import nonfinite
from tests.contract import kit


@pytest.mark.parametrize("kind", [AdamW, Adam, SGD])
def test_a_fused_base_leaves_the_step_out_itself(kind: type[AdamW], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only CUDA uses the flag. Fused bases on the CPU support it."""
    monkeypatch.setattr(nonfinite, "uses_found_inf", lambda measured, base, policy: True)
    results = []
    for skipped in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = GradGuide(kind(model.parameters(), lr=0.1, fused=True), direction=Direction())
        for step in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
            optimizer.step()
            if skipped and step == 1:
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, float("nan"))
                optimizer.step()
                assert optimizer.metrics()["skipped"] == 1
        assert not hasattr(optimizer.base, "found_inf")
        assert optimizer.metrics()["steps"] == 4
        directions = [entry["gradguide.direction"] for entry in optimizer.state_dict()["state"].values()]
        results.append([*model.parameters(), *directions])
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)


class Outer(Optimizer):
    """An optimizer around another one, with its groups, as ZeroRedundancyOptimizer."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Own(AdamW):
    """A subclass with a step that reads no flag."""

    def step(self, closure: Any = None) -> Any:
        return None


@pytest.mark.parametrize("kind", [AdamW, Adam, SGD])
def test_only_steps_of_torch_are_left_to_the_flag(kind: type[AdamW]) -> None:
    """Another base would step with NaN, whose moments undo every later update."""
    state: Any = SimpleNamespace(span=SimpleNamespace(gram=SimpleNamespace(device=torch.device("cuda"))))
    base = kind(kit.net().parameters(), lr=0.1, fused=True)
    assert nonfinite.uses_found_inf(state, base, "skip")
    for other in (Outer(base), Own(kit.net().parameters(), lr=0.1, fused=True)):
        assert all(group["fused"] for group in other.param_groups)
        assert not nonfinite.uses_found_inf(state, other, "skip")


def test_a_first_step_of_fused_sgd_is_skipped_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused SGD keeps unset memory as its momentum if it skips the step that creates it."""
    asked = nonfinite._starts_momentum
    used: list[bool] = []

    def record(state: Any, base: Optimizer) -> bool:
        used.append(asked(state, base))
        return used[-1]

    monkeypatch.setattr(nonfinite, "uses_found_inf", lambda measured, base, policy: True)  # as on CUDA
    monkeypatch.setattr(nonfinite, "_starts_momentum", record)
    model, plain = kit.net(), kit.net()
    for each, kinds in ((model, "bgbg"), (plain, "gg")):
        steps(each, GradGuide(SGD(each.parameters(), lr=0.1, momentum=0.9, fused=True)), kinds)
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(plain))
    assert used == [True, True, False, False, True, False], "once per step"


def steps(model: nn.Module, optimizer: GradGuide, kinds: str) -> list[str]:
    """Run steps with good (g) and bad (b) gradients, and return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind in kinds:
            kit.give_gradients(model, 1)
            if kind == "b":
                for index in (1, 3):
                    gradient = list(model.parameters())[index].grad
                    assert gradient is not None
                    gradient[0] = float("nan")
            optimizer.step()
    assert all(entry.category is UserWarning for entry in caught)
    return [str(entry.message) for entry in caught]


def test_five_skipped_steps_in_a_row_give_one_warning() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    assert steps(model, optimizer, "bbbbgbbbb") == []
    (message,) = steps(model, optimizer, "bbbbb")
    assert "the last 5 steps were skipped: the gradient of 0.bias and 1 more has NaN or Inf" in message
    assert len(steps(model, optimizer, "gbbbbbb")) == 1
    assert optimizer.metrics()["skipped"] == 19


def test_a_copy_continues_the_count() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    assert steps(model, optimizer, "bbbb") == []
    both = copy.deepcopy((model, optimizer))
    assert len(steps(*both, "b")) == 1


def test_a_source_that_is_not_finite_is_named_as_such() -> None:
    parameter = nn.Parameter(torch.ones(2))
    source = SourceGradient(None, fisher={"p": torch.full((2,), 3e38)}, anchor={"p": torch.full((2,), -1e5)})
    optimizer = GradGuide(
        torch.optim.SGD([parameter], lr=0.1),
        alignment=Alignment(source, weight=1.0),
        names={"p": parameter},
        direction=Direction(),
    )
    with pytest.warns(UserWarning, match="skipped: the source gradient at the present parameters has NaN or Inf"):
        for _ in range(5):
            parameter.grad = torch.ones(2)
            optimizer.step()
