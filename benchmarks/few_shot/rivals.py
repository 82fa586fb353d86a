"""Change the gradient before the optimizer's step, or the optimizer itself, as published methods do.

Penalties (L2-SP, EWC) need nothing but what is stored of the source. The others (A-GEM, replay, PCGrad, UPGrad) use
source data at every step: one backward pass per earlier task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from benchmarks.few_shot.data import Problem

__all__ = ["EWC", "CautiousAdamW", "Change", "a_gem", "ewc", "l2_sp", "pcgrad", "replay", "upgrad"]

Change = Callable[[], None]
"""Changes the gradients of a problem's parameters in place."""

L2_SP = 0.1
"""alpha of L2-SP: the middle of the range that its authors search (arXiv 1802.01483, section 4.3)."""

EWC = 1000.0
"""lambda of EWC: the best of 30, 80, 100 and 1000 in small experiments, and within the range of its literature."""

LEAST_MEAN = 1e-3
"""Smallest mean of the mask that the cautious update is divided by, as in the authors' implementation."""


def l2_sp(problem: Problem) -> Change:
    """Add ``alpha (theta - theta0)``: L2-SP, arXiv 1802.01483, eq. 2."""
    start = [(p, p.detach().clone()) for _, p in problem.adapter]

    @torch.no_grad()
    def change() -> None:
        for parameter, anchor in start:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - anchor, alpha=L2_SP)

    return change


def ewc(problem: Problem) -> Change:
    """Add ``lambda sum_k F_k (theta - theta_k)``: EWC, arXiv 1612.00796, eq. 3, with the F of the stored sources."""
    terms = [
        (parameter, source.fisher[name].to(parameter.device), source.anchor[name].to(parameter.device))
        for source in problem.sources
        for name, parameter in problem.adapter
    ]

    @torch.no_grad()
    def change() -> None:
        for parameter, fisher, anchor in terms:
            if parameter.grad is not None:
                parameter.grad.addcmul_(fisher, parameter - anchor, value=EWC)

    return change


def a_gem(problem: Problem) -> Change:
    """Project the gradient if it conflicts with that of a batch of all earlier tasks: arXiv 1812.00420, eq. 11."""

    def combine(g: Tensor, sources: Tensor) -> Tensor:
        reference = sources.mean(dim=0)
        inner = torch.dot(g, reference)
        return g - (inner / torch.dot(reference, reference)) * reference if inner < 0 else g

    return _combined(problem, combine)


def replay(problem: Problem) -> Change:
    """Add the gradients of the earlier tasks' batches: training on the mixture, each task with equal weight."""
    return _combined(problem, lambda g, sources: g + sources.sum(dim=0))


def pcgrad(problem: Problem) -> Change:
    """Aggregate the gradients of target and earlier tasks by TorchJD's PCGrad (arXiv 2001.06782)."""
    from torchjd.aggregation import PCGrad

    return _aggregated(problem, PCGrad())


def upgrad(problem: Problem) -> Change:
    """Aggregate the gradients of target and earlier tasks by TorchJD's UPGrad (arXiv 2406.16232), as a sum."""
    from torchjd.aggregation import UPGrad

    aggregator = UPGrad()
    return _aggregated(problem, lambda matrix: aggregator(matrix) * matrix.shape[0])  # UPGrad gives a mean


def _aggregated(problem: Problem, aggregate: Callable[[Tensor], Tensor]) -> Change:
    return _combined(problem, lambda g, sources: aggregate(torch.cat([g.unsqueeze(0), sources])))


def _combined(problem: Problem, combine: Callable[[Tensor, Tensor], Tensor]) -> Change:
    """Replace the adapter's gradient g [P] by ``combine(g, sources [K, P])``. The head's gradient stays."""
    parameters = [p for _, p in problem.adapter]

    def change() -> None:
        if not problem.source_loss:  # the first task of a sequence
            return
        sources = torch.stack([_flat(torch.autograd.grad(loss(), parameters)) for loss in problem.source_loss])
        received = _flat([p.grad for p in parameters if p.grad is not None])
        sizes = [p.numel() for p in parameters]
        for parameter, part in zip(parameters, combine(received, sources).split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    return change


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


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
            parameter.copy_(decayed - update * mask / mask.mean().clamp_min(LEAST_MEAN))
        return loss
