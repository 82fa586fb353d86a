"""Properties that hold for every base optimizer."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradguide import Direction, GradGuide, Magnitude
from tests.conformance.bases import BASES, net_for
from tests.contract import kit

STEPS = 6
EVERY_RULE = ("on update", "on gradient")

over_bases = pytest.mark.parametrize("name", BASES)


def bare(model: nn.Module, name: str) -> Optimizer:
    """Return the base alone, with the groups of kit.guide."""
    parameters = list(model.parameters())
    return BASES[name]([{"params": parameters[:1]}, {"params": parameters[1:]}])


def train_by_closure(model: nn.Module, optimizer: Optimizer) -> list[float]:
    losses = []
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = kit.loss_of(model, kit.batch(step))
            loss.backward()
            return loss.detach()

        found: Any = optimizer.step(closure)  # type: ignore[arg-type]
        losses.append(float(found))
    return losses


def base_of(optimizer: Optimizer) -> dict[str, Any]:
    state = optimizer.base.state_dict() if isinstance(optimizer, GradGuide) else optimizer.state_dict()
    return copy.deepcopy(state)


@pytest.mark.parametrize("closure", [False, True], ids=["step()", "step(closure)"])
@over_bases
def test_all_rules_off_is_bitwise_the_base(name: str, closure: bool) -> None:
    plain, model = net_for(name), net_for(name)
    one, other = bare(plain, name), kit.guide(model, BASES[name], direction=None, magnitude=None)
    if closure:
        assert train_by_closure(plain, one) == train_by_closure(model, other)
    else:
        kit.train(plain, one, range(STEPS))
        kit.train(model, other, range(STEPS))
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(plain))
    kit.assert_same(other.state_dict(), one.state_dict())
    assert kit.differ(kit.parameters_of(plain), kit.parameters_of(net_for(name))), "the base moves"


@pytest.mark.parametrize(("bound", "closure"), [(1e9, False), (float("inf"), True)])
@over_bases
def test_a_bound_that_is_never_met_is_bitwise_the_base(name: str, bound: float, closure: bool) -> None:
    plain, model = net_for(name), net_for(name)
    one = bare(plain, name)
    other = kit.guide(model, BASES[name], direction=None, magnitude=Magnitude(max_norm=bound, max_update=1e9))
    for optimizer, net in ((one, plain), (other, model)):
        if closure:
            train_by_closure(net, optimizer)
        else:
            kit.train(net, optimizer, range(STEPS))
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(plain))
    kit.assert_same(base_of(other), base_of(one))
    assert other.metrics()["clip_factor"] == 1.0
    assert other.metrics()["steps"] == STEPS


@over_bases
def test_only_measuring_is_bitwise_the_base(name: str) -> None:
    """Without damping and clipping, the rules only measure and do not change the steps."""
    plain, model = net_for(name), net_for(name)
    one = bare(plain, name)
    other = kit.guide(
        model, BASES[name], direction=Direction(damping=0.0), magnitude=Magnitude(max_norm=1e9, max_update=None)
    )
    kit.train(plain, one, range(STEPS))
    kit.train(model, other, range(STEPS))
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(plain))
    kit.assert_same(base_of(other), base_of(one))
    assert 0.0 < other.metrics()["coherence"] < 1.0


@pytest.mark.parametrize("kind", ["defaults", "no source", "on update", "two sources"])
@over_bases
def test_rules_stay_finite_and_within_bounds(name: str, kind: str) -> None:
    model = net_for(name)
    optimizer = kit.guide(model, BASES[name], kind)
    start = kit.parameters_of(model)
    bound = 2.0 if kind == "on update" else 1.0
    for step in range(STEPS):
        kit.give_gradients(model, step, scale=10.0)
        optimizer.step()
        given = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        metrics = optimizer.metrics()
        assert given.item() <= bound * (1 + 1e-5)
        assert given.item() == pytest.approx(metrics["guided_norm"] * metrics["clip_factor"], rel=1e-4)
        assert math.isnan(metrics["coherence"]) if kind == "defaults" else 0.0 <= metrics["coherence"] <= 1.0
        assert metrics["steps"] == step + 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert kit.differ(kit.parameters_of(model), start)


@over_bases
def test_on_update_leaves_no_conflict_whatever_the_base(name: str) -> None:
    """The product of the corrected update with the source gradient is not positive."""
    model = net_for(name)
    optimizer = kit.guide(model, BASES[name], "on update", direction=None, magnitude=None)
    source = kit.source_of(model)
    named = dict(model.named_parameters())
    for step in range(STEPS):
        before = {n: p.detach().clone() for n, p in named.items()}
        kit.give_gradients(model, step)
        row = source.row(list(named), list(before.values()))
        pull = torch.cat([row.value(index, torch.float64) for index in range(len(named))])
        optimizer.step()
        update = torch.cat([(named[n].detach() - b).double().flatten() for n, b in before.items()])
        assert update.any()
        assert float(update @ pull / (update.norm() * pull.norm())) <= 1e-5


@pytest.mark.parametrize("kind", EVERY_RULE)
@over_bases
def test_state_dict_round_trip_continues_bitwise(name: str, kind: str) -> None:
    model, twin = net_for(name), net_for(name)
    optimizer, other = kit.guide(model, BASES[name], kind), kit.guide(twin, BASES[name], kind)
    kit.train(model, optimizer, range(4))
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    kit.assert_same(other.state_dict(), optimizer.state_dict())
    kit.train(model, optimizer, range(4, 9))
    kit.train(twin, other, range(4, 9))
    kit.assert_same(kit.snapshot(twin, other), kit.snapshot(model, optimizer))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", EVERY_RULE)
@over_bases
def test_copies_continue_bitwise(name: str, kind: str, way: Callable[[Any], Any]) -> None:
    model = net_for(name)
    optimizer = kit.guide(model, BASES[name], kind)
    kit.train(model, optimizer, range(3))
    twin, other = way((model, optimizer))
    kit.train(twin, other, range(3, 6))
    kit.train(model, optimizer, range(3, 6))
    kit.assert_same(kit.snapshot(twin, other), kit.snapshot(model, optimizer))


@pytest.mark.parametrize("kind", ["no source", "on update"])
@over_bases
def test_bfloat16_parameters_keep_a_float32_direction(name: str, kind: str) -> None:
    model = net_for(name, torch.bfloat16)
    optimizer = kit.guide(model, BASES[name], kind)
    for step in range(4):
        kit.give_gradients(model, step)
        optimizer.step()
    directions = kit.directions_of(optimizer)
    assert len(directions) == len(list(model.parameters()))
    assert {d.dtype for d in directions.values()} == {torch.float32}
    assert any(not torch.equal(d, d.bfloat16().float()) for d in directions.values())
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.dtype == parameter.grad.dtype == torch.bfloat16
        assert parameter.isfinite().all()
