"""Coordinates in the span of a step's rows, where every product is a form in their Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ROUNDING", "Extent", "Span", "divide"]

ROUNDING = 4e-6
"""Largest error of a product of two rows, relative to the product of their lengths.

Backends multiply in float32 and add up to 128 products before they change to float64. The error found is at most 2e-7
for random rows, and 2e-6 for rows whose numbers are all alike, where every addition rounds the same way.
"""


class Extent(NamedTuple):
    """A combination of rows and its length, over S scopes.

    vector (Tensor): coordinates [S, R]; zeros where the rows cancel to rounding.
    norm (Tensor): shape [S], the length; 0 where the rows cancel to rounding.
    ceiling (Tensor): shape [S], at least the true length; 0 where the rows cancel to rounding.
    """

    vector: Tensor
    norm: Tensor
    ceiling: Tensor


@dataclass(frozen=True)
class Span:
    """The span of R rows, in S scopes at once.

    Args:
        gram (Tensor): shape [S, R, R], positive semidefinite, the inner products of the rows.
    """

    gram: Tensor

    @cached_property
    def lengths(self) -> Tensor:
        """The lengths of the rows: Tensor [S, R]."""
        return self.gram.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()

    def row(self, index: int) -> Tensor:
        """Return the coordinates of row ``index``: Tensor [S, R]."""
        coordinates = self.gram.new_zeros(self.gram.shape[:2])
        coordinates[:, index] = 1.0
        return coordinates

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner product of the vectors with coordinates ``a`` and ``b`` [S, R]: Tensor [S]."""
        # Fewer operations than two products of matrices, which are tiny.
        return ((self.gram * b.unsqueeze(1)).sum(dim=2) * a).sum(dim=1)

    def reach(self, a: Tensor) -> Tensor:
        """Return the sum of the lengths of the terms of ``a`` [S, R]: Tensor [S], the length if nothing cancels."""
        return (a.abs() * self.lengths).sum(dim=1)

    def norm(self, a: Tensor) -> Tensor:
        """Return the length of the vector with coordinates ``a`` [S, R]: Tensor [S], as far as ``gram`` says it."""
        return self.inner(a, a).clamp(min=0.0).sqrt()

    def extent(self, a: Tensor) -> Extent:
        """Return the combination ``a`` [S, R], its length and an upper bound of its length.

        The squared length is ``a' G a``. Its terms may cancel, and then the errors of G are what is left: an error of
        at most ``ROUNDING * reach(a)^2``. A squared length below that is zero, and the vector with it. Otherwise the
        true squared length is at most ``a' G a + ROUNDING * (reach(a)^2 - a' G a)``, which ends at ``a' G a`` where
        nothing cancels. The rounding of the vector itself, when it is written in float32, is far smaller.
        """
        square, floor = self.inner(a, a).clamp(min=0.0), ROUNDING * self.reach(a).square()
        lost = square < floor  # not where both are 0, Inf or NaN
        ceiling = (floor + (1.0 - ROUNDING) * square).sqrt()
        vector, norm = a.masked_fill(lost.unsqueeze(1), 0.0), square.sqrt().masked_fill(lost, 0.0)
        return Extent(vector, norm, ceiling.masked_fill(lost, 0.0))


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a / b``, and 0 where ``b`` is 0: a vector of no length is evidence of nothing."""
    none = ~(b > 0)
    return (a / b.masked_fill(none, 1.0)).masked_fill(none, 0.0)
