"""Small float64 problems whose per-example gradients are known in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradguide import SourceGradient

Example = tuple[Tensor, Tensor]
Table = dict[str, Tensor]


def softmax_problem(count: int, features: int = 3, classes: int = 3, seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return a linear classifier in float64, inputs [count, features] and labels [count]."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(features, classes, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(count, features, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (count,), generator=generator)
    return model, x, y


def cross_entropy(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return the mean loss of a batch (x, y)."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean of the squared outputs of a batch, a loss without targets."""
    value: Tensor = model(batch).square().mean()
    return value


def per_example(model: nn.Linear, x: Tensor, y: Tensor) -> Table:
    """Return per-example gradients of cross entropy in closed form: (p - onehot(y)) times x, shape [count, ...]."""
    with torch.no_grad():
        scores = x @ model.weight.T + model.bias
        residual = scores.softmax(dim=1) - F.one_hot(y, scores.shape[1])
        return {"weight": residual[:, :, None] * x[:, None, :], "bias": residual}


def split(x: Tensor, y: Tensor, sizes: Sequence[int]) -> list[Example]:
    """Split data into batches (x, y) of the given sizes, in order."""
    assert sum(sizes) == x.shape[0]
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def answer(source: SourceGradient, at: Table | None = None) -> Table:
    """Return the source gradient in float64 at ``at`` (default: zeros, which is relevant only with curvature)."""
    names = source.names()
    points = [torch.zeros(source.shapes()[n], dtype=torch.float64) if at is None else at[n].detach() for n in names]
    row = source.row(names, points)
    return {n: row.value(i, torch.float64).reshape(points[i].shape).clone() for i, n in enumerate(names)}


def fisher(source: SourceGradient, model: nn.Module) -> Table:
    """Return F, and check that a unit step along every parameter changes the source gradient by F."""
    here = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    names = source.names()
    row = source.row(names, [here[name] for name in names])
    assert row.scale is not None
    table = {name: scale.double() for name, scale in zip(names, row.scale, strict=True)}
    there = answer(source, {name: value + 1.0 for name, value in here.items()})
    for name, value in answer(source, here).items():
        torch.testing.assert_close(there[name] - value, table[name], rtol=1e-6, atol=1e-6)
    return table


def close(found: Table, wanted: Table, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    """Assert equal names in equal order, and close values."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=rtol, atol=atol)


def frozen_body(seed: int) -> nn.Sequential:
    """Return three frozen layers whose sizes are not divisible by two ranks, and a trained head."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 9), nn.Linear(9, 3), nn.Linear(3, 1))
    model[:3].requires_grad_(False)
    return model
