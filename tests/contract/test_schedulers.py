"""Every scheduler of torch works with GradGuide as with the base, without additional warnings (rows 1, 26)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler

from gradguide import Direction, GradGuide
from tests.contract import kit

Make = Callable[[Optimizer], Any]

SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def schedule(scheduler: Any, model: torch.nn.Module, optimizer: Optimizer, steps: range) -> list[Any]:
    """Return the settings of the optimizer's groups after each step."""
    seen = []
    for step in steps:
        kit.train(model, optimizer, [step])
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
        seen.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    return seen


def base_of(model: torch.nn.Module) -> Optimizer:
    return kit.sgd(model.parameters(), momentum=0.9)


def test_i01_no_scheduler_of_torch_is_left_out() -> None:
    left_out = {"LRScheduler", "SequentialLR"} - SCHEDULERS.keys()
    public = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert public - left_out <= SCHEDULERS.keys()


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch's own SequentialLR used it until 2.8
@pytest.mark.parametrize("name", SCHEDULERS)
def test_i01_scheduler_makes_the_schedule_of_the_bare_base(name: str) -> None:
    plain, wrapped = kit.net(), kit.net()
    bare, optimizer = base_of(plain), GradGuide(base_of(wrapped), direction=Direction())
    expected = schedule(SCHEDULERS[name](bare), plain, bare, range(7))
    assert any(groups != expected[0] for groups in expected), "the schedule never moves"
    assert schedule(SCHEDULERS[name](optimizer), wrapped, optimizer, range(7)) == expected
    assert optimizer.metrics()["steps"] == 7


@pytest.mark.parametrize("name", SCHEDULERS)
def test_i26_scheduler_and_step_warn_no_more_than_with_the_base(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = kit.net()
        bare = base_of(plain)
        SCHEDULERS[name](bare)
        with warnings.catch_warnings(record=True) as expected:
            warnings.simplefilter("always")
            schedule(SCHEDULERS[name](bare), plain, bare, range(3))
        model = kit.net()
        optimizer = GradGuide(base_of(model), direction=Direction())
        SCHEDULERS[name](optimizer)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            schedule(SCHEDULERS[name](optimizer), model, optimizer, range(3))
    assert [str(w.message) for w in found] == [str(w.message) for w in expected]


@pytest.mark.parametrize("kind", kit.KINDS)
def test_i26_no_warning_in_the_right_order_whatever_the_rules(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = kit.net()
        optimizer = kit.guide(model, kit.adamw, kind)
        scheduler = lr_scheduler.StepLR(optimizer, 1)
        schedule(scheduler, model, optimizer, range(3))
        scheduler = lr_scheduler.StepLR(optimizer, 1)  # a second scheduler, as for training in phases
        schedule(scheduler, model, optimizer, range(3, 6))
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("active", [True, False], ids=["guided", "rules off"])
def test_i26_scheduler_made_on_the_base_before_it_was_wrapped(active: bool) -> None:
    model = kit.net()
    base = base_of(model)
    scheduler = lr_scheduler.StepLR(base, 1, gamma=0.5)
    optimizer = GradGuide(base, direction=Direction()) if active else GradGuide(base, direction=None, magnitude=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule(scheduler, model, optimizer, range(2))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)


@pytest.mark.parametrize("active", [True, False], ids=["guided", "rules off"])
def test_i26_the_warning_of_the_wrong_order_still_comes(active: bool) -> None:
    model = kit.net()
    base = base_of(model)
    optimizer = GradGuide(base, direction=Direction()) if active else GradGuide(base, direction=None, magnitude=None)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        scheduler.step()


def test_i01_a_guided_update_scales_with_the_scheduled_rate() -> None:
    """The scheduled rate is in effect: with a tenth of the rate, an SGD step is a tenth as long."""
    lengths = []
    for factor in (1.0, 0.1):
        model = kit.net()
        optimizer = GradGuide(kit.sgd(model.parameters()), direction=Direction())
        lr_scheduler.LambdaLR(optimizer, lambda epoch, factor=factor: factor)  # type: ignore[misc]
        before = kit.parameters_of(model)
        kit.train(model, optimizer, [0])
        moved = [(a - b).norm() for a, b in zip(kit.parameters_of(model), before, strict=True)]
        lengths.append(torch.stack(moved).norm())
    torch.testing.assert_close(lengths[1], lengths[0] * 0.1, rtol=1e-4, atol=0)
