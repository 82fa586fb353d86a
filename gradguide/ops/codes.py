"""Rows in 8 bits: integers from -127 to 127, and a float32 scale for every 128 of them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GROUP", "decode", "encode"]

GROUP = 128
"""Elements that share a scale, counted from the tensor's first: 1 + 4 / 128 bytes per element."""


def encode(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales: Tensor int8 in the tensor's shape, and Tensor float32 [ceil(n / 128)].

    Rounded to the nearest of 255 values, the largest of which is the group's largest magnitude: the error of an element
    is at most 1/254 of that.
    """
    flat = tensor.detach().reshape(-1).float()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    scales = padded.abs().amax(dim=1) / 127.0
    codes = (padded / torch.where(scales > 0, scales, 1.0).unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return codes.view(-1)[: len(flat)].view(tensor.shape), scales


def decode(codes: Tensor, scales: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Elements ``start:stop`` in flat order: Tensor float32, 1-D."""
    flat = codes.reshape(-1)[start:stop]
    first, last = start // GROUP, (start + max(len(flat), 1) - 1) // GROUP + 1
    wide = scales[first:last].repeat_interleave(GROUP)
    offset = start - first * GROUP
    return flat.float() * wide[offset : offset + len(flat)]
