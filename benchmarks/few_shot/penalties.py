"""Penalties on the distance from where the source was known, as gradients: no memory beyond what they need."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.few_shot.problem import Problem
from gradguide import SourceGradient

__all__ = ["EWC", "elastic", "ewc", "l2_sp"]

L2_SP = 0.1
"""alpha of L2-SP; the middle of the range that its authors search (arXiv 1802.01483, section 4.3)."""

EWC = 1000.0
"""lambda of EWC; of 30, 80, 100 and 1000 the best in the small experiments, and in the range of its literature."""


def elastic(source: SourceGradient) -> SourceGradient:
    """The pull of EWC: F as it is, where ``anchored`` brings it to scale."""
    return SourceGradient(None, fisher=source.fisher, anchor=source.anchor)


def l2_sp(problem: Problem) -> Callable[[], None]:
    """Adds ``alpha (theta - theta0)``: L2-SP, arXiv 1802.01483, eq. 2."""
    start = [(p, p.detach().clone()) for _, p in problem.adapter]

    @torch.no_grad()
    def change() -> None:
        for parameter, anchor in start:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - anchor, alpha=L2_SP)

    return change


def ewc(problem: Problem) -> Callable[[], None]:
    """Adds ``lambda sum_k F_k (theta - theta_k)``: EWC, arXiv 1612.00796, eq. 3, with the stored sources' F."""

    @torch.no_grad()
    def change() -> None:
        names = [name for name, _ in problem.adapter]
        for source in problem.sources:
            row = elastic(source).row(names, [p for _, p in problem.adapter])
            assert row.scale is not None and row.anchor is not None
            for (_, parameter), fisher, anchor in zip(problem.adapter, row.scale, row.anchor, strict=True):
                if parameter.grad is not None:
                    parameter.grad.addcmul_(fisher, parameter - anchor, value=EWC)

    return change
