"""Reject gradients that cannot be guided, and copy those that cannot be written in place."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from gradguide.distributed.layouts import local

__all__ = ["check_gradient", "with_memory"]


def check_gradient(parameter: Tensor, gradient: Tensor, name: str | None) -> None:
    """Raise if the gradient cannot be guided, or the parameter cannot be written.

    Raises:
        RuntimeError: the gradient is a fake tensor.
        ValueError: the gradient is complex, sparse or of integers, or the parameter is a lazily negated view.
    """
    which = f"of {name} " if name else ""
    if gradient.is_complex():
        raise ValueError(f"the gradient {which}is complex ({gradient.dtype}); GradGuide guides real parameters")
    if gradient.layout != torch.strided:
        raise ValueError(
            f"the gradient {which}is sparse ({gradient.layout}), which has no running direction; use "
            "nn.Embedding(..., sparse=False), or give this parameter to a separate optimizer"
        )
    if not gradient.is_floating_point():
        raise ValueError(f"the gradient {which}is of {gradient.dtype}; GradGuide guides floating-point gradients")
    if parameter.is_neg():
        raise ValueError(
            f"the parameter {name or f'of shape {tuple(parameter.shape)}'} is a lazily negated view of another tensor; "
            "give it memory of its own: parameter.data = parameter.data.resolve_neg()"
        )
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # if nothing imported this module, no tensor is fake
    if fake is not None and isinstance(gradient, fake.FakeTensor):
        raise RuntimeError(
            f"the gradient {which}is a fake tensor, which has no values; under FakeTensorMode, step the base optimizer "
            "alone"
        )


def with_memory(parameter: Tensor, gradient: Tensor, part: Tensor) -> Tensor:
    """Return this rank's part of a gradient so that it can be written in place. A copy is stored in ``parameter.grad``.

    It is a copy if the gradient is a lazily zero tensor, which has no memory; a lazily negated one, whose memory has
    the opposite values; or an expanded one, whose elements share memory.
    """
    if not (torch._is_zerotensor(part) or part.is_neg() or _overlaps(part)):
        return part
    parameter.grad = gradient.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    return local(parameter.grad)


def _overlaps(tensor: Tensor) -> bool:
    """Return whether two elements may share memory."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += stride * (size - 1)
    return False
