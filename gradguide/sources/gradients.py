"""The gradient of one batch, without touching the gradients that the parameters hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradguide.sharding import layout_of, local

__all__ = ["Found", "plain_gradients", "sharded_gradients"]

Loss = Callable[[nn.Module, Any], Tensor]


class Found(NamedTuple):
    """Number of examples, their mean loss in nats, and the mean gradient for each parameter (of a shard: its part)."""

    examples: int
    loss: float
    gradients: list[Tensor]


def plain_gradients(loss: Loss, model: nn.Module, batch: Any, parameters: list[Tensor], index: int) -> Found:
    """Of this process's batch.

    Raises:
        ValueError: the loss is no scalar, has no gradient, or something is not finite.
        TypeError: the batch's examples cannot be counted.
    """
    count = _examples(batch)
    value = _checked(loss(model, batch), index)
    # autograd.grad, not backward: the gradients that the parameters hold stay as they are.
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    finite = torch.stack([g.isfinite().all() for g in gradients]).all()
    _check_finite(float(value.detach()), bool(finite), index)
    return Found(count, float(value.detach()), gradients)


def sharded_gradients(loss: Loss, model: nn.Module, batch: Any, parameters: list[Tensor], index: int) -> Found:
    """Of the batches of all ranks together, for models whose parameters are sharded by FSDP2.

    FSDP2 gathers parameters and scatters gradients in hooks of ``backward``, and averages over ranks: so the loss is
    weighted by the batch's size before, and the average undone after.
    """
    count = _examples(batch)
    value = _checked(loss(model, batch), index)
    mesh = next(layout.mesh for p in parameters if (layout := layout_of(p)) is not None)
    groups = mesh.get_all_groups()
    held = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        (value * count).backward()
        gradients = [torch.zeros_like(local(p)) if p.grad is None else local(p.grad).detach() for p in parameters]
    finally:
        for p, gradient in zip(parameters, held, strict=True):
            p.grad = gradient
    gradients = [
        g * mesh.size() if layout_of(p) is not None else _summed(g.clone(), groups)
        for p, g in zip(parameters, gradients, strict=True)
    ]
    wrong = sum(int(not bool(g.isfinite().all())) for g in gradients)
    told = [count, count * float(value.detach()), wrong]
    numbers = torch.tensor(told, dtype=torch.float64, device=gradients[0].device)
    examples, total, bad = _summed(numbers, groups).tolist()
    _check_finite(total / examples, bad == 0, index)
    return Found(round(examples), total / examples, [g / examples for g in gradients])


def _summed(tensor: Tensor, groups: Sequence[Any]) -> Tensor:
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor


def _checked(value: object, index: int) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar tensor, found {found} on batch {index}")
    if not value.requires_grad:
        raise ValueError(f"the loss of batch {index} has no gradient: it was detached, or made under no_grad")
    return value.reshape(())


def _check_finite(loss: float, finite: bool, index: int) -> None:
    if not math.isfinite(loss) or not finite:
        raise ValueError(
            f"batch {index} has a loss of {loss} and gradients that are {'' if finite else 'not '}finite; "
            "nothing was captured"
        )


def _examples(batch: Any) -> int:
    """Number of examples: the first dimension of the first tensor found."""
    if isinstance(batch, Tensor) and batch.dim() > 0:
        return batch.shape[0]
    if isinstance(batch, Mapping):
        return _first(batch.values(), batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return _first(batch, batch)
    raise TypeError(f"a batch must be a tensor, or a mapping or sequence of tensors, found {type(batch).__name__}")


def _first(items: Iterable[object], batch: object) -> int:
    for item in items:
        if isinstance(item, Tensor) and item.dim() > 0:
            return item.shape[0]
    raise TypeError(
        f"a batch must hold a tensor whose first dimension counts examples, found {type(batch).__name__} without"
    )
