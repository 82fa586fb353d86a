"""State that does not fit: an error gives the reason, and nothing is changed (row 21)."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gradguide import Direction, GradGuide
from tests.contract import kit

State = dict[str, Any]


def trained(model: nn.Module, **extra: Any) -> GradGuide:
    optimizer = GradGuide(kit.adamw(model.named_parameters()), **({"direction": Direction()} | extra))
    kit.train(model, optimizer, range(2))
    return optimizer


def state_over(parameters: list[nn.Parameter], groups: int = 1) -> State:
    """Return the state of a GradGuide over these parameters after a step."""
    split = [{"params": parameters}] if groups == 1 else [{"params": [p]} for p in parameters]
    optimizer = GradGuide(kit.adamw(split), direction=Direction())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape)) for shape in shapes]


def newer(state: State) -> State:
    state = copy.deepcopy(state)
    for entry in state["state"].values():
        entry["gradguide.counters"][0] += 1
    return state


def own_state() -> State:
    return copy.deepcopy(trained(kit.net()).state_dict())


def without_own(state: State) -> State:
    """Return only the base's state, as after a run with a plain AdamW."""
    state = copy.deepcopy(state)
    for entry in state["state"].values():
        for key in [key for key in entry if key.startswith("gradguide.")]:
            del entry[key]
    return state


# Each: function that makes the state, and pattern of the message.
MISFITS: dict[str, tuple[Callable[[], State], list[str]]] = {
    "more groups": (lambda: state_over(parameters((6, 4), (6,), (3, 6), (3,)), groups=4), ["4", "1", "groups"]),
    "fewer parameters": (lambda: state_over(parameters((6, 4), (6,))), ["group 0", "2 ", "4 ", "frozen|adapter"]),
    "other rank": (
        lambda: state_over(parameters((8, 4), (8,), (3, 8), (3,))),
        [r"\(8, 4\)", r"\(6, 4\)", r"0\.weight", "rank|another model"],
    ),
    "other order": (
        lambda: state_over(parameters((3,), (3, 6), (6,), (6, 4))),
        [r"\(3,\)", r"\(6, 4\)", "order"],
    ),
    "other rank, plain base": (
        lambda: without_own(state_over(parameters((8, 4), (8,), (3, 8), (3,)))),
        [r"\(8, 4\)", r"\(6, 4\)", "rank|another model"],
    ),
    "newer format": (lambda: newer(own_state()), ["format 4", "up to 3", "upgrade"]),
    "no state dict": (lambda: {"model": {}}, ["not the state dict of an optimizer"]),
    "state of another kind": (lambda: {"state": [], "param_groups": 3}, ["not the state dict of an optimizer"]),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_i21_misfit_is_explained_and_changes_nothing(misfit: str) -> None:
    make, said = MISFITS[misfit]
    model = kit.net()
    optimizer = trained(model)
    state = make()
    before = kit.snapshot(model, optimizer)
    with pytest.raises(ValueError) as caught:
        optimizer.load_state_dict(state)
    for pattern in said:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} not in {caught.value}"
    kit.assert_same(kit.snapshot(model, optimizer), before)

    twin = kit.net()
    other = trained(twin)
    kit.train(model, optimizer, range(2, 4))
    kit.train(twin, other, range(2, 4))
    kit.assert_same(kit.snapshot(model, optimizer), kit.snapshot(twin, other))


def test_i21_misfit_in_the_bases_own_tensors_is_seen_without_a_direction() -> None:
    """With share_momentum there is no direction to compare, but a momentum of another shape must be found."""
    shared = Direction(share_momentum=True)
    other_model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    state = copy.deepcopy(trained(other_model, direction=shared).state_dict())
    model = kit.net()
    optimizer = trained(model, direction=shared)
    before = kit.snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"\(8, 4\).*\(6, 4\)"):
        optimizer.load_state_dict(state)
    kit.assert_same(kit.snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    "counters",
    [torch.zeros(0), torch.ones(3), torch.ones(9), torch.ones(2, 8), torch.full((5,), math.nan), "eight", None, 1.0],
    ids=["empty", "short", "long", "matrix", "nan", "text", "none", "number"],
)
def test_i21_damaged_counters_are_refused(counters: object) -> None:
    model = kit.net()
    optimizer = trained(model)
    state = own_state()
    state["state"][1]["gradguide.counters"] = counters
    before = kit.snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"gradguide\.counters"):
        optimizer.load_state_dict(state)
    kit.assert_same(kit.snapshot(model, optimizer), before)


@pytest.mark.parametrize("direction", ["text", None, 3], ids=str)
def test_i21_damaged_direction_is_refused(direction: object) -> None:
    model = kit.net()
    optimizer = trained(model)
    state = own_state()
    state["state"][2]["gradguide.direction"] = direction
    before = kit.snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"direction of parameter 2\.weight"):
        optimizer.load_state_dict(state)
    kit.assert_same(kit.snapshot(model, optimizer), before)


def test_i21_groups_keep_their_options_when_a_load_fails() -> None:
    model = kit.net()
    optimizer = trained(model)
    state = newer(own_state())
    state["param_groups"][0]["lr"] = 123.0
    with pytest.raises(ValueError, match="format"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_i21_load_hooks_see_and_replace_the_state() -> None:
    """Torch's load hooks work as on any optimizer. If a hook replaces the state, the new one is loaded."""
    model = kit.net()
    optimizer = trained(model)
    state = own_state()
    other = trained(kit.net(seed=3))
    seen: list[str] = []

    def replace(opt: Any, given: State) -> State:
        assert opt is other
        assert given == {}
        seen.append("pre")
        return state

    other.register_load_state_dict_pre_hook(replace)
    other.register_load_state_dict_post_hook(lambda opt: seen.append("post"))
    other.load_state_dict({})
    assert seen == ["pre", "post"]
    kit.assert_same(other.state_dict(), optimizer.state_dict())
