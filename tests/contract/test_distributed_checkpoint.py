"""Effects of distributed checkpointing on an optimizer (rows 6, 7, 14)."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from gradguide import Alignment, Direction, GradGuide, History, Regularizer, ReplaySource
from tests.contract import kit


def step_on_zeros(model: torch.nn.Module, optimizer: GradGuide) -> None:
    """Make the step by which distributed checkpointing initializes an optimizer's state."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()


def own(optimizer: GradGuide) -> dict[str, torch.Tensor]:
    """Return direction and counters of every parameter, zeros for missing ones."""
    return {
        f"{index}/{key}": value.clone()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if key.startswith("gradguide.")
    }


@pytest.mark.parametrize("scope", kit.SCOPES)
@pytest.mark.parametrize("kind", kit.KINDS)
def test_i07_zero_gradient_step_leaves_direction_and_counters(kind: str, scope: str) -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, kind, scope)
    kit.train(model, optimizer, range(3))
    before, counts = own(optimizer), {k: optimizer.metrics()[k] for k in ("steps", "skipped")}
    assert len(before) == (4 if kind == "defaults" else 8)
    parameters = kit.parameters_of(model)
    step_on_zeros(model, optimizer)
    kit.assert_same(own(optimizer), before)
    assert {k: optimizer.metrics()[k] for k in counts} == counts
    kit.assert_same(kit.parameters_of(model), parameters)


@pytest.mark.parametrize("kind", kit.KINDS)
def test_i07_zero_gradient_step_allocates_and_counts_nothing(kind: str) -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, kind)
    parameters = kit.parameters_of(model)
    step_on_zeros(model, optimizer)
    assert len(optimizer.base.state) == 4
    found = own(optimizer)
    wanted = ["gradguide.counters"] if kind == "defaults" else ["gradguide.counters", "gradguide.direction"]
    assert sorted({key.partition("/")[2] for key in found}) == wanted
    assert len(found) == 4 * len(wanted)
    for key, value in found.items():
        assert not (value[1:5] if key.endswith("counters") else value).any(), key
    assert optimizer.metrics()["steps"] == 0
    assert optimizer.metrics()["skipped"] == 0
    kit.assert_same(kit.parameters_of(model), parameters)


@pytest.mark.parametrize("kind", kit.KINDS)
def test_i07_zero_gradient_step_before_training_does_not_change_the_run(kind: str) -> None:
    """SGD has no state, so the initializing step must not change the run."""
    runs = []
    for allocate in (False, True):
        model = kit.net()
        optimizer = kit.guide(model, kit.sgd, kind)
        if allocate:
            step_on_zeros(model, optimizer)
        kit.train(model, optimizer, range(5))
        runs.append({"parameters": kit.parameters_of(model), "own": own(optimizer)})
    kit.assert_same(runs[1], runs[0])


def saved_by_dcp(model: torch.nn.Module, optimizer: GradGuide) -> dict[str, Any]:
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    return copy.deepcopy(state)


@pytest.mark.parametrize("kind", kit.KINDS)
@pytest.mark.parametrize("base", [kit.adamw, kit.sgd], ids=["AdamW", "SGD"])
def test_i07_state_goes_through_distributed_checkpoint(base: kit.MakeBase, kind: str) -> None:
    model = kit.net()
    optimizer = kit.guide(model, base, kind)
    kit.train(model, optimizer, range(3))
    state = saved_by_dcp(model, optimizer)
    assert set(state["state"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}

    twin = kit.net()
    other = kit.guide(twin, base, kind)
    twin.load_state_dict(model.state_dict())
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_optimizer_state_dict(twin, other, state)
    kit.assert_same(own(other), own(optimizer))
    assert other.metrics()["steps"] == 3
    kit.train(model, optimizer, range(3, 6))
    kit.train(twin, other, range(3, 6))
    kit.assert_same(kit.snapshot(twin, other), kit.snapshot(model, optimizer))


def test_i14_direction_stays_float32_through_distributed_checkpoint() -> None:
    model, twin = kit.net(dtype=torch.bfloat16), kit.net(dtype=torch.bfloat16)
    optimizer, other = (
        GradGuide(kit.adamw(model.parameters()), direction=Direction()),
        GradGuide(kit.adamw(twin.parameters()), direction=Direction()),
    )
    kit.train(model, optimizer, range(3))
    set_optimizer_state_dict(twin, other, saved_by_dcp(model, optimizer))
    found, wanted = kit.directions_of(other), kit.directions_of(optimizer)
    assert {d.dtype for d in found.values()} == {torch.float32}
    assert any(not torch.equal(d, d.bfloat16().float()) for d in wanted.values())
    kit.assert_same(found, wanted)


def test_i07_fresh_state_goes_through_distributed_checkpoint() -> None:
    model, twin = kit.net(), kit.net()
    optimizer, other = kit.guide(model, kit.adamw), kit.guide(twin, kit.adamw)
    set_optimizer_state_dict(twin, other, saved_by_dcp(model, optimizer))
    assert other.metrics()["steps"] == 0
    kit.assert_same(kit.parameters_of(twin), kit.parameters_of(kit.net()))
    kit.assert_same(own(other), own(optimizer))


@pytest.mark.parametrize("base", [kit.adamw, kit.sgd], ids=["AdamW", "SGD"])
def test_i07_saving_and_loading_record_no_step_and_draw_no_batch(base: kit.MakeBase) -> None:
    """torch makes a step on zeros where the base has no state: of SGD without momentum at each call."""
    model, drawn, history = kit.net(), [], History()

    def loss(batch: torch.Tensor) -> torch.Tensor:
        drawn.append(batch)
        value: torch.Tensor = model(batch).square().mean()
        return value

    source = ReplaySource([torch.randn(2, 4)], loss)
    optimizer = GradGuide(base(model.parameters()), alignment=Alignment(source), names=model)
    optimizer.record(history)
    state = saved_by_dcp(model, optimizer)
    for _ in range(2):
        set_optimizer_state_dict(model, optimizer, state)
        loss(torch.randn(3, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = saved_by_dcp(model, optimizer)
    assert [row["steps"] for row in history] == [1, 2]
    assert len(drawn) == 4  # two by the loop, two by the source


@pytest.mark.parametrize("base", [kit.adamw, kit.sgd], ids=["AdamW", "SGD"])
def test_i07_a_regularizer_needs_no_closure_to_save_and_load(base: kit.MakeBase) -> None:
    model = kit.net()
    optimizer = GradGuide(base(model.parameters(), lr=0.1), regularizer=Regularizer(magnitude=0.1))
    set_optimizer_state_dict(model, optimizer, saved_by_dcp(model, optimizer))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    with pytest.raises(RuntimeError, match=r"found step\(\) without a closure"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.0  # as at the start of a warmup
    with pytest.raises(RuntimeError, match=r"found step\(\) without a closure"):
        optimizer.step()


def test_a_step_on_zeros_at_a_rate_is_recorded() -> None:
    model, history = kit.net(), History()
    optimizer = kit.guide(model, kit.sgd)
    optimizer.record(history)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert len(history) == 1
