"""Vectors as coordinates in the span of a step's rows, with inner products from their Gram matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from gradguide.ops.rounding import KERNELS, WRITTEN

__all__ = ["Extent", "Span", "divide"]


class Extent(NamedTuple):
    """A combination of rows and its length, over S scopes.

    If the terms cancel to rounding, all three are 0.

    vector (Tensor): coordinates [S, R].
    norm (Tensor): shape [S], the length.
    ceiling (Tensor): shape [S], an upper bound of the true length.
    """

    vector: Tensor
    norm: Tensor
    ceiling: Tensor


@dataclass(frozen=True)
class Span:
    """The span of R rows, in S scopes at once.

    Args:
        gram (Tensor): shape [S, R, R], positive semidefinite, the inner products of the rows.
        rounding (float): maximum error of a product of two rows, relative to the product of their lengths.
        largest (float): largest number that the dtype of the gradients can hold.
    """

    gram: Tensor
    rounding: float = KERNELS
    largest: float = math.inf

    @cached_property
    def lengths(self) -> Tensor:
        """Return the lengths of the rows: Tensor [S, R]."""
        return self.gram.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()

    def row(self, index: int) -> Tensor:
        """Return the coordinates of row ``index``: Tensor [S, R]."""
        coordinates = self.gram.new_zeros(self.gram.shape[:2])
        coordinates[:, index] = 1.0
        return coordinates

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner product of the vectors with coordinates ``a`` and ``b`` [S, R]: Tensor [S]."""
        # The matrices are tiny, so fewer operations are faster than two matrix products.
        return ((self.gram * b.unsqueeze(1)).sum(dim=2) * a).sum(dim=1)

    def reach(self, a: Tensor) -> Tensor:
        """Return the sum of the lengths of the terms of ``a`` [S, R]: Tensor [S]; it bounds the length."""
        return (a.abs() * self.lengths).sum(dim=1)

    def norm(self, a: Tensor) -> Tensor:
        """Return the length of the vector with coordinates ``a`` [S, R]: Tensor [S], with the error of ``gram``."""
        return self.inner(a, a).clamp(min=0.0).sqrt()

    def extent(self, a: Tensor) -> Extent:
        """Return the combination ``a`` [S, R], its length and an upper bound of its length.

        The squared length is ``a' G a``. If its terms cancel, the errors of G remain: at most
        ``rounding * reach(a)^2``. A squared length below that counts as zero, and so does the vector. Otherwise the
        true squared length is at most ``a' G a + rounding * (reach(a)^2 - a' G a)``, which equals ``a' G a`` if
        nothing cancels. Writing the vector in float32 adds at most ``WRITTEN * (reach(a) - length)``.
        """
        square, reach = self.inner(a, a).clamp(min=0.0), self.reach(a)
        floor, length = self.rounding * reach.square(), square.sqrt()
        lost = square < floor  # False if both are 0, Inf or NaN
        ceiling = (floor + (1.0 - self.rounding) * square).sqrt() + WRITTEN * (reach - length)
        vector, norm = a.masked_fill(lost.unsqueeze(1), 0.0), length.masked_fill(lost, 0.0)
        return Extent(vector, norm, ceiling.masked_fill(lost, 0.0))


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a / b``, and 0 where ``b`` is not above 0."""
    none = ~(b > 0)
    return (a / b.masked_fill(none, 1.0)).masked_fill(none, 0.0)
