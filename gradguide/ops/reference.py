"""The reference: tests compare every backend with these plain loops in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradguide.ops.row import Row, Write, scopes_of

__all__ = ["combine_", "gram"]


@torch.no_grad()
def gram(rows: Sequence[Row | None]) -> Tensor:
    """Return the Gram matrices of the rows over the scopes of one bucket, summed in float64.

    Args:
        rows: R rows over the same tensors; ``None`` is a row of zeros.

    Returns:
        Tensor [S, R, R], float64, on the rows' device.
    """
    device = next(row for row in rows if row is not None).tensors[0].device
    scopes = scopes_of(rows)
    result = torch.zeros(len(scopes), len(rows), len(rows), dtype=torch.float64, device=device)
    for scope, tensors in enumerate(scopes):
        for index in tensors:
            for a, first in enumerate(rows):
                for b, second in enumerate(rows):
                    if first is not None and second is not None:
                        product = first.value(index, torch.float64) * second.value(index, torch.float64)
                        result[scope, a, b] += product.sum()
    return result


@torch.no_grad()
def combine_(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Write linear combinations of the rows, all computed from the values before any write.

    Args:
        rows: R rows over the same tensors; ``None`` is a row of zeros.
        writes: targets and coefficients; each ``into`` may be the memory of a row.
    """
    results: list[list[Tensor]] = []
    for write in writes:
        tensors: list[Tensor] = []
        for coefficients, scope in zip(write.coefficients.tolist(), scopes_of(rows), strict=True):
            for index in scope:
                target = write.into[index].detach()
                total = target.reshape(-1).to(torch.float64) * (1.0 if write.accumulate else 0.0)
                for coefficient, row in zip(coefficients, rows, strict=True):
                    if row is not None and coefficient != 0.0:
                        total = total + coefficient * row.value(index, torch.float64)
                tensors.append(total.view(target.shape))
        results.append(tensors)
    for write, tensors in zip(writes, results, strict=True):
        for target, value in zip(write.into, tensors, strict=True):
            target.detach().copy_(value)
