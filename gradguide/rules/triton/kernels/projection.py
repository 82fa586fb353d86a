"""Project onto the vectors that conflict with no source: ``gradguide.rules.projection`` on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.rules.projection import TOLERANCE
from gradguide.rules.triton.kernels.algebra import at, relu, safe_div

__all__ = ["projected"]

SLACK: tl.constexpr = tl.constexpr(TOLERANCE)


@triton.jit
def solve(system, right, lanes, SIZE: tl.constexpr):
    """Solve ``system x = right`` for a positive definite matrix [SIZE, SIZE], by Gauss-Jordan elimination."""
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
def solve_active(a, right, chosen, lanes, SIZE: tl.constexpr):
    """Solve ``(a + SLACK * I) x = right`` on the chosen rows and columns; ``x`` is 0 elsewhere."""
    pairs = chosen[:, None] & chosen[None, :]
    eye = lanes[:, None] == lanes[None, :]
    ridge = tl.where(chosen, SLACK, 1.0)
    system = tl.where(pairs, a, 0.0) + tl.where(eye, ridge[:, None], 0.0)
    return tl.where(chosen, solve(system, tl.where(chosen, right, 0.0), lanes, SIZE), 0.0)


@triton.jit
def nonnegative(a, b, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Solve ``min 1/2 m' a m + b' m`` over m >= 0, by the active-set method of ``gradguide.rules.projection``.

    Rows beyond COUNT are zeros. They violate no constraint, so they never join the active set.
    """
    lanes = tl.arange(0, SIZE)
    m = tl.zeros([SIZE], tl.float64)
    active = tl.zeros([SIZE], tl.int32)
    going, rounds = 1, 0
    while (going != 0) & (rounds < 6 * COUNT):
        chosen = active != 0
        trial = solve_active(a, -b, chosen, lanes, SIZE)
        feasible = tl.sum(tl.where(chosen & (trial <= 0), 1, 0), axis=0) == 0

        violation = tl.where(chosen, float("-inf"), -(b + tl.sum(a * trial[None, :], axis=1)))
        largest = tl.max(violation, axis=0)
        worst = tl.min(tl.where(violation == largest, lanes, SIZE), axis=0)
        grows = feasible & (largest > SLACK * (1.0 + tl.sum(trial, axis=0)))

        # Fraction of the path to the trial at which each multiplier that becomes negative crosses zero.
        falls = chosen & (trial <= 0)
        fraction = tl.where(falls, safe_div(m, m - trial), float("inf"))
        way = tl.minimum(tl.min(fraction, axis=0), 1.0)
        leaving = falls & (fraction <= way)
        halfway = tl.where(leaving, 0.0, m + way * (trial - m))

        m = tl.where(feasible, trial, halfway)
        joined = tl.where(grows & (lanes == worst), 1, active)
        active = tl.where(feasible, joined, tl.where(leaving, 0, active))
        going = tl.where(grows | (feasible == 0), 1, 0)
        rounds += 1
    rest = -(b + tl.sum(a * m[None, :], axis=1))
    return relu(m + solve_active(a, rest, active != 0, lanes, SIZE))


@triton.jit
def projected(gram, of_rows, vector, FIRST: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Return the nearest vector whose products with rows FIRST to FIRST + COUNT are not negative: coordinates."""
    lanes = tl.arange(0, SIZE)
    sources = (lanes >= FIRST) & (lanes < FIRST + COUNT)
    along = tl.where(sources, tl.sum(gram * vector[None, :], axis=1), 0.0)
    norms = tl.where(sources, of_rows, 0.0)
    length = tl.sum(tl.abs(vector) * of_rows, axis=0)
    cosines = safe_div(safe_div(along, norms), length)
    if COUNT == 1:
        solution = relu(-cosines)
    else:
        pairs = sources[:, None] & sources[None, :]
        cosine_of = safe_div(safe_div(tl.where(pairs, gram, 0.0), norms[:, None]), norms[None, :])
        cosine_of = tl.minimum(tl.maximum(cosine_of, -1.0), 1.0)
        solution = nonnegative(cosine_of, cosines, COUNT, SIZE)
    conflict = tl.max(tl.where(cosines < -SLACK, 1, 0), axis=0) != 0
    return vector + tl.where(conflict, safe_div(solution * length, norms), 0.0)
