"""The gradients of a step, as backward would leave them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.programs.model import Model
from tests.programs.numbers import drawn, laid_out
from tests.programs.program import GradientSpec, Step
from tests.programs.world import World

__all__ = ["put_gradients"]


def put_gradients(event: Step, world: World, model: Model) -> None:
    """The gradients of a step, as backward would leave them."""
    present = {number for _, _, number in world.present()}
    for number, parameter in enumerate(world.parameters):
        spec = event.gradients[number] if number < len(event.gradients) else None
        if number not in present or not parameter.requires_grad:
            continue
        if spec is None:
            parameter.grad = None
            continue
        values = gradient(event, spec, world, model, number)
        kept = parameter.grad
        if spec.layout == "kept" and kept is not None and kept.shape == values.shape and kept.dtype == values.dtype:
            kept.copy_(values)
        else:
            parameter.grad = laid_out(values, spec.layout)


def gradient(event: Step, spec: GradientSpec, world: World, model: Model, number: int) -> Tensor:
    """The numbers of a gradient."""
    parameter = world.parameters[number]
    shape, dtype = tuple(parameter.shape), parameter.dtype
    noise = drawn((event.seed, number), shape, spec.scale, dtype)
    match spec.kind:
        case "steady":
            fixed = drawn((world.program.seed, 99, number), shape, spec.scale, torch.float64)
            return (fixed + 0.2 * noise.double()).to(dtype)
        case "zero":
            return torch.zeros(shape, dtype=dtype)
        case "nan" | "inf":
            noise.view(-1)[0] = float(spec.kind)
            return noise
        case "against" | "along" if world.spec is not None and world.named(number):
            source = spec.source % len(world.spec.sources)
            row = model.source_row(world, source, [number], [parameter.detach()], model.covered(world)).value
            size = float(np.max(np.abs(row), initial=0.0))
            if size > 0:
                sign = 1.0 if spec.kind == "along" else -1.0
                return torch.from_numpy(sign * spec.scale * row / size).view(shape).to(dtype)
    return noise
