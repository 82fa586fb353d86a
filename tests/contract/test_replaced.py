"""Parameters that are replaced, resized or added after construction."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from gradguide import Alignment, Direction, GradGuide, SourceGradient
from tests.contract import kit


def anchored_at_zero() -> SourceGradient:
    return SourceGradient(None, fisher={"a": torch.ones(3)}, anchor={"a": torch.zeros(3)})


def test_i08_a_name_follows_a_place_only_when_its_parameter_is_gone() -> None:
    a, head = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = GradGuide(
        SGD([a], lr=0.1),
        direction=None,
        magnitude=None,
        alignment=Alignment(anchored_at_zero(), weight=1.0, project=False),
        names={"a": a},
    )
    optimizer.param_groups[0]["params"].insert(0, head)
    a.grad, head.grad = torch.full((3,), 1e-9), torch.full((3,), 1e-9)
    optimizer.step()
    assert torch.allclose(a, torch.full((3,), 0.9)), "pulled to its anchor"
    assert torch.allclose(head, torch.ones(3)), "the head is none of the source's parameters"
    optimizer.param_groups[0]["params"][1] = replaced = nn.Parameter(torch.ones(3))
    head.grad, replaced.grad = None, torch.full((3,), 1e-9)
    optimizer.step()
    assert torch.allclose(head, torch.ones(3))


def test_a_parameter_of_another_size_starts_a_direction_of_its_own() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = GradGuide(SGD([p], lr=0.1), direction=Direction())
    for size in (4, 1000, 2):
        p.grad = None
        p.data = torch.ones(size)
        p.grad = torch.ones(size)
        optimizer.step()
        assert bool(p.isfinite().all())
    assert optimizer.metrics()["steps"] == 3


def test_i03_the_base_alone_loads_a_state_in_which_a_parameter_never_had_a_gradient() -> None:
    model = kit.net()
    optimizer = GradGuide(AdamW(model.parameters()), direction=Direction())
    kit.give_gradients(model, 0)
    next(model.parameters()).grad = None
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    plain = AdamW(model.parameters())
    plain.load_state_dict(state)
    kit.give_gradients(model, 1)
    plain.step()
    again = GradGuide(AdamW(model.parameters()), direction=Direction())
    again.load_state_dict(state)
    assert again.metrics()["steps"] == 1


def test_a_group_without_momentum_cannot_join_where_momentum_is_the_direction() -> None:
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = GradGuide(SGD([p], lr=0.1, momentum=0.9), direction=Direction(share_momentum=True))
    with pytest.raises(ValueError, match="share_momentum=True reads the momentum"):
        optimizer.add_param_group({"params": [q], "momentum": 0.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [q]})
    assert len(optimizer.param_groups) == 2


def test_a_group_that_the_base_refuses_is_refused() -> None:
    optimizer = GradGuide(SGD([nn.Parameter(torch.zeros(3))], lr=0.1), direction=Direction())
    for bad in ([nn.Parameter(torch.zeros(1))], {"params": {nn.Parameter(torch.zeros(1))}}):
        with pytest.raises(TypeError):
            optimizer.add_param_group(bad)  # type: ignore[arg-type]
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_a_group_in_the_place_of_a_removed_one_starts_from_zero(scope: str, share: bool) -> None:
    p, q, late = (nn.Parameter(torch.ones(3)) for _ in range(3))
    rule = Direction(share_momentum=share)
    optimizer = GradGuide(AdamW([{"params": [p]}, {"params": [q]}]), direction=rule, scope=scope)
    fresh = GradGuide(AdamW([copy.deepcopy(late)]), direction=rule, scope=scope)
    (twin,) = fresh.param_groups[0]["params"]
    noise = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    for step in range(20):
        p.grad, q.grad = noise[step].clone(), noise[step].clone()
        optimizer.step()
    kept = optimizer._engine.scopes.statistics[0].clone()
    del optimizer.param_groups[1]
    optimizer.add_param_group({"params": [late]})
    p.grad = None
    for step in range(3):
        late.grad, twin.grad = noise[step].clone(), noise[step].clone()
        optimizer.step()
        fresh.step()
        assert torch.equal(optimizer._engine.scopes.statistics, torch.stack([kept, fresh._engine.scopes.statistics[0]]))
    assert torch.equal(late, twin)
    # A parameter that had no gradient for some steps keeps its statistics.
    p.grad = noise[0].clone()
    optimizer.step()
    assert bool((optimizer._engine.scopes.statistics[0] != 0).all())


@pytest.mark.parametrize("direction", [None, Direction()])
def test_replaced_parameters_are_not_kept_alive(direction: Direction | None) -> None:
    """Code that grows or prunes parameters replaces them again and again, and moves the base's state."""
    parameter = nn.Parameter(torch.ones(3))
    base = AdamW([parameter], lr=0.1)
    optimizer = GradGuide(base, direction=direction)
    gone = []
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        longer = nn.Parameter(torch.cat([parameter.detach(), torch.zeros(1)]))
        del base.state[parameter]
        base.param_groups[0]["params"][0] = longer
        gone.append(weakref.ref(parameter))
        parameter = longer
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


@pytest.mark.parametrize("alignment", [None, Alignment(SourceGradient({f"{n}": torch.ones(3) for n in range(3)}))])
def test_parameters_removed_from_model_and_optimizer_are_not_kept_alive(alignment: Alignment | None) -> None:
    model = nn.ParameterDict({f"{n}": nn.Parameter(torch.ones(3)) for n in range(3)})
    optimizer = GradGuide(AdamW(model.parameters(), lr=0.1), alignment=alignment, names=model)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step()
    gone = weakref.ref(model["2"])
    optimizer.state.pop(optimizer.param_groups[0]["params"].pop())
    del model["2"]
    step()
    gc.collect()
    assert gone() is None


def test_a_parameter_whose_state_the_base_keeps_keeps_its_direction() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = GradGuide(AdamW([{"params": [first]}, {"params": [second]}], lr=0.1), direction=Direction())
    for groups in (2, 1, 2):
        first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
        held = optimizer.param_groups[:]
        del optimizer.param_groups[groups:]
        optimizer.step()
        optimizer.param_groups[:] = held
    steps = optimizer.state_dict()["state"][1]["gradguide.direction"]
    assert torch.allclose(steps / steps.norm(), torch.full((2,), 0.5**0.5))
    assert optimizer.metrics()["coherence"] == pytest.approx(1.0, abs=0.05)
