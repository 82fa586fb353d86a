"""Gradients whose numbers cannot be written in place: given memory of their own, or refused."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

__all__ = ["check_numbers", "with_memory"]


def check_numbers(parameter: Tensor, gradient: Tensor, name: str | None) -> None:
    """Raise where there are no numbers to read, or no numbers that can be written.

    Raises:
        RuntimeError: the gradient is a fake tensor.
        ValueError: the parameter is a lazily negated view.
    """
    if parameter.is_neg():
        raise ValueError(
            f"the parameter {name or f'of shape {tuple(parameter.shape)}'} is a lazily negated view of other numbers; "
            "make it one of its own: parameter.data = parameter.data.resolve_neg()"
        )
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # not imported for this: without it nothing is fake
    if fake is not None and isinstance(gradient, fake.FakeTensor):
        raise RuntimeError(
            f"the gradient {f'of {name} ' if name else ''}is a fake tensor, which holds no numbers to measure; under "
            "FakeTensorMode, step the base optimizer alone"
        )


def with_memory(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient that can be written in place, which is then the parameter's.

    A lazily zero tensor has no memory, a lazily negated one that of other numbers, and the elements of an expanded one
    share theirs. They are replaced by a copy.
    """
    if torch._is_zerotensor(gradient) or gradient.is_neg() or _overlaps(gradient):
        gradient = gradient.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
        parameter.grad = gradient
    return gradient


def _overlaps(tensor: Tensor) -> bool:
    """Return whether two elements may share memory."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += stride * (size - 1)
    return False
