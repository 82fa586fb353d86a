"""Coordinates in the span of a step's rows, where every product is a form in their Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Span"]


@dataclass(frozen=True, slots=True)
class Span:
    """The span of R rows, in S scopes at once.

    Args:
        gram (Tensor): shape [S, R, R], positive semidefinite, the inner products of the rows.
    """

    gram: Tensor

    def row(self, index: int) -> Tensor:
        """Coordinates of row ``index``: Tensor [S, R]."""
        coordinates = self.gram.new_zeros(self.gram.shape[:2])
        coordinates[:, index] = 1.0
        return coordinates

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner product of the vectors with coordinates ``a`` and ``b`` [S, R]: Tensor [S]."""
        return (a.unsqueeze(1) @ self.gram @ b.unsqueeze(2)).squeeze(2).squeeze(1)

    def norm(self, a: Tensor) -> Tensor:
        """Length of the vector with coordinates ``a`` [S, R]: Tensor [S]; rounding below zero counts as zero."""
        return self.inner(a, a).clamp(min=0.0).sqrt()

    def cosine(self, a: Tensor, b: Tensor) -> Tensor:
        """Cosine of the angle between two vectors [S, R], in [-1, 1], and 0 where one of them is zero: Tensor [S]."""
        return divide(self.inner(a, b), self.norm(a) * self.norm(b)).clamp(-1.0, 1.0)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 where ``b`` is 0: a vector of no length is evidence of nothing."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)
