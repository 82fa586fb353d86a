"""Coordinates in the span of a step's rows, where every product is a form in their Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from gradguide.ops.rounding import KERNELS

__all__ = ["Extent", "Span", "divide"]


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
        rounding (float): largest error of a product of two rows, relative to the product of their lengths.
    """

    gram: Tensor
    rounding: float = KERNELS

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
        at most ``rounding * reach(a)^2``. A squared length below that is zero, and the vector with it. Otherwise the
        true squared length is at most ``a' G a + rounding * (reach(a)^2 - a' G a)``, which ends at ``a' G a`` where
        nothing cancels. The rounding of the vector itself, when it is written in float32, is smaller than either.
        """
        square, floor = self.inner(a, a).clamp(min=0.0), self.rounding * self.reach(a).square()
        lost = square < floor  # not where both are 0, Inf or NaN
        ceiling = (floor + (1.0 - self.rounding) * square).sqrt()
        vector, norm = a.masked_fill(lost.unsqueeze(1), 0.0), square.sqrt().masked_fill(lost, 0.0)
        return Extent(vector, norm, ceiling.masked_fill(lost, 0.0))


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a / b``, and 0 where ``b`` is 0: a vector of no length is evidence of nothing."""
    none = ~(b > 0)
    return (a / b.masked_fill(none, 1.0)).masked_fill(none, 0.0)
