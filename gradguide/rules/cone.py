"""The nearest vector that conflicts with no source: the dual quadratic program on a K x K matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from gradguide.rules.span import divide

__all__ = ["TOLERANCE", "multipliers"]

TOLERANCE = 1e-6
"""Cosines of a smaller size than this are rounding in rows of float32, and no conflict."""


def multipliers(sources: Tensor, inner: Tensor, length: Tensor) -> Tensor:
    """Multipliers of the projection of x onto the cone ``{y : <y, s_k> >= 0 for all k}``.

    The projection is ``x + sum_k m_k s_k`` with the smallest m >= 0 in
    ``min 1/2 m' A m + b' m``, A = sources, b = inner (the dual program of GEM, arXiv 1706.08840, eq. 11; for K = 1 the
    closed form of A-GEM, arXiv 1812.00420, eq. 11). It is solved in units of each source's length, by Lawson and
    Hanson's active-set method over all scopes at once.

    Args:
        sources (Tensor): shape [S, K, K], inner products of the sources; any rank, zero sources allowed.
        inner (Tensor): shape [S, K], ``<x, s_k>``.
        length (Tensor): shape [S], ``|x|``.

    Returns:
        Tensor [S, K], at least 0, and all 0 in scopes without a conflict beyond rounding.
    """
    norms = sources.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
    cosines = divide(divide(inner, norms), length.unsqueeze(1))
    conflict = (cosines < -TOLERANCE).any(dim=1, keepdim=True)
    if sources.shape[1] == 1:
        solution = (-cosines).clamp(min=0.0)
    else:
        normalised = divide(divide(sources, norms.unsqueeze(1)), norms.unsqueeze(2))
        solution = _nonnegative(normalised, cosines)
    return torch.where(conflict, divide(solution * length.unsqueeze(1), norms), 0.0)


def _nonnegative(a: Tensor, b: Tensor) -> Tensor:
    """``min 1/2 m' a m + b' m`` over m >= 0, for matrices a [S, K, K] with a unit (or zero) diagonal and b [S, K].

    The scopes march together, each in its own state: a trial solution on its active set either is positive, and then
    the constraint that it violates most joins the set, or it is not, and then m moves towards it until the first
    multiplier reaches zero and leaves. The ridge keeps duplicate sources solvable; it moves the solution by its own
    size. There is no read by the host on an accelerator, so there the number of rounds is fixed.
    """
    k = b.shape[1]
    eye = torch.eye(k, dtype=a.dtype, device=a.device)
    tolerance = 1e-12 if a.dtype == torch.float64 else 1e-6
    ridge = 1e-13 if a.dtype == torch.float64 else 1e-7
    m = torch.zeros_like(b)
    active = torch.zeros_like(b, dtype=torch.bool)
    for _ in range(6 * k):
        pairs = active.unsqueeze(1) & active.unsqueeze(2)
        system = torch.where(pairs, a, 0.0) + eye * torch.where(active, ridge, 1.0).unsqueeze(2)
        trial = torch.linalg.solve_ex(system, torch.where(active, -b, 0.0).unsqueeze(2))[0].squeeze(2)
        trial = torch.where(active, trial, 0.0)
        feasible = ((trial > 0) | ~active).all(dim=1, keepdim=True)

        violation = torch.where(active, -torch.inf, -(b + (a @ trial.unsqueeze(2)).squeeze(2)))
        worst = violation.argmax(dim=1, keepdim=True)
        grows = feasible & (violation.gather(1, worst) > tolerance)

        # The fraction of the way to the trial at which each multiplier that it would make negative reaches zero.
        fraction = torch.where(active & (trial <= 0), divide(m, m - trial), torch.inf)
        way = fraction.amin(dim=1, keepdim=True).clamp(max=1.0)
        leaving = active & (trial <= 0) & (fraction <= way)
        halfway = torch.where(leaving, 0.0, m + way * (trial - m))

        m = torch.where(feasible, trial, halfway)
        joined = active | (grows & (torch.arange(k, device=a.device) == worst))
        active = torch.where(feasible, joined, active & ~leaving)
        if a.device.type == "cpu" and not bool((grows | ~feasible).any()):
            break
    return m.clamp(min=0.0)
