"""The base optimizer's own step, on copies, and comparisons bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.programs.compare import Disagreement
from tests.programs.numbers import twin
from tests.programs.world import World

__all__ = ["check_same", "check_state", "copied", "held_state", "shadow_of"]


def copied(tensor: Tensor | None) -> Tensor | None:
    """A copy with the memory layout of the tensor."""
    return None if tensor is None else twin(tensor)


def shadow_of(world: World) -> tuple[Optimizer, list[Tensor]]:
    """A copy of the base optimizer over copies of the parameters."""
    shadows: list[Tensor] = [torch.nn.Parameter(twin(p), requires_grad=p.requires_grad) for p in world.parameters]
    memo: dict[int, Any] = {id(p): s for p, s in zip(world.parameters, shadows, strict=True)}
    return copy.deepcopy(world.base, memo), shadows


def held_state(base: Optimizer, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The base's state of each parameter."""
    return [dict(base.state.get(p, {})) for p in parameters]


def check_state(base: Optimizer, parameters: Sequence[Tensor], expected: list[dict[str, Any]], *, exact: bool) -> None:
    """Raise unless the base's state is as expected."""
    for number, (found, wanted) in enumerate(zip(held_state(base, parameters), expected, strict=True)):
        if found.keys() != wanted.keys():
            raise Disagreement(f"base state of parameter {number}: {sorted(found)}, expected {sorted(wanted)}")
        for key, value in wanted.items():
            if isinstance(value, Tensor):
                near = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-2, "atol": 1e-30}
                if found[key].dtype != value.dtype or not torch.allclose(found[key], value, equal_nan=True, **near):
                    raise Disagreement(f"base state {key} of parameter {number}: {found[key]}, expected {value}")
            elif found[key] != value:
                raise Disagreement(f"base state {key} of parameter {number}: {found[key]}, expected {value}")


def check_same(what: str, expected: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> None:
    """Raise unless the tensors are the same, bit for bit."""
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a is None and b is None:
            continue
        if a is None or b is None or a.dtype != b.dtype or not torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)):
            raise Disagreement(f"{what}: number {number} is {b}, expected {a}")
