"""Allocate contiguous memory for lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["allocate_contiguous"]

ALIGNMENT = 64
"""Alignment in bytes, as of separately allocated tensors: the rounding of sums of products depends on it."""


def allocate_contiguous(like: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return zeros in the shapes of ``like``, of their dtype or ``dtype``, in one block of memory per device."""
    keys = [(tensor.device, dtype or tensor.dtype) for tensor in like]
    starts, totals = [], dict.fromkeys(keys, 0)
    for key, tensor in zip(keys, like, strict=True):
        step = max(1, ALIGNMENT // key[1].itemsize)
        starts.append(totals[key])
        totals[key] += -(-tensor.numel() // step) * step
    memory = {key: torch.zeros(total, device=key[0], dtype=key[1]) for key, total in totals.items()}
    return [
        memory[key][start : start + tensor.numel()].view(tensor.shape)
        for key, start, tensor in zip(keys, starts, like, strict=True)
    ]
