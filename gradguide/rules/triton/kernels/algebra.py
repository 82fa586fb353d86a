"""Span algebra on the device: see ``gradguide.rules.span``. All comparisons propagate NaN."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.ops.rounding import KERNELS, WRITTEN

__all__ = ["at", "atmost", "clamp01", "clip", "extent", "inner", "lengths", "load_gram", "norm", "relu", "safe_div"]

SMALLEST: tl.constexpr = tl.constexpr(KERNELS)
ROUNDED: tl.constexpr = tl.constexpr(WRITTEN)


@triton.jit
def safe_div(a, b):
    """Return ``a / b``, and 0 where ``b`` is not above 0."""
    return tl.where(b > 0, a / tl.where(b > 0, b, 1.0), 0.0)


@triton.jit
def relu(x):
    """Return ``max(x, 0)``; NaN stays NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def atmost(x, largest):
    """Return ``min(x, largest)``; NaN stays NaN."""
    return tl.where(x > largest, largest, x)


@triton.jit
def clamp01(x):
    """Return ``x`` clamped to [0, 1]; NaN stays NaN."""
    return atmost(relu(x), 1.0)


@triton.jit
def inner(gram, a, b):
    """Return the inner product of the vectors with coordinates ``a`` and ``b``."""
    return tl.sum(tl.sum(a[:, None] * gram * b[None, :], axis=1), axis=0)


@triton.jit
def lengths(gram):
    """Return the lengths of the rows."""
    lanes = tl.arange(0, gram.shape[0])
    return tl.sqrt(relu(tl.sum(tl.where(lanes[:, None] == lanes[None, :], gram, 0.0), axis=1)))


@triton.jit
def extent(gram, of_rows, a):
    """Return the combination ``a`` of rows with lengths ``of_rows``, its length, and an upper bound of its length.

    If the rows cancel to rounding, all three are 0.
    """
    reach = tl.sum(tl.abs(a) * of_rows, axis=0)
    square, floor = relu(inner(gram, a, a)), reach * reach * SMALLEST
    lost = square < floor  # False if both are 0, Inf or NaN
    ceiling = tl.sqrt(square + (floor - square * SMALLEST)) + (reach - tl.sqrt(square)) * ROUNDED
    return tl.where(lost, 0.0, a), tl.where(lost, 0.0, tl.sqrt(square)), tl.where(lost, 0.0, ceiling)


@triton.jit
def norm(gram, a):
    """Return the length of the vector with coordinates ``a``."""
    return tl.sqrt(relu(inner(gram, a, a)))


@triton.jit
def clip(length, bound):
    """Return the factor in (0, 1] that scales ``length`` to at most ``bound``."""
    return tl.where(length > bound, bound / tl.where(length > bound, length, 1.0), 1.0)


@triton.jit
def at(values, lanes, index):
    """Return ``values[index]``."""
    return tl.sum(tl.where(lanes == index, values, 0.0), axis=0)


@triton.jit
def load_gram(gram, scope, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Load the Gram matrix [ROWS, ROWS] of a scope as a zero-padded tile [SIZE, SIZE]."""
    lanes = tl.arange(0, SIZE)
    inside = (lanes[:, None] < ROWS) & (lanes[None, :] < ROWS)
    return tl.load(gram + scope * ROWS * ROWS + lanes[:, None] * ROWS + lanes[None, :], mask=inside, other=0.0)
