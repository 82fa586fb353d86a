"""How exact the products in a Gram matrix are, by backend: what is below that is no evidence."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradguide.ops.foreach import SMALL

__all__ = ["DOTS", "EXACT", "KERNELS", "rounding"]

EXACT = 1e-12
"""Of products in float64. They are far more exact, but a combination of the rows is written in float32, where a length
of 1e-6 times that of the rows is lost."""

KERNELS = 4e-6
"""Of the kernels, which add up to 128 products in float32. The error found is at most 2e-7 for random rows, and 2e-6
for rows whose numbers are all alike, where every addition rounds the same way."""

DOTS = 2e-5
"""Of ``torch.dot`` in float32 over at most 32,768 elements. The error found is at most 3e-7 for random rows, and 7.5e-6
for rows whose numbers are all alike, where every addition rounds the same way."""


def rounding(fused: bool, device: torch.device, tensors: Iterable[Tensor], *, sharded: bool) -> float:
    """Return the largest error of a product of two rows, relative to the product of their lengths.

    Args:
        fused: whether kernels take the products.
        device: of the tensors.
        tensors: gradients and parameters.
        sharded: whether parts of the tensors are on other ranks, whose sizes may differ. All ranks get one answer.
    """
    if fused:
        return KERNELS
    if device.type == "cpu":
        narrow = (tensor for tensor in tensors if tensor.dtype != torch.float64)
        return DOTS if sharded or any(tensor.numel() > SMALL for tensor in narrow) else EXACT
    return DOTS if device.type == "mps" else EXACT
