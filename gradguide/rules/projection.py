"""Solve the quadratic program of ``alignment.project``, which decides what is projected.

Its unknowns are the K multipliers of the sources: the dual of the projection onto the vectors without a conflict.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradguide.rules.span import divide

__all__ = ["TOLERANCE", "multipliers"]

TOLERANCE = 1e-6
"""Cosines of smaller magnitude are rounding errors of float32 rows, and do not count as conflicts."""


def multipliers(sources: Tensor, inner: Tensor, length: Tensor, rounding: float = TOLERANCE) -> Tensor:
    """Return the multipliers of the projection of x onto the cone ``{y : <y, s_k> >= 0 for all k}``.

    The projection is ``x + sum_k m_k s_k``, where m solves ``min 1/2 m' A m + b' m`` over m >= 0 with A = sources and
    b = inner (the dual program of GEM, arXiv 1706.08840, eq. 11; for K = 1 the closed form of A-GEM, arXiv 1812.00420,
    eq. 11). It is solved in units of each source's length, by Lawson and Hanson's active-set method on all scopes in
    parallel.

    Args:
        sources (Tensor): shape [S, K, K], inner products of the sources; any rank, zero sources allowed.
        inner (Tensor): shape [S, K], ``<x, s_k>``.
        length (Tensor): shape [S], ``|x|``, or the sum of the lengths of the terms of x. Products with x have an error
            of ``TOLERANCE * length`` times the length of the source.
        rounding (float): error of the cosines of sources; it is capped at ``TOLERANCE``.

    Returns:
        Tensor [S, K], at least 0, and all 0 in scopes without a conflict beyond rounding.
    """
    norms = sources.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
    cosines = divide(divide(inner, norms), length.unsqueeze(1))
    conflict = (cosines < -TOLERANCE).any(dim=1, keepdim=True)
    if sources.shape[1] == 1:
        solution = (-cosines).clamp(min=0.0)
    else:
        normalised = divide(divide(sources, norms.unsqueeze(1)), norms.unsqueeze(2)).clamp(-1.0, 1.0)
        solution = _nonnegative(normalised, cosines, min(rounding, TOLERANCE))
    return torch.where(conflict, divide(solution * length.unsqueeze(1), norms), 0.0)


def _nonnegative(a: Tensor, b: Tensor, ridge: float) -> Tensor:
    """Solve ``min 1/2 m' a m + b' m`` over m >= 0, for a [S, K, K] with a unit (or zero) diagonal and b [S, K].

    All scopes iterate together. Each round computes a trial solution on the active set. If it is positive, the most
    violated constraint joins the set. Otherwise m moves towards it until the first multiplier reaches zero and leaves
    the set.

    Multipliers of dependent sources are not unique, and those of nearly dependent ones are unbounded. The ridge bounds
    them: ``|m| <= ridge^-1/2`` times the length of x. It is as large as the errors of a. A constraint joins only if
    its violation is above the ridge times the terms of the trial. A final correction on the active set undoes the
    effect of the ridge on well-determined multipliers.

    On an accelerator the number of rounds is fixed, so the host does not synchronize.
    """
    k = b.shape[1]
    diagonal = ridge * torch.eye(k, dtype=a.dtype, device=a.device)
    m = torch.zeros_like(b)
    active = torch.zeros_like(b, dtype=torch.bool)
    for _ in range(6 * k):
        trial = _solve(a, -b, active, diagonal)
        feasible = ((trial > 0) | ~active).all(dim=1, keepdim=True)

        violation = torch.where(active, -torch.inf, -(b + (a @ trial.unsqueeze(2)).squeeze(2)))
        worst = violation.argmax(dim=1, keepdim=True)
        grows = feasible & (violation.gather(1, worst) > ridge * (1.0 + trial.sum(dim=1, keepdim=True)))

        # Fraction of the path to the trial at which each multiplier that becomes negative crosses zero.
        fraction = torch.where(active & (trial <= 0), divide(m, m - trial), torch.inf)
        way = fraction.amin(dim=1, keepdim=True).clamp(max=1.0)
        leaving = active & (trial <= 0) & (fraction <= way)
        halfway = torch.where(leaving, 0.0, m + way * (trial - m))

        m = torch.where(feasible, trial, halfway)
        joined = active | (grows & (torch.arange(k, device=a.device) == worst))
        active = torch.where(feasible, joined, active & ~leaving)
        if a.device.type == "cpu" and not bool((grows | ~feasible).any()):
            break
    rest = -(b + (a @ m.unsqueeze(2)).squeeze(2))
    return (m + _solve(a, rest, active, diagonal)).clamp(min=0.0)


def _solve(a: Tensor, right: Tensor, active: Tensor, diagonal: Tensor) -> Tensor:
    """Solve ``(a + diagonal) x = right`` on the active rows and columns: Tensor [S, K], 0 elsewhere."""
    pairs = active.unsqueeze(1) & active.unsqueeze(2)
    system = torch.where(pairs, a, 0.0) + diagonal + torch.diag_embed((~active).to(a.dtype))
    solution = torch.linalg.solve_ex(system, torch.where(active, right, 0.0).unsqueeze(2))[0].squeeze(2)
    return torch.where(active, solution, 0.0)
