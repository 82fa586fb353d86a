"""Combinations of rows in float64, and how exactly a step can know them.

The numbers of a row are known to the rounding of the pass that reads them, and products of rows to ``PRODUCTS`` times
the product of their lengths. A ``Space`` that is disturbed decides as a step might that errs by as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["PRODUCTS", "Space", "Vector", "cosine", "length"]

Array = NDArray[np.float64]

PRODUCTS = {"auto": 1e-12, "foreach": 1e-12, "triton": 4e-6}
"""Largest error of a product of two rows by backend, relative to the product of their lengths.

Kernels add products in float32. On a CPU products of small tensors are in float64, and a combination shorter than 1e-6
of its terms is lost where it is written in float32. Multipliers of dependent sources are at most its root's inverse.
"""

SURELY_ZERO = 2.0
"""A combination shorter than this many times the rounding of its terms is zero."""


@dataclass(frozen=True)
class Vector:
    """Numbers, and the absolute rounding of each."""

    value: Array
    error: Array

    @property
    def norm(self) -> float:
        return length(self.value)


def length(value: Array) -> float:
    """Euclidean length, without overflow or underflow of squares."""
    largest = float(np.max(np.abs(value), initial=0.0))
    return 0.0 if largest == 0 else largest * float(np.sqrt(np.sum((value / largest) ** 2)))


def cosine(a: Array, b: Array) -> float:
    """Cosine of the angle, 0 where one vector is zero."""
    la, lb = length(a), length(b)
    return 0.0 if la == 0 or lb == 0 else float(np.dot(a / la, b / lb))


class Space:
    """The rows of one scope, and combinations of them by their coefficients.

    Args:
        rows: vectors of the same size.
        products: error of a product of two rows, relative to the product of their lengths.
        generator: disturbs the rows within the rounding of their products; None leaves them as they are.
    """

    def __init__(self, rows: Sequence[Vector], products: float, generator: np.random.Generator | None = None) -> None:
        self.true = np.stack([row.value for row in rows])
        self.errors = np.stack([row.error for row in rows])
        self.products = products
        self.generator = generator
        self.lengths = np.array([row.norm for row in rows])
        self.rows = self.true
        if generator is not None and self.true.size:
            scale = np.where(self.lengths > 0, self.lengths, 1.0)
            units = self.true / scale[:, None]
            mixed = generator.uniform(-1, 1, (len(rows), len(rows))) @ units
            noise = generator.uniform(-1, 1, units.shape)
            self.rows = self.true + products * self.lengths[:, None] * (mixed + noise) / 2
            together = np.sign(self.true) * generator.uniform(-1, 1, (len(rows), 1))
            self.rows = self.rows + self.errors * (generator.uniform(-2, 2, units.shape) + together)

    def row(self, index: int) -> Array:
        """Coefficients of a row."""
        coefficients = np.zeros(len(self.rows))
        coefficients[index] = 1.0
        return coefficients

    def combine(self, coefficients: Array) -> Vector:
        """The combination of the rows as they are, and its rounding."""
        return Vector(coefficients @ self.true, np.abs(coefficients) @ self.errors)

    def reach(self, coefficients: Array) -> float:
        """The sum of the lengths of the terms."""
        return float(np.abs(coefficients) @ self.lengths)

    def bounded_reach(self, coefficients: Array, start: float) -> float:
        """The same of a projection, whose multipliers are bounded. ``start`` is the reach of what was projected."""
        return min(self.reach(coefficients), start * (1 + float(np.sqrt(1 / self.products))))

    def norm(self, coefficients: Array) -> float:
        """Length of a combination; 0 where its terms cancel to rounding."""
        found, reach = length(coefficients @ self.rows), self.reach(coefficients)
        if found <= SURELY_ZERO * length(np.abs(coefficients) @ self.errors):
            return 0.0
        if self.generator is None or reach == 0:
            return found
        share = found / reach
        square = share**2 + self.products * (1 - share**2) * float(self.generator.uniform(-1, 1))
        return 0.0 if square <= 0 else reach * math.sqrt(square)
