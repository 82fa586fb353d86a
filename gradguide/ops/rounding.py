"""Error bounds of the products in a Gram matrix, by backend. Smaller values count as zero."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradguide.ops.cpu import SMALL
from gradguide.ops.tensors import wide_dtype

__all__ = ["DOTS", "EXACT", "KERNELS", "WRITTEN", "rounding"]

WRITTEN = 5e-7
"""Largest error of a combination when it is written in float32, relative to the sum of the lengths of its terms."""

EXACT = 1e-12
"""Bound for products in float64. They are more exact than this. But a combination of the rows is written in float32,
which loses a length of 1e-6 times that of the rows."""

KERNELS = 4e-6
"""Bound for the kernels, which sum up to 128 products in float32. The measured error is at most 2e-7 for random rows.
It is 2e-6 for rows of equal elements, where every addition rounds the same way."""

DOTS = 6e-5
"""Bound for ``torch.dot`` in float32 over at most 32,768 elements. The measured error is at most 3e-7 for random rows.
For rows of equal elements, where every addition rounds the same way, it is 7.5e-6 on an Intel Xeon and 2.7e-5 on an AMD
EPYC, whose kernel has fewer partial sums."""


def rounding(fused: bool, device: torch.device, tensors: Iterable[Tensor], *, sharded: bool) -> float:
    """Return the maximum error of a product of two rows, relative to the product of their lengths.

    Args:
        fused: whether the kernels compute the products, else the portable backend. Another backend needs its own bound.
        device: device of the tensors.
        tensors: gradients and parameters.
        sharded: whether parts of the tensors are on other ranks, with other sizes. All ranks return the same value.
    """
    if fused:
        return KERNELS
    if device.type == "cpu":
        narrow = (tensor for tensor in tensors if tensor.dtype != torch.float64)
        return DOTS if sharded or any(tensor.numel() > SMALL for tensor in narrow) else EXACT
    return EXACT if wide_dtype(device) == torch.float64 else DOTS
