"""Steps on which no parameter has a gradient: nothing happens, and one warning (rows 13, 15)."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradguide import Direction, GradGuide, History, Regularizer
from tests.contract import kit

WARNING = r"no parameter has a gradient.*loss\.backward\(\)"


@pytest.mark.parametrize("kind", kit.KINDS)
@pytest.mark.parametrize("steps", [0, 2])
def test_i15_a_step_without_gradients_changes_nothing_and_warns_once(kind: str, steps: int) -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, kind)
    kit.train(model, optimizer, range(steps))
    optimizer.zero_grad()
    before = kit.snapshot(model, optimizer)
    with pytest.warns(UserWarning, match=WARNING) as found:
        optimizer.step()
    assert len(found) == 1
    assert found[0].filename == __file__, "the warning names the line that calls step()"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    kit.assert_same(kit.snapshot(model, optimizer), before)


@pytest.mark.parametrize("kind", kit.KINDS)
def test_i15_training_goes_on_after_a_step_without_gradients_as_if_it_had_not_been(kind: str) -> None:
    model, plain = kit.net(), kit.net()
    optimizer, wanted = kit.guide(model, kit.adamw, kind), kit.guide(plain, kit.adamw, kind)
    kit.train(plain, wanted, range(4))
    for step in range(4):
        kit.train(model, optimizer, [step])
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(plain))
    assert optimizer.metrics()["steps"] == wanted.metrics()["steps"] == 4


class Counting(torch.optim.SGD):
    """A base that counts its steps, with or without gradients."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return super().step(closure)


def test_i15_the_base_steps_as_it_does_alone() -> None:
    parameter = nn.Parameter(torch.ones(3))
    base = Counting([parameter], lr=0.1)
    with pytest.warns(UserWarning, match=WARNING):
        GradGuide(base, direction=Direction()).step()
    assert base.count == 1
    assert torch.equal(parameter, torch.ones(3))


def test_i15_the_loss_of_a_closure_is_returned() -> None:
    parameter = nn.Parameter(torch.ones(3))
    for options in ({}, {"regularizer": Regularizer(magnitude=0.1)}):
        optimizer = GradGuide(torch.optim.SGD([parameter], lr=0.1), **options)  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match=WARNING):
            assert optimizer.step(lambda: torch.tensor(7.0)).item() == 7.0


def test_i15_nothing_measured_is_nan_in_metrics_and_history() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = GradGuide(torch.optim.SGD([parameter], lr=0.1), direction=Direction())
    history = History()
    optimizer.record(history)
    parameter.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=WARNING):
        optimizer.step()
    metrics = optimizer.metrics()
    assert metrics["steps"] == 1
    assert metrics["skipped"] == 0
    assert all(value != value for key, value in metrics.items() if key not in ("steps", "skipped"))
    assert len(history) == 2


def test_i15_a_copy_does_not_warn_again() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = GradGuide(torch.optim.SGD([parameter], lr=0.1), direction=Direction())
    with pytest.warns(UserWarning, match=WARNING):
        optimizer.step()
    copied = copy.deepcopy(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied.step()


@pytest.mark.filterwarnings("ignore:no parameter has a gradient")
def test_i15_a_head_without_a_batch_is_as_if_its_optimizer_had_not_stepped() -> None:
    def train(both: bool) -> list[Tensor]:
        torch.manual_seed(0)
        heads = [nn.Linear(3, 1), nn.Linear(3, 2)]
        optimizers = [GradGuide(torch.optim.AdamW(head.parameters(), lr=0.1), direction=Direction()) for head in heads]
        for step, turn in enumerate([0, 0, 1, 0, 1]):
            for optimizer in optimizers:
                optimizer.zero_grad()
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            heads[turn](x).square().mean().backward()
            for index, optimizer in enumerate(optimizers):
                if both or index == turn:
                    optimizer.step()
        return [p.detach() for head in heads for p in head.parameters()]

    for found, wanted in zip(train(both=True), train(both=False), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore:no parameter has a gradient")
def test_i15_a_gan_trains_each_side_on_its_own_steps() -> None:
    """Both optimizers step after each backward pass, but only one side has gradients."""

    def train(both: bool) -> list[Tensor]:
        torch.manual_seed(0)
        makers = [nn.Linear(2, 3), nn.Linear(3, 1)]
        optimizers = [GradGuide(torch.optim.Adam(m.parameters(), lr=0.05), direction=Direction()) for m in makers]
        for step in range(6):
            turn = step % 2
            z = torch.randn(4, 2, generator=torch.Generator().manual_seed(step))
            score = makers[1](makers[0](z)).mean() * (1 if turn else -1)
            for optimizer in optimizers:
                optimizer.zero_grad()
            score.backward(inputs=list(makers[turn].parameters()))
            for index, optimizer in enumerate(optimizers):
                if both or index == turn:
                    optimizer.step()
        return [p.detach() for m in makers for p in m.parameters()]

    for found, wanted in zip(train(both=True), train(both=False), strict=True):
        assert torch.equal(found, wanted)
