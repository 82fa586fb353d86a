"""Compute the gradient of one batch without changing the ``grad`` of any tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradguide.distributed.layouts import all_reduce_over, layout_of, local
from gradguide.ops.tensors import all_finite
from gradguide.sources.loss_value import Loss, check_loss
from gradguide.sources.side_effects import leaves

__all__ = ["BatchGradient", "batch_gradient"]


class BatchGradient(NamedTuple):
    """The mean gradient of a batch.

    Attributes:
        examples: number of examples; with sharded parameters, over the batches of all ranks.
        loss: mean loss, in nats.
        gradients: one per parameter, in its shape; for a sharded parameter, the local part.
        reached: whether autograd produced the gradient; if not, it is zero.
    """

    examples: int
    loss: float
    gradients: list[Tensor]
    reached: list[bool]


def batch_gradient(
    loss: Loss,
    model: nn.Module,
    batch: Any,
    parameters: Sequence[Tensor],
    trained: Sequence[Tensor],
    *,
    index: int,
    examples: Callable[[], int],
) -> BatchGradient:
    """Return the mean gradient of a batch.

    The gradient comes from ``backward``, because ``torch.autograd.grad`` neither enters reentrant checkpoints nor runs
    the hooks with which FSDP2 gathers parameters. FSDP2 averages over ranks. Under FSDP2, the loss is therefore
    multiplied by the batch size first, and the average is undone afterwards.

    Args:
        loss: ``loss(model, batch)``, a mean, or a mean and the number of examples in it.
        model: first argument of the loss.
        batch: second argument of the loss.
        parameters: parameters to differentiate with respect to.
        trained: all parameters that require a gradient. Their ``grad`` is the same after the call as before. FSDP2
            replaces them in the model between forward and backward, so they cannot be read from the model here.
        index: number of the batch, for messages.
        examples: returns the number of examples in the batch. It is not called if the loss returns it.

    Raises:
        ValueError: the loss is not a scalar, has no gradient, or loss or gradients are not finite. A count is below 1.
            The model is divided by tensor parallelism.
        TypeError: the examples cannot be counted.
    """
    value, given = check_loss(loss(model, batch), index)
    count = examples() if given is None else given
    mesh = next((layout.mesh for p in parameters if (layout := layout_of(p)) is not None), None)
    reachable = leaves(value)
    # FSDP2 computes with whole parameters, so these leaves are of tensor parallelism.
    if any(layout_of(tensor) is not None for tensor in (value, *reachable)):
        raise ValueError(
            "capture under tensor parallelism is not supported: each batch would count once per rank. Capture in one "
            "process, or with DDP or FSDP2; the file serves split layers too"
        )
    with _without_gradients([*trained, *reachable]):
        (value if mesh is None else value * count).backward()
        found = [p.grad for p in parameters]
    gradients = [_dense(p, g) for p, g in zip(parameters, found, strict=True)]
    own = BatchGradient(count, float(value.detach()), gradients, [g is not None for g in found])
    if mesh is not None:
        return _mean_over_ranks(own, parameters, mesh.get_all_groups(), _divisor(model, mesh.size()), index)
    _check_finite(own.loss, bool(all_finite(gradients)), index)
    return own


@contextmanager
def _without_gradients(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Set ``grad`` to None inside, and restore the same tensors, without the copies of ``preserve_gradients``.

    Captures run in ``undisturbed``, where no backward pass overwrites them.
    """
    held = {tensor: tensor.grad for tensor in tensors if tensor.requires_grad}
    try:
        for tensor in held:
            tensor.grad = None
        yield
    finally:
        for tensor, gradient in held.items():
            tensor.grad = gradient


def _dense(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros_like(local(parameter), requires_grad=False)
    gradient = local(gradient).detach()
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _mean_over_ranks(
    own: BatchGradient, parameters: Sequence[Tensor], groups: Sequence[Any], divisor: float, index: int
) -> BatchGradient:
    """Return the mean over the batches of all ranks. Gradients of sharded parameters are sums over ``divisor``."""
    sums = [
        g * divisor if layout_of(p) is not None else all_reduce_over(g.clone(), groups)
        for p, g in zip(parameters, own.gradients, strict=True)
    ]
    wrong = sum(int(not bool(g.isfinite().all())) for g in sums)
    numbers = torch.tensor(
        [own.examples, own.examples * own.loss, wrong, *own.reached], dtype=torch.float64, device=sums[0].device
    )
    examples, total, bad, *times = all_reduce_over(numbers, groups).tolist()
    _check_finite(total / examples, bad == 0, index)
    mean = [g / examples for g in sums]
    return BatchGradient(round(examples), total / examples, mean, [some > 0 for some in times])


def _divisor(model: Any, ranks: int) -> float:
    """Return the number by which FSDP2 divides the sum of gradients: ``ranks``, unless it was set for the model.

    Raises:
        ValueError: modules have different ones.
    """
    from torch.distributed.fsdp import FSDPModule

    found = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            held = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # the name before torch 2.13
            found |= {float(getattr(group, "gradient_divide_factor", None) or ranks) for group in held if group}
    if len(found) > 1:
        raise ValueError(
            f"FSDP2 divides gradients by {sorted(found)}: capture needs one set_gradient_divide_factor for all modules"
        )
    return found.pop() if found else float(ranks)


def _check_finite(loss: float, finite: bool, index: int) -> None:
    if not math.isfinite(loss) or not finite:
        raise ValueError(
            f"batch {index} has a loss of {loss} and gradients that are {'' if finite else 'not '}finite; "
            "nothing was captured"
        )
