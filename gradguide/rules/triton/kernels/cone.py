"""The projection onto the cone of vectors that conflict with no source, on the device: see ``gradguide.rules.cone``."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.rules.cone import TOLERANCE
from gradguide.rules.triton.kernels.algebra import at, norm, positive, ratio

__all__ = ["projected"]

CONFLICT: tl.constexpr = tl.constexpr(-TOLERANCE)
SLACK: tl.constexpr = tl.constexpr(1e-12)
RIDGE: tl.constexpr = tl.constexpr(1e-13)


@triton.jit
def solve(system, right, lanes, SIZE: tl.constexpr):
    """``system x = right`` for a positive definite matrix [SIZE, SIZE], by elimination."""
    for i in range(SIZE):
        row = tl.sum(tl.where(lanes[:, None] == i, system, 0.0), axis=0)
        column = tl.sum(tl.where(lanes[None, :] == i, system, 0.0), axis=1)
        pivot = at(row, lanes, i)
        row = row / pivot
        value = at(right, lanes, i) / pivot
        system = tl.where(lanes[:, None] == i, row[None, :], system - column[:, None] * row[None, :])
        right = tl.where(lanes == i, value, right - column * value)
    return right


@triton.jit
def nonnegative(a, b, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """``min 1/2 m' a m + b' m`` over m >= 0, by the active-set method of ``gradguide.rules.cone``.

    Rows beyond COUNT are zeros, violate nothing, and so never join.
    """
    lanes = tl.arange(0, SIZE)
    eye = lanes[:, None] == lanes[None, :]
    m = tl.zeros([SIZE], tl.float64)
    active = tl.zeros([SIZE], tl.int32)
    going, rounds = 1, 0
    while (going != 0) & (rounds < 6 * COUNT):
        chosen = active != 0
        pairs = chosen[:, None] & chosen[None, :]
        ridge = tl.where(chosen, RIDGE, 1.0)
        system = tl.where(pairs, a, 0.0) + tl.where(eye, ridge[:, None], 0.0)
        trial = solve(system, tl.where(chosen, -b, 0.0), lanes, SIZE)
        trial = tl.where(chosen, trial, 0.0)
        feasible = tl.sum(tl.where(chosen & (trial <= 0), 1, 0), axis=0) == 0

        violation = tl.where(chosen, float("-inf"), -(b + tl.sum(a * trial[None, :], axis=1)))
        largest = tl.max(violation, axis=0)
        worst = tl.min(tl.where(violation == largest, lanes, SIZE), axis=0)
        grows = feasible & (largest > SLACK)

        # The fraction of the way to the trial at which each multiplier that it would make negative reaches zero.
        falls = chosen & (trial <= 0)
        fraction = tl.where(falls, ratio(m, m - trial), float("inf"))
        way = tl.minimum(tl.min(fraction, axis=0), 1.0)
        leaving = falls & (fraction <= way)
        halfway = tl.where(leaving, 0.0, m + way * (trial - m))

        m = tl.where(feasible, trial, halfway)
        joined = tl.where(grows & (lanes == worst), 1, active)
        active = tl.where(feasible, joined, tl.where(leaving, 0, active))
        going = tl.where(grows | (feasible == 0), 1, 0)
        rounds += 1
    return positive(m)


@triton.jit
def projected(gram, vector, FIRST: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """The nearest vector whose product with each of the COUNT rows from FIRST on is not negative: coordinates."""
    lanes = tl.arange(0, SIZE)
    sources = (lanes >= FIRST) & (lanes < FIRST + COUNT)
    along = tl.where(sources, tl.sum(gram * vector[None, :], axis=1), 0.0)
    squares = tl.sum(tl.where(lanes[:, None] == lanes[None, :], gram, 0.0), axis=1)
    norms = tl.where(sources, tl.sqrt(positive(squares)), 0.0)
    length = norm(gram, vector)
    cosines = ratio(ratio(along, norms), length)
    if COUNT == 1:
        solution = positive(-cosines)
    else:
        pairs = sources[:, None] & sources[None, :]
        cosine_of = ratio(ratio(tl.where(pairs, gram, 0.0), norms[:, None]), norms[None, :])
        solution = nonnegative(cosine_of, cosines, COUNT, SIZE)
    conflict = tl.max(tl.where(cosines < CONFLICT, 1, 0), axis=0) != 0
    return vector + tl.where(conflict, ratio(solution * length, norms), 0.0)
