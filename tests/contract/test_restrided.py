"""Parameters and gradients whose memory, shape, strides, dtype or type change between steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from gradguide import Direction, GradGuide, Magnitude
from tests.contract.backends import BACKENDS, BACKENDS_AT_LENGTH
from tests.contract.test_memory import Wrapped

Base = Callable[[list[nn.Parameter]], Optimizer]

BASES: dict[str, Base] = {
    "SGD": lambda held: SGD(held, lr=0.1),
    "AdamW": lambda held: AdamW(held, lr=0.05),
}

# Torch's own fused step on a CPU goes by address, and is wrong where strides differ from those of its state.
FUSED: Base = partial(AdamW, lr=0.05, fused=True)

MAGNITUDE = Magnitude(max_norm=0.5, max_update=0.05)


class Retyped(nn.Parameter):
    """A subclass that changes nothing."""


def other_strides(values: Tensor) -> Tensor:
    """The same values, column by column in memory."""
    return torch.empty_strided(values.shape, (1, values.shape[0]), dtype=values.dtype).copy_(values)


ALIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed in place": lambda v: v.t(),
    "with other strides": other_strides,
    "in other memory": torch.clone,
    "a view of a larger tensor": lambda v: torch.cat([v, v])[3:6],
}
"""Changes of the data of a square parameter."""

UNLIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda v: v.t(),
    "reshaped": lambda v: v.view(4, 3),
    "shorter, at the same address": lambda v: v[:2],
    "longer": lambda v: torch.cat([v, v]),
    "in float64": torch.Tensor.double,
    "in bfloat16": torch.Tensor.bfloat16,
}
"""Changes of the data of a parameter of shape (3, 4)."""


def held(shape: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in (shape, (5,))]


def gradients(parameters: list[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters]


def give(parameters: list[nn.Parameter], seed: int, *, kept: bool = False) -> None:
    """Give new gradients, in the tensors that there are if ``kept``."""
    for parameter, gradient in zip(parameters, gradients(parameters, seed), strict=True):
        if kept:
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
        else:
            parameter.grad = gradient


def fresh_of(optimizer: GradGuide, parameters: list[nn.Parameter], base: Base) -> tuple[list[nn.Parameter], GradGuide]:
    """A new portable GradGuide over plain copies of the parameters, with the state that still fits them."""
    copies = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    for index, parameter in enumerate(copies):
        entry = state["state"].get(index, {})
        if entry["gradguide.direction"].shape != parameter.shape:
            del entry["gradguide.direction"]
    other = GradGuide(base(copies), magnitude=MAGNITUDE, backend="foreach", direction=Direction())
    other.load_state_dict(state)
    return copies, other


def check(
    optimizer: GradGuide, parameters: list[nn.Parameter], base: Base, *, kept: bool = False, rtol: float = 1e-5
) -> None:
    """Two more steps are those of the fresh one."""
    copies, other = fresh_of(optimizer, parameters, base)
    for seed in (2, 3):
        give(parameters, seed, kept=kept)
        give(copies, seed)
        optimizer.step()
        other.step()
        torch.testing.assert_close([*parameters], [*copies], rtol=rtol, atol=rtol)
        found, wanted = (each._engine.directions for each in (optimizer, other))
        torch.testing.assert_close([found[p] for p in parameters], [wanted[p] for p in copies], rtol=rtol, atol=rtol)


def started(parameters: list[nn.Parameter], base: Base, backend: str) -> GradGuide:
    """Return a GradGuide after two steps, the second of which reused the plan of the first."""
    optimizer = GradGuide(base(parameters), magnitude=MAGNITUDE, backend=backend, direction=Direction())
    for seed in (0, 1):
        give(parameters, seed)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("change", ALIKE)
def test_i30_data_of_the_same_shape_elsewhere_or_otherwise_laid_out(
    change: str, base: str, kept: bool, backend: str
) -> None:
    parameters = held((3, 3))
    optimizer = started(parameters, BASES[base], backend)
    parameters[0].data = ALIKE[change](parameters[0].data)
    check(optimizer, parameters, BASES[base], kept=kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", ["in other memory", "a view of a larger tensor"])
def test_i30_data_elsewhere_under_a_fused_base(change: str, backend: str) -> None:
    parameters = held((3, 3))
    optimizer = started(parameters, FUSED, backend)
    parameters[0].data = ALIKE[change](parameters[0].data)
    check(optimizer, parameters, FUSED)


@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
@pytest.mark.parametrize("change", UNLIKE)
def test_i30_data_of_another_shape_or_precision(change: str, backend: str) -> None:
    parameters = held((3, 4))
    optimizer = started(parameters, BASES["SGD"], backend)
    parameters[0].grad = None
    parameters[0].data = UNLIKE[change](parameters[0].data)
    check(optimizer, parameters, BASES["SGD"], rtol=1e-2 if change == "in bfloat16" else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_i30_a_square_parameter_transposed_in_place(backend: str) -> None:
    """Of the same address, shape and dtype. The bound holds for what it is now."""
    parameter = nn.Parameter(torch.arange(9.0).view(3, 3))
    optimizer = GradGuide(SGD([parameter], lr=0.1), backend=backend, direction=Direction())
    for _ in range(2):
        parameter.grad = torch.ones(3, 3)
        optimizer.step()
        parameter.data = parameter.data.t()
        before = parameter.detach().clone()
    parameter.grad = torch.ones(3, 3)
    optimizer.step()
    assert float((parameter.detach() - before).norm()) <= 0.05 * float(before.norm()) * (1 + 1e-6)
    torch.testing.assert_close(parameter.detach() - before, torch.full((3, 3), -0.1 / 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_i30_a_parameter_that_shrinks_at_its_address(backend: str) -> None:
    whole = torch.ones(4, 3)
    parameter = nn.Parameter(whole)
    optimizer = GradGuide(SGD([parameter], lr=0.1), backend=backend, direction=Direction())
    for rows in (4, 4, 2):
        parameter.grad = None
        parameter.data = whole[:rows]
        parameter.grad = torch.ones(rows, 3)
        optimizer.step()
    assert whole[2:].eq(whole[2, 0]).all()
    assert float(whole[0, 0]) < float(whole[2, 0]), "only what is left of it was stepped"


@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
def test_i30_another_exact_type(backend: str) -> None:
    parameters = held((3, 3))
    optimizer = started(parameters, BASES["SGD"], backend)
    parameters[0].__class__ = Retyped
    check(optimizer, parameters, BASES["SGD"])


@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
@pytest.mark.parametrize("base", BASES)
def test_i30_averages_that_are_swapped_in_and_out(base: str, backend: str) -> None:
    """As an evaluation with averaged weights does, with a step in between."""
    parameters = held((3, 3))
    optimizer = started(parameters, BASES[base], backend)
    own = [p.data for p in parameters]
    for p in parameters:
        p.data = other_strides(p.data) if p.dim() == 2 else p.data.clone()
    check(optimizer, parameters, BASES[base])
    for p, data in zip(parameters, own, strict=True):
        p.data = data
    check(optimizer, parameters, BASES[base])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "with other strides": other_strides,
    "a slice of columns": lambda g: torch.cat([g, g], dim=1)[:, 3:],
    "lazily negated": lambda g: torch._neg_view(-g),
}


@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_i30_gradients_that_are_laid_out_otherwise(layout: str, base: str, backend: str) -> None:
    parameters = held((3, 3))
    optimizer = started(parameters, BASES[base], backend)
    copies, other = fresh_of(optimizer, parameters, BASES[base])
    for seed in (2, 3, 4):
        give(parameters, seed)
        give(copies, seed)
        if seed < 4:  # and back
            assert parameters[0].grad is not None
            parameters[0].grad = LAYOUTS[layout](parameters[0].grad)
        optimizer.step()
        other.step()
        torch.testing.assert_close([*parameters], [*copies], rtol=1e-5, atol=1e-6)


def test_i30_from_the_meta_device_to_memory() -> None:
    parameter = nn.Parameter(torch.empty(3, 3, device="meta"))
    optimizer = GradGuide(SGD([parameter], lr=0.1), magnitude=MAGNITUDE, direction=Direction())
    parameter.grad = torch.empty(3, 3, device="meta")
    with pytest.raises(RuntimeError, match="meta device, which holds no numbers"):
        optimizer.step()
    parameter.grad = None
    torch.utils.swap_tensors(parameter, nn.Parameter(torch.ones(3, 3)))
    parameter.grad = torch.ones(3, 3)
    optimizer.step()
    assert float((parameter.detach() - 1).norm()) == pytest.approx(0.1 * 0.5)


def test_gradients_at_a_wrapper_subclass_and_a_plain_parameter_are_measured_together() -> None:
    """What takes one bucket to the portable backend leaves the other as it would be."""
    found = []
    for wrapped in (False, True):
        inner = torch.ones(6)
        first, second = nn.Parameter(Wrapped(inner) if wrapped else inner), nn.Parameter(torch.full((5,), 2.0))
        optimizer = GradGuide(SGD([first, second], lr=0.5, foreach=False), magnitude=MAGNITUDE, direction=Direction())
        for step in range(3):
            first.grad, second.grad = torch.arange(6.0) + step, torch.arange(5.0) - step
            optimizer.step()
        found.append((inner.clone(), second.detach()))
    torch.testing.assert_close(*found)
