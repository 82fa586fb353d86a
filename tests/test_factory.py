"""guided() as an optimizer class, and unwrap() inside other wrappers."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

import gradguide
from gradguide import Direction, GradGuide, History, Magnitude, guided, unwrap


def guide() -> GradGuide:
    return GradGuide(SGD(nn.Linear(2, 1).parameters(), lr=0.1), direction=Direction())


class Wrapper:
    def __init__(self, inner: object, attribute: str = "optimizer") -> None:
        setattr(self, attribute, inner)


class Forwarding(Wrapper):
    """Forwards all attributes of the wrapped object, as some wrappers do."""

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["optimizer"], name)


class Slotted:
    __slots__ = ("optimizer",)

    def __init__(self, inner: object) -> None:
        self.optimizer = inner


def test_guided_builds_base_and_guide() -> None:
    direction, magnitude = Direction(decay=0.5), Magnitude(max_norm=3.0)
    make = guided(AdamW, direction=direction, magnitude=magnitude, nonfinite="raise")
    model = nn.Linear(2, 1)
    optimizer = make(model.parameters(), lr=0.25, weight_decay=0.125)
    assert isinstance(optimizer, GradGuide)
    assert type(optimizer.base) is AdamW
    assert optimizer.defaults["lr"] == 0.25
    assert optimizer.param_groups[0]["weight_decay"] == 0.125
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert str(direction) in repr(optimizer)
    assert str(magnitude) in repr(optimizer)
    model.weight.grad = torch.full((1, 2), torch.nan)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    # Two instances share no state.
    assert make(nn.Linear(2, 1).parameters(), lr=1.0).base is not optimizer.base


def test_guided_steps_as_the_wrapper_does() -> None:
    models = [nn.Linear(3, 1), nn.Linear(3, 1)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        guided(SGD, direction=None, magnitude=Magnitude(max_norm=0.5))(models[0].parameters(), lr=0.1),
        GradGuide(SGD(models[1].parameters(), lr=0.1), direction=None, magnitude=Magnitude(max_norm=0.5)),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_guided_looks_like_a_class() -> None:
    make = guided(AdamW)
    assert callable(make)
    assert make.__name__ == "GuidedAdamW"
    assert "AdamW" in repr(make)

    def factory(params: object, lr: float = 0.5) -> Optimizer:
        return SGD(params, lr=lr)  # type: ignore[arg-type]

    assert guided(factory)(nn.Linear(1, 1).parameters()).defaults["lr"] == 0.5


OPTIONS: list[dict[str, Any]] = [
    {},
    {"direction": Direction(decay=0.5), "nonfinite": "raise"},
    {"direction": None, "magnitude": Magnitude(max_norm=3.0)},
]


class Own(guided(AdamW, nonfinite="raise")):  # type: ignore[misc]
    """A usual subclass, pickled by its own name."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("base", [AdamW, SGD, Adagrad])
def test_a_guided_class_is_a_class_and_the_same_for_equal_options(base: Any, options: dict[str, Any]) -> None:
    made: Any = guided(base, **options)
    assert isinstance(made, type)
    assert issubclass(made, GradGuide)
    assert issubclass(made, Optimizer)
    assert guided(base, **dict(reversed(copy.deepcopy(options).items()))) is made
    assert guided(base, nonfinite="skip", scope="tensor") is not made
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(made, protocol)) is made
    assert copy.deepcopy(made) is made
    assert inspect.signature(made) == inspect.signature(base)


def test_a_guided_class_can_be_unpickled_in_another_process() -> None:
    pickled = pickle.dumps(guided(AdamW, magnitude=Magnitude(max_norm=3.0)))
    code = (
        "import pickle, sys; from gradguide import Magnitude, guided; from torch.optim import AdamW; "
        "assert pickle.loads(sys.stdin.buffer.read()) is guided(AdamW, magnitude=Magnitude(max_norm=3.0))"
    )
    root = Path(gradguide.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], input=pickled, env=environment, timeout=120, check=True)


def test_a_guided_class_whose_options_have_no_hash_is_made_anew() -> None:
    model = nn.Linear(2, 1)
    scope = dict.fromkeys(model.parameters(), "all")
    made: Any = guided(SGD, scope=scope)
    assert guided(SGD, scope=scope) is not made
    assert made(model.parameters(), lr=0.1).defaults["lr"] == 0.1


@pytest.mark.parametrize("arguments", [((1e-3,), {}), ((1e-3, 0.9), {"weight_decay": 0.1}), ((), {"lr": 1e-3})])
def test_arguments_are_those_of_the_base_by_position_and_by_name(arguments: tuple[Any, dict[str, Any]]) -> None:
    positional, named = arguments
    model = nn.Linear(2, 1)
    made: Any = guided(SGD)
    assert (
        made(model.parameters(), *positional, **named).defaults
        == SGD(model.parameters(), *positional, **named).defaults
    )
    assert made(params=model.parameters(), lr=0.5).defaults["lr"] == 0.5
    with pytest.raises(TypeError, match="rate"):
        made(model.parameters(), rate=0.5)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", [guided(AdamW, direction=Direction(decay=0.5)), Own], ids=["guided", "subclass"])
def test_instances_are_of_the_class_and_copies_go_on_as_they_would(kind: Any, way: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer: GradGuide = kind(model.parameters())
    assert type(optimizer) is kind
    found = unwrap(optimizer)
    assert found is optimizer

    def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        model(torch.full((4, 3), float(seed))).square().sum().backward()
        optimizer.step()

    step(model, optimizer, 1)
    twin, other = way((model, optimizer))
    assert type(other) is kind
    step(model, optimizer, 2)
    step(twin, other, 2)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert other.metrics()["steps"] == 2


def test_a_subclass_of_a_guided_class_has_its_own_name_and_signature() -> None:
    assert pickle.loads(pickle.dumps(Own)) is Own
    assert list(inspect.signature(Own).parameters) == ["params"]
    assert Own(nn.Linear(2, 1).parameters()).defaults["lr"] == 0.5


def test_guided_with_wrong_options() -> None:
    with pytest.raises(TypeError, match=r"takes an optimizer class, found SGD; wrap an instance with GradGuide"):
        guided(SGD(nn.Linear(1, 1).parameters(), lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="colour"):
        guided(SGD, colour="red")(nn.Linear(1, 1).parameters(), lr=0.1)


def test_unwrap_itself_and_nothing() -> None:
    optimizer = guide()
    assert unwrap(optimizer) is optimizer
    assert unwrap(optimizer.base) is None
    assert unwrap(None) is None
    assert unwrap(object()) is None
    assert unwrap("optimizer") is None
    assert unwrap(Slotted(3)) is None


@pytest.mark.parametrize("attribute", ["optimizer", "_optimizer"])
@pytest.mark.parametrize("depth", [1, 2, 10])
def test_unwrap_nested(attribute: str, depth: int) -> None:
    optimizer = guide()
    wrapped: object = optimizer
    plain: object = optimizer.base
    for _ in range(depth):
        wrapped, plain = Wrapper(wrapped, attribute), Wrapper(plain, attribute)
    assert unwrap(wrapped) is optimizer
    assert unwrap(plain) is None
    assert unwrap(Forwarding(wrapped)) is optimizer
    assert unwrap(Wrapper(None, attribute)) is None


def test_unwrap_cycles_end() -> None:
    first = Wrapper(None)
    second = Wrapper(first, "_optimizer")
    first.optimizer = second  # type: ignore[attr-defined]
    assert unwrap(first) is None
    alone = Wrapper(None)
    alone.optimizer = alone  # type: ignore[attr-defined]
    assert unwrap(alone) is None


def test_unwrap_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(2, 1)
    optimizer = GradGuide(SGD(model.parameters(), lr=0.1), direction=Direction())
    prepared_model, prepared = accelerator.prepare(model, optimizer)
    assert type(prepared).__name__ == "AcceleratedOptimizer"
    assert unwrap(prepared) is optimizer
    assert unwrap(Wrapper(prepared, "_optimizer")) is optimizer
    assert unwrap(accelerator.prepare_optimizer(SGD(nn.Linear(1, 1).parameters(), lr=0.1))) is None
    history = History()
    optimizer.record(history)
    accelerator.backward(prepared_model(torch.ones(1, 2)).sum())
    prepared.step()
    assert [row["steps"] for row in history] == [1.0]
