"""Cautious AdamW: only what agrees with the gradient is stepped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW

__all__ = ["CautiousAdamW"]

EPSILON = 1e-3  # as in the authors' implementation: the smallest mean of the mask that is divided by


class CautiousAdamW(AdamW):
    """AdamW whose update is set to zero where its sign differs from the gradient's, and scaled up for it.

    Source: arXiv 2411.16085, algorithm 2; weight decay is applied apart, as there.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        stepped = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for _, p in stepped]
        super().step()
        for (group, parameter), old in zip(stepped, before, strict=True):
            decayed = old * (1 - group["lr"] * group["weight_decay"])
            update = decayed - parameter  # what AdamW subtracts
            mask = (update * parameter.grad > 0).to(update.dtype)
            parameter.copy_(decayed - update * mask / mask.mean().clamp_min(EPSILON))
        return loss
