"""The base's momentum as the running direction."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from gradguide import Direction, GradGuide, Magnitude
from tests.conformance.bases import BASES, SHARING
from tests.contract import kit

SHARED = Direction(share_momentum=True)

KNOWN = {"SGD momentum", "Adam", "AdamW loop", "AdamW foreach", "AdamW fused", "NAdam", "RAdam", "Adamax"}

over_sharing = pytest.mark.parametrize("name", SHARING)


def momentum_of(optimizer: GradGuide, key: str) -> Tensor:
    return torch.cat([optimizer.state[p][key].flatten() for g in optimizer.param_groups for p in g["params"]])


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@over_sharing
def test_direction_is_the_bases_momentum(name: str) -> None:
    make, key = SHARING[name]
    model = kit.net()
    optimizer = kit.guide(model, make, direction=SHARED)
    for step in range(6):
        kit.give_gradients(model, step)
        received = gradient_of(model)
        cosine = float("nan")
        if step:
            cosine = torch.cosine_similarity(momentum_of(optimizer, key), received, dim=0).item()
        optimizer.step()
        metrics = optimizer.metrics()
        if step:
            assert metrics["direction_cosine"] == pytest.approx(cosine, abs=1e-5)
        # Momentum after the step, divided by its length if all gradients had one direction.
        assert 0.0 < metrics["coherence"] <= 1.0
        if step == 0:
            assert metrics["coherence"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["coherence"] < 0.99


@over_sharing
def test_coherence_is_momentum_over_its_greatest_length(name: str) -> None:
    """Compute R = |m| / sum of the weights times the norms, from the norms that the base received."""
    make, key = SHARING[name]
    model = kit.net()
    optimizer = kit.guide(model, make, direction=SHARED, magnitude=Magnitude(max_norm=0.7, max_update=None))
    group = optimizer.param_groups[0]
    mass = 0.0
    for step in range(6):
        kit.give_gradients(model, step, scale=0.2)
        optimizer.step()
        given = gradient_of(model).norm().item()
        if key == "momentum_buffer":
            decay, gain = group["momentum"], 1.0 if step == 0 else 1.0 - group["dampening"]
        else:
            decay, gain = group["betas"][0], 1.0 - group["betas"][0]
        mass = decay * mass + gain * given
        expected = momentum_of(optimizer, key).norm().item() / mass
        assert optimizer.metrics()["coherence"] == pytest.approx(expected, rel=1e-4)


@over_sharing
def test_a_scope_whose_first_gradient_comes_later_starts_then(name: str) -> None:
    """SGD starts the momentum of a parameter with its full first gradient, independent of other parameters."""
    make, _ = SHARING[name]
    held, alone = ([nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    together = GradGuide(make(held), scope="tensor", direction=SHARED, magnitude=None)
    apart = [GradGuide(make([p]), direction=SHARED, magnitude=None) for p in alone]
    for step in range(4):
        for place, (one, other) in enumerate(zip(held, alone, strict=True)):
            generator = torch.Generator().manual_seed(10 * step + place)
            gradient = torch.randn(3, generator=generator) + 1.0
            one.grad, other.grad = (None, None) if place == 1 and step == 0 else (gradient.clone(), gradient.clone())
        for optimizer in (together, *apart[: 1 if step == 0 else 2]):
            optimizer.step()
    torch.testing.assert_close(held, alone)
    coherences = [optimizer.metrics()["coherence"] for optimizer in apart]
    assert together.metrics()["coherence"] == pytest.approx(sum(coherences) / 2, rel=1e-6)


def test_the_rates_are_those_of_a_scopes_first_parameter_whatever_its_precision() -> None:
    """Passes are ordered by precision; a parameter of another scope must not change the first one of a scope."""
    found = []
    for there in (True, False):
        dtypes = (torch.bfloat16, torch.float32, torch.bfloat16)
        other, *own = (nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in dtypes)
        groups = [{"params": [p], "momentum": m} for p, m in zip((other, *own), (0.9, 0.5, 0.99), strict=True)]
        scope = {other: "other", own[0]: "own", own[1]: "own"}
        optimizer = GradGuide(SGD(groups, lr=0.1), direction=SHARED, magnitude=None, scope=scope)
        for step in range(3):
            for parameter in own:
                parameter.grad = torch.full_like(parameter, 1.0 + step)
            other.grad = torch.ones_like(other) if there else None
            optimizer.step()
        found.append(optimizer.state_dict()["state"][1]["gradguide.counters"])
    assert torch.equal(*found)


@over_sharing
def test_no_memory_per_parameter(name: str) -> None:
    make, _ = SHARING[name]
    model, plain = kit.net(), kit.net()
    optimizer = kit.guide(model, make, direction=SHARED, magnitude=Magnitude(max_update=None))
    parameters = list(plain.parameters())
    bare = make([{"params": parameters[:1]}, {"params": parameters[1:]}])
    kit.train(model, optimizer, range(3))
    kit.train(plain, bare, range(3))
    assert kit.directions_of(optimizer) == {}
    for index, entry in optimizer.state_dict()["state"].items():
        added = set(entry) - set(bare.state_dict()["state"][index])
        assert added == {"gradguide.counters"}
        assert entry["gradguide.counters"].numel() < 10
    # No other reachable state has a tensor of a parameter's shape.
    shapes = {p.shape for p in model.parameters()}
    held = [t for t in tensors(vars(optimizer), skip=optimizer.base) if t.shape in shapes and t.dim() == 2]
    mine = {id(p) for p in model.parameters()}
    assert [t for t in held if id(t) not in mine] == []


def tensors(value: Any, skip: object, seen: set[int] | None = None) -> list[Tensor]:
    """Return all tensors reachable from a value, but not through ``skip``."""
    seen = set() if seen is None else seen
    if id(value) in seen or value is skip or isinstance(value, ModuleType):
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        children = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set)):
        children = list(value)
    else:
        slots = [getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)]
        children = [*vars(value).values(), *slots] if hasattr(value, "__dict__") else slots
    return [found for child in children for found in tensors(child, skip, seen)]


def test_the_search_for_memory_finds_a_direction() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd)
    kit.train(model, optimizer, range(1))
    mine = {id(p) for p in model.parameters()} | {id(p.grad) for p in model.parameters()}
    held = [t for t in tensors(vars(optimizer), skip=optimizer.base) if t.shape == (6, 4) and id(t) not in mine]
    assert held


@over_sharing
def test_state_dict_round_trip_continues_bitwise(name: str) -> None:
    make, _ = SHARING[name]
    model, twin = kit.net(), kit.net()
    optimizer, other = (kit.guide(m, make, direction=SHARED) for m in (model, twin))
    kit.train(model, optimizer, range(4))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kit.train(model, optimizer, range(4, 8))
    kit.train(twin, other, range(4, 8))
    kit.assert_same(kit.snapshot(twin, other), kit.snapshot(model, optimizer))
    assert optimizer.metrics()["coherence"] < 1.0


@over_sharing
def test_damping_acts_on_the_gradient(name: str) -> None:
    make, _ = SHARING[name]
    model = kit.net()
    optimizer = kit.guide(model, make, direction=SHARED, magnitude=None)
    for step in range(6):
        kit.give_gradients(model, step)
        optimizer.step()
    metrics = optimizer.metrics()
    assert metrics["guided_norm"] < metrics["grad_norm"]


@pytest.mark.parametrize("name", [name for name in BASES if name not in KNOWN])
def test_other_bases_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(ValueError, match=rf"share_momentum=True.*Adam.*found {name.split()[0]}.*share_momentum=False"):
        GradGuide(BASES[name](kit.net(bias=name != "Muon").parameters()), direction=SHARED)


def test_sgd_with_one_group_without_momentum_is_refused() -> None:
    groups: list[dict[str, Any]] = [
        {"params": kit.net().parameters(), "momentum": 0.9},
        {"params": kit.net().parameters()},
    ]
    base = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match="share_momentum=True"):
        GradGuide(base, direction=SHARED)
