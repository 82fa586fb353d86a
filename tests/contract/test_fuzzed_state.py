"""State dicts with random damage: refused with nothing changed, or as the base alone takes them (row 21)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gradguide import Direction, GradGuide
from gradguide.checkpoint.entries import DIRECTION
from tests.conformance.bases import BASES
from tests.contract import kit
from tests.contract.shaped import SHAPED
from tests.contract.states import State, set_to, without_own

nan, inf = float("nan"), float("inf")

# Random replacements of values in the fuzz test.
THINGS: list[Callable[[random.Random, Any], Any]] = [
    lambda r, v: None,
    lambda r, v: "text",
    lambda r, v: r.choice([0, -1, 1.5, nan, inf, True]),
    lambda r, v: [v],
    lambda r, v: {"value": v},
    lambda r, v: torch.full_like(v, r.choice([nan, inf, -inf, -1.0, 0.0])) if isinstance(v, Tensor) else nan,
    lambda r, v: v.reshape(-1)[: r.randint(0, 3)] if isinstance(v, Tensor) else torch.ones(3),
    lambda r, v: v.unsqueeze(0) if isinstance(v, Tensor) else torch.ones(()),
    lambda r, v: (
        v.to(r.choice([torch.float64, torch.bfloat16, torch.int32, torch.complex64, torch.bool]))
        if isinstance(v, Tensor)
        else v
    ),
    lambda r, v: v.to("meta") if isinstance(v, Tensor) else v,
    lambda r, v: v.to_sparse() if isinstance(v, Tensor) and v.dim() else v,
    lambda r, v: (
        set_to(r.randrange(max(v.numel(), 1)), r.choice([nan, -1.0, 1e30, 0.5]))(v)
        if isinstance(v, Tensor) and v.numel()
        else v
    ),
]


def mutate(state: State, chance: random.Random) -> State:
    """Return a copy with one or two random changes: a value, a key, an entry, a group."""
    state = copy.deepcopy(state)
    for _ in range(chance.choice([1, 1, 2])):
        entries = [entry for entry in state["state"].values() if isinstance(entry, dict) and entry]
        entry = chance.choice(entries)
        key = chance.choice(list(entry))
        group = chance.choice(state["param_groups"])
        what = chance.randrange(10)
        if what < 5:
            entry[key] = chance.choice(THINGS)(chance, entry[key])
        elif what == 5:
            del entry[key]
        elif what == 6:
            entry[chance.choice(["gradguide.new", "other", 3, "exp_avg", DIRECTION])] = entry[key]
        elif what == 7:
            place = chance.choice(list(state["state"]))
            state["state"][chance.choice([place, 7, "x"])] = chance.choice(
                [{}, None, 3, entry, state["state"].pop(place)]
            )
        elif what == 8:
            option = chance.choice(list(group))
            group[option] = chance.choice([None, [], [0, 0, 0], "abc", group[option], 0.5])
        elif isinstance(group["params"], list):
            chance.shuffle(group["params"])
        if not any(isinstance(entry, dict) and entry for entry in state["state"].values()):
            break
    return state


def fails(action: Callable[[], object]) -> bool:
    try:
        action()
    except Exception:
        return True
    return False


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("base", ["AdamW", "SGD momentum", "factored"])
def test_i21_any_damage_is_refused_with_nothing_changed_or_does_what_it_does_to_the_base(base: str) -> None:
    make: kit.MakeBase = (BASES | SHAPED).get(base, kit.adamw)
    chance = random.Random(0)
    refused = loaded = 0
    model, plain = kit.net(), kit.net()
    optimizer = GradGuide(make(list(model.parameters())), direction=Direction())
    kit.train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    kit.train(model, optimizer, range(3, 5))
    for _ in range(200):
        state = mutate(saved, chance)
        given = copy.deepcopy(state)
        before = kit.snapshot(model, optimizer)
        try:
            optimizer.load_state_dict(state)
        except ValueError:
            refused += 1
            kit.assert_same(kit.snapshot(model, optimizer), before)
            continue
        except Exception as error:
            # Accept the errors that the base alone gives for its state.
            assert fails(partial(make(list(plain.parameters())).load_state_dict, without_own(given))), error
            kit.assert_same(kit.snapshot(model, optimizer), before)
            continue
        loaded += 1
        alone: Any = make(list(plain.parameters()))
        alone.load_state_dict(without_own(given))
        for held in (model, plain):
            held.load_state_dict(weights)
            kit.give_gradients(held, 0)
        if fails(alone.step):
            fails(optimizer.step)
        else:
            optimizer.step()
            assert optimizer.metrics()["skipped"] == 0
            if all(p.isfinite().all() for p in plain.parameters()):
                assert all(p.isfinite().all() for p in model.parameters())
        optimizer.load_state_dict(saved)
        kit.assert_same(optimizer.state_dict(), saved)
    assert refused > 50
    assert loaded > 20
