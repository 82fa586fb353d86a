"""Small problems, GradGuides of every kind over them, and comparisons of the whole state of an optimizer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient

MakeBase = Callable[..., Optimizer]

KINDS = ("defaults", "no source", "on update", "on gradient", "two sources")
SCOPES = ("global", "group", "module", "tensor", "mapping")


def net(*, bias: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return a classifier of 4 features and 3 classes. Its values depend only on the seed."""
    model = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.to(dtype)


def batch(step: int, size: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of a step, the same on every call."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 4, generator=generator)
    return x.to(dtype), torch.randint(3, (size,), generator=generator)


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(data[0]).float(), data[1])


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    """Train on the batches of ``steps``, with new gradients for each."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(step, dtype=dtype)).backward()
        optimizer.step()


def give_gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    """Set partly correlated gradients times ``scale``, the same on every call with one step."""
    common, own = torch.Generator().manual_seed(1999), torch.Generator().manual_seed(2000 + step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=common, dtype=torch.float64)
        gradient += torch.randn(parameter.shape, generator=own, dtype=torch.float64)
        parameter.grad = (gradient * scale).to(parameter)


def source_of(model: nn.Module, *, seed: int = 7, moving: bool = True) -> SourceGradient:
    """Return a source over all parameters: random s0 and, if it moves, random F >= 0 and nearby anchors."""
    generator = torch.Generator().manual_seed(seed)

    def randn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.device)

    named = dict(model.named_parameters())
    gradient = {name: randn(p) * 0.1 for name, p in named.items()}
    if not moving:
        return SourceGradient(gradient)
    fisher = {name: randn(p).square() for name, p in named.items()}
    anchor = {name: p.detach().float() + randn(p) * 0.1 for name, p in named.items()}
    return SourceGradient(gradient, fisher=fisher, anchor=anchor)


def options(kind: str, model: nn.Module) -> dict[str, Any]:
    """Return keyword arguments of GradGuide. All kinds but "defaults" have a direction, the last three have sources."""
    named: dict[str, Any] = {"names": list(model.named_parameters())}
    if kind == "defaults":
        return named
    named["direction"] = Direction()
    if kind == "no source":
        return named
    if kind == "two sources":
        sources = [source_of(model, seed=7), source_of(model, seed=8, moving=False)]
        return named | {"alignment": Alignment(sources, on="gradient", weight=0.0)}
    on = kind.removeprefix("on ")
    return named | {
        "direction": Direction(decay=0.8, damping=0.7),
        "alignment": Alignment(source_of(model), on=on, weight=0.5),
        "magnitude": Magnitude(max_norm=2.0),
    }


def scope_of(scope: str, model: nn.Module) -> Any:
    """Return the value of ``scope``; "mapping" separates weights and biases and leaves out the last one."""
    if scope != "mapping":
        return scope
    pairs = list(model.named_parameters())[:-1]
    return {p: name.rpartition(".")[2] for name, p in pairs}


def guide(model: nn.Module, make: MakeBase, kind: str = "no source", scope: str = "global", **extra: Any) -> GradGuide:
    """Return a GradGuide over two param groups, so that scopes by group differ from the global one."""
    parameters = list(model.parameters())
    base = make([{"params": parameters[:1]}, {"params": parameters[1:]}])
    return GradGuide(base, **(options(kind, model) | {"scope": scope_of(scope, model)} | extra))


def adamw(params: Any, **extra: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=extra.pop("lr", 1e-2), **extra)


def sgd(params: Any, **extra: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=extra.pop("lr", 0.1), **extra)


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return a copy of everything that a step may change: parameters, gradients, state dict, counts."""
    held: dict[str, Any] = {
        "parameters": [p.detach() for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "state": optimizer.state_dict(),
    }
    if isinstance(optimizer, GradGuide):
        held["counts"] = {key: optimizer.metrics()[key] for key in ("steps", "skipped")}
    return copy.deepcopy(held)


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def directions_of(optimizer: GradGuide) -> dict[Any, Tensor]:
    """Return the running directions in the state dict, by position of the parameter."""
    state = optimizer.state_dict()["state"]
    return {k: entry["gradguide.direction"].clone() for k, entry in state.items() if "gradguide.direction" in entry}


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    """Assert that structure and every bit of every tensor are equal. NaN equals NaN."""
    if isinstance(wanted, Tensor):
        assert isinstance(found, Tensor), where
        assert found.dtype == wanted.dtype, f"{where}: {found.dtype} for {wanted.dtype}"
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    elif isinstance(wanted, Mapping):
        assert isinstance(found, Mapping) and set(found) == set(wanted), f"{where}: {found!r} for {wanted!r}"
        for key, value in wanted.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(wanted, (list, tuple)):
        assert isinstance(found, (list, tuple)) and len(found) == len(wanted), where
        for index, value in enumerate(wanted):
            assert_same(found[index], value, f"{where}/{index}")
    else:
        same = found == wanted or (found != found and wanted != wanted)
        assert same, f"{where}: {found!r} for {wanted!r}"


def differ(a: Any, b: Any) -> bool:
    """Return whether two snapshots differ. Tests of equality use it to check that something changed."""
    try:
        assert_same(a, b)
    except AssertionError:
        return True
    return False


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state after saving it and loading it without unpickling objects."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded
