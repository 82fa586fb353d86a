"""NaN and Inf without a scaler (row 19)."""

from __future__ import annotations

import math

import pytest
import torch

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from tests.contract import kit

BAD = [float("nan"), float("inf"), -float("inf")]


def spoil(model: torch.nn.Module, value: float, step: int = 50) -> None:
    """Set finite gradients except for one element."""
    kit.give_gradients(model, step)
    gradient = list(model.parameters())[2].grad
    assert gradient is not None
    gradient[1, 2] = value


def trained(kind: str, scope: str = "global", **extra: object) -> tuple[torch.nn.Module, GradGuide]:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, kind, scope, **extra)
    kit.train(model, optimizer, range(3))
    return model, optimizer


@pytest.mark.parametrize(
    ("value", "scope"), [(value, "global") for value in BAD] + [(BAD[0], scope) for scope in kit.SCOPES[1:]]
)
def test_i19_skip_leaves_everything_and_counts(value: float, scope: str) -> None:
    for kind in kit.KINDS if scope == "global" else ("no source", "on update"):
        model, optimizer = trained(kind, scope)
        twin, other = trained(kind, scope)
        spoil(model, value)
        before = kit.snapshot(model, optimizer)
        optimizer.step()
        after = kit.snapshot(model, optimizer)
        assert after.pop("counts") == {"steps": 3, "skipped": 1}
        del before["counts"]
        for held in (before, after):
            for entry in held["state"]["state"].values():
                entry["gradguide.counters"][2] = 0
        kit.assert_same(after, before)
        assert math.isnan(optimizer.metrics()["guided_norm"])

        kit.train(model, optimizer, range(3, 6))
        kit.train(twin, other, range(3, 6))
        kit.assert_same(kit.parameters_of(model), kit.parameters_of(twin))
        assert optimizer.metrics()["skipped"] == 1


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", kit.KINDS)
def test_i19_raise_names_the_parameter_and_changes_nothing(kind: str, value: float) -> None:
    model, optimizer = trained(kind, nonfinite="raise")
    spoil(model, value)
    before = kit.snapshot(model, optimizer)
    with pytest.raises(FloatingPointError, match=r"2\.weight has NaN or Inf"):
        optimizer.step()
    kit.assert_same(kit.snapshot(model, optimizer), before)
    kit.train(model, optimizer, range(3, 5))
    assert optimizer.metrics()["steps"] == 5


def test_i19_huge_but_finite_gradients_are_no_fault() -> None:
    """Their squares overflow float32. The step is still made, and clipped."""
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd, nonfinite="raise")
    before = kit.parameters_of(model)
    for step in range(3):
        kit.give_gradients(model, step, scale=1e30)
        optimizer.step()
    assert optimizer.metrics()["steps"] == 3
    assert all(p.isfinite().all() for p in model.parameters())
    assert kit.differ(kit.parameters_of(model), before)


@pytest.mark.parametrize("size", [2, 3000, 40000])
def test_i19_a_source_that_overflows_when_it_is_written_skips_the_step(size: int) -> None:
    """Its products may be finite in float64, in which small tensors are measured."""
    parameter = torch.nn.Parameter(torch.ones(size))
    far = {"p": torch.full((size,), -1e5)}
    source = SourceGradient(None, fisher={"p": torch.full((size,), 3e38)}, anchor=far)
    optimizer = GradGuide(
        torch.optim.SGD([parameter], lr=0.1), alignment=Alignment(source, weight=1.0), names={"p": parameter},
        magnitude=Magnitude(max_update=None), direction=Direction()
    )  # fmt: skip
    parameter.grad = torch.ones(size)
    optimizer.step()
    assert optimizer.metrics()["skipped"] == 1
    assert torch.equal(parameter.detach(), torch.ones(size))
    assert torch.equal(parameter.grad, torch.ones(size))


def test_i19_nothing_is_checked_with_every_rule_off() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd, direction=None, magnitude=None)
    spoil(model, float("nan"))
    optimizer.step()
    assert list(model.parameters())[2].isnan().sum() == 1


def test_i19_skipped_step_returns_the_loss_of_its_closure() -> None:
    model, optimizer = trained("no source")

    def closure() -> float:
        spoil(model, float("nan"))
        return 3.5

    assert optimizer.step(closure) == 3.5
    assert optimizer.metrics()["skipped"] == 1
