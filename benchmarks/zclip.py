"""ZClip: clip gradients whose norm is far above recent norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["ZClip"]


class ZClip:
    """Clip a norm whose z-score is above a threshold to ``mean + threshold^2 / z * deviation``.

    Source: arXiv 2504.02507, with its defaults. A warm-up of 25 steps gathers statistics and clips nothing.

    Args:
        parameters: their gradients count as one vector.
    """

    ALPHA = 0.97
    THRESHOLD = 2.5
    WARM_UP = 25

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._warm: list[float] = []
        self._mean = self._variance = 0.0

    def __call__(self) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if len(self._warm) < self.WARM_UP:
            self._warm.append(norm)
            self._mean = math.fsum(self._warm) / len(self._warm)
            self._variance = math.fsum((n - self._mean) ** 2 for n in self._warm) / len(self._warm)
            return
        deviation = math.sqrt(self._variance)
        score = (norm - self._mean) / (deviation + 1e-6)
        clipped = norm
        if score > self.THRESHOLD:
            clipped = self._mean + self.THRESHOLD**2 / score * deviation
            torch._foreach_mul_(gradients, clipped / (norm + 1e-6))
        self._mean = self.ALPHA * self._mean + (1 - self.ALPHA) * clipped
        self._variance = self.ALPHA * self._variance + (1 - self.ALPHA) * (clipped - self._mean) ** 2
