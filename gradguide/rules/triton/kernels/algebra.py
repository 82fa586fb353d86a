"""Coordinates in a span, on the device: see ``gradguide.rules.span``. Comparisons are such that NaN stays NaN."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.ops.rounding import KERNELS

__all__ = ["at", "atmost", "clip", "extent", "inner", "lengths", "load_gram", "norm", "positive", "ratio", "unit"]

SMALLEST: tl.constexpr = tl.constexpr(KERNELS)


@triton.jit
def ratio(a, b):
    """``a / b``, and 0 where ``b`` is 0."""
    return tl.where(b > 0, a / tl.where(b > 0, b, 1.0), 0.0)


@triton.jit
def positive(x):
    """``x``, at least 0."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def atmost(x, largest):
    """``x``, at most ``largest``."""
    return tl.where(x > largest, largest, x)


@triton.jit
def unit(x):
    """``x``, in [0, 1]."""
    return atmost(positive(x), 1.0)


@triton.jit
def inner(gram, a, b):
    """Inner product of the vectors with coordinates ``a`` and ``b``."""
    return tl.sum(tl.sum(a[:, None] * gram * b[None, :], axis=1), axis=0)


@triton.jit
def lengths(gram):
    """The lengths of the rows."""
    lanes = tl.arange(0, gram.shape[0])
    return tl.sqrt(positive(tl.sum(tl.where(lanes[:, None] == lanes[None, :], gram, 0.0), axis=1)))


@triton.jit
def extent(gram, of_rows, a):
    """The combination ``a`` of rows with lengths ``of_rows``, its length, and an upper bound of its length; all zeros
    where the rows cancel to rounding."""
    reach = tl.sum(tl.abs(a) * of_rows, axis=0)
    square, floor = positive(inner(gram, a, a)), reach * reach * SMALLEST
    lost = square < floor  # not where both are 0, Inf or NaN
    ceiling = tl.sqrt(square + (floor - square * SMALLEST))
    return tl.where(lost, 0.0, a), tl.where(lost, 0.0, tl.sqrt(square)), tl.where(lost, 0.0, ceiling)


@triton.jit
def norm(gram, a):
    """Length of the vector with coordinates ``a``."""
    return tl.sqrt(positive(inner(gram, a, a)))


@triton.jit
def clip(length, bound):
    """Factor that brings ``length`` down to ``bound``."""
    return tl.where(length > bound, bound / tl.where(length > bound, length, 1.0), 1.0)


@triton.jit
def at(values, lanes, index):
    """One of ``values``."""
    return tl.sum(tl.where(lanes == index, values, 0.0), axis=0)


@triton.jit
def load_gram(gram, scope, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """The Gram matrix of a scope [ROWS, ROWS] as a tile [SIZE, SIZE], zeros beyond."""
    lanes = tl.arange(0, SIZE)
    inside = (lanes[:, None] < ROWS) & (lanes[None, :] < ROWS)
    return tl.load(gram + scope * ROWS * ROWS + lanes[:, None] * ROWS + lanes[None, :], mask=inside, other=0.0)
