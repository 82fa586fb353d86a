"""Recognise the weight that a layer had at capture, by a sample of its elements."""

from __future__ import annotations

import torch
from torch import Tensor

from gradguide.distributed.layouts import local
from gradguide.sources.base_model import ABSOLUTE, RELATIVE, elements
from gradguide.sources.structured.layers import Layer

__all__ = ["count_differences", "sample_of"]

SAMPLES = 256
"""Elements per layer. They are evenly spaced, so a change of 1% of the elements is found with a chance of 92%."""


def sample_of(layer: Layer, weight: Tensor | None = None) -> Tensor | None:
    """Return elements of the layer's weight, in its dtype: Tensor [at most SAMPLES]; None for a quantised weight.

    Args:
        weight: values to use instead of the present ones.

    For a sharded weight, every rank must call this: it needs an all-reduce of the sample.
    """
    if layer.quantised:
        return None
    weight, size = layer.weight if weight is None else weight, layer.shape[0] * layer.shape[1]
    count = min(SAMPLES, size)
    positions = [index * (size - 1) // max(count - 1, 1) for index in range(count)]
    return torch.tensor(elements(weight, positions), dtype=local(weight).dtype)


def count_differences(stored: Tensor, now: Tensor) -> int:
    """Return how many elements of two samples differ by more than the rounding between their dtypes."""
    if stored.shape != now.shape:
        return max(len(stored), len(now))
    if {stored.dtype, now.dtype} == {torch.float16, torch.bfloat16}:  # neither is rounded from the other
        return int((~torch.isclose(stored.double(), now.double(), RELATIVE, ABSOLUTE)).sum())
    coarse = max(stored.dtype, now.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return int((stored.to(coarse) != now.to(coarse)).sum())
