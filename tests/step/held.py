"""Parameters with random gradients, for tests of the plan of a step."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), (2, 2))]


def give_gradients(held: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in held:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def step(optimizer: Optimizer, held: list[nn.Parameter], seed: int) -> None:
    """Step with the random gradients of ``seed``."""
    give_gradients(held, seed)
    optimizer.step()


def named(held: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", p) for i, p in enumerate(held)]
