"""What the rules must give, written plainly in float64 from the design and the docstrings of the rules.

Nothing here calls the rules of gradguide. What a result is made of, and how exactly, ``space`` says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from gradguide import Direction, Magnitude
from tests.programs.space import PRODUCTS, Space, Vector, cosine, length

__all__ = ["CONFLICT", "Guided", "Limited", "Rows", "Statistics", "guide", "limit"]

Array = NDArray[np.float64]

CONFLICT = 1e-6
"""A cosine above minus this is no conflict."""

WRITTEN = 5e-7
"""What a bound may allow for the rounding of a combination that is written in float32, relative to what its terms are
longer than it is."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of a scope between steps: see the docstring of Direction's Average."""

    mass: float = 0.0
    square: float = 0.0


@dataclass(frozen=True)
class Rows:
    """What a step looks at in one scope.

    gradient, direction: in the frame of descent: the sign of groups that maximize is turned.
    momentum: decay and gain of the base's own average, where the direction is that.
    products: error of a product of two rows.
    """

    gradient: Vector
    direction: Vector
    sources: list[Vector]
    weights: tuple[float, ...] = ()
    projecting: tuple[bool, ...] = ()
    momentum: tuple[float, float] | None = None
    products: float = PRODUCTS["auto"]

    def space(self, generator: np.random.Generator | None = None) -> Space:
        """Their space."""
        return Space([self.gradient, self.direction, *self.sources], self.products, generator)


@dataclass(frozen=True)
class Guided:
    """What is decided on the gradient of a scope.

    gradient, direction: as they are written. origin: the gradient as it is projected, times ``factor``.
    start: the sum of the lengths of the terms of ``origin``.
    norm, reach: length of the guided gradient before clipping, and the sum of the lengths of its terms.
    allowance: how much shorter clipping may make it for the rounding of what is written, relative to it.
    strength: share of the part orthogonal to the direction that was removed.
    decided: whether no rounding may have decided otherwise.
    """

    gradient: Vector
    direction: Vector
    origin: Array
    start: float
    reach: float
    norm: float
    factor: float
    allowance: float
    strength: float
    coherence: float
    statistics: Statistics
    decided: bool = True


def guide(
    rows: Rows,
    seen: Statistics,
    direction: Direction | None,
    magnitude: Magnitude | None,
    *,
    on: bool,
    generator: np.random.Generator | None = None,
) -> Guided:
    """Direction, alignment on the gradient (where ``on``), magnitude: in this order."""
    space = rows.space(generator)
    g, d = space.row(0), space.row(1)
    received = float(space.lengths[0])
    guided, strength, coherence = g, math.nan, math.nan
    if direction is not None:
        strength = direction.damping * evidence(space.norm(d), seen)
        guided = damp(space, strength)
    if received > 0:
        guided = guided + np.array([0.0, 0.0, *rows.weights])
    origin = guided
    if on:
        guided = project(space, guided, [k for k, wanted in enumerate(rows.projecting, 2) if wanted])
    norm, reach = space.norm(guided), space.bounded_reach(guided, space.reach(origin))
    if norm == 0:
        guided = np.zeros_like(guided)
    bound, statistics = math.inf if magnitude is None else magnitude.max_norm, seen
    factor = bound / norm if norm > bound else 1.0
    allowance = WRITTEN * max(reach / norm - 1, 0.0) if factor < 1 else 0.0
    final, new = guided * factor, d
    if direction is not None:
        if rows.momentum is not None:
            decay, gain = rows.momentum
            term, step = final, norm * factor
        else:
            decay, gain = direction.decay, 1 - direction.decay
            term, step = g / received if received > 0 else g, float(received > 0)
        if step > 0:
            new = decay * d + gain * term
            mass, square = decay * seen.mass + gain * step, decay**2 * seen.square + (gain * step) ** 2
            statistics = Statistics(mass, square)
        coherence = resultant(space.norm(new), statistics)
    written = space.combine(final), space.combine(new), space.combine(origin * factor).value
    return Guided(
        *written, space.reach(origin) * factor, reach, norm, factor, allowance, strength, coherence, statistics
    )


def resultant(norm: float, seen: Statistics) -> float:
    """Mean resultant length: |d| over what it would be had all gradients agreed."""
    return min(norm / seen.mass, 1.0) if seen.mass > 0 else 0.0


def evidence(norm: float, seen: Statistics) -> float:
    """Coherence beyond chance, 0 where there is nothing to compare with."""
    chance = min(seen.square / seen.mass**2, 1.0) if seen.mass > 0 else 0.0
    if 1 - chance <= 1e-6:
        return 0.0
    return math.sqrt(min(max(resultant(norm, seen) ** 2 - chance, 0.0) / (1 - chance), 1.0))


def damp(space: Space, strength: float) -> Array:
    """``(1 - k) g + k P g``, P the projection onto the ray along d."""
    g, d, norm = space.rows[0], space.rows[1], length(space.rows[1])
    if norm == 0 or strength == 0:
        return space.row(0)
    along = max(float(np.dot(g, d / norm)), 0.0)
    return (1 - strength) * space.row(0) + strength * along / norm * space.row(1)


def project(space: Space, coefficients: Array, sources: Sequence[int]) -> Array:
    """The nearest combination without a conflict; the given one where there is none beyond rounding."""
    there = [k for k in sources if length(space.rows[k]) > 0]
    vector = coefficients @ space.rows
    if not any(cosine(vector, space.rows[k]) < -CONFLICT for k in there):
        return coefficients
    # In units of the lengths, so that no scale decides.
    norms = np.array([length(space.rows[k]) for k in there])
    units = (space.rows[there] / norms[:, None]).T
    multiples, _ = nnls(units, -vector / length(vector), maxiter=100 * len(there))
    result: Array = coefficients.copy()
    result[there] += multiples * (length(vector) / norms)
    return result


@dataclass(frozen=True)
class Limited:
    """What is left of an update.

    update: what is left. origin: what the bound left, before it was freed of conflicts. acted: whether a rule did.
    norm, factor: length of the base's update, and what the bound multiplied it by. bound: the longest length.
    reach: the sum of the lengths of the terms.
    """

    update: Vector
    origin: Array
    acted: bool
    norm: float
    factor: float
    bound: float
    reach: float


def limit(
    update: Vector,
    before: Vector,
    sources: Sequence[Vector],
    max_update: float | None,
    products: float,
    generator: np.random.Generator | None = None,
) -> Limited:
    """Bound the update by the parameters' own length, and free it of conflicts: it may not go along a source."""
    space = Space([update, before, *sources], products, generator)
    made, bound = space.row(0), math.inf
    if max_update is not None:
        bound = max_update * max(before.norm, 0.01 * math.sqrt(before.value.size))
    norm = space.norm(made)
    factor = bound / norm if norm > bound else 1.0
    freed = -project(space, -made, range(2, len(space.rows)))
    reach = space.bounded_reach(freed, norm) * factor
    if space.norm(freed) == 0:
        freed = np.zeros_like(freed)
    acted = factor < 1 or not np.array_equal(freed, made)
    left, origin = space.combine(freed * factor), space.combine(made * factor).value
    return Limited(left, origin, acted and norm > 0, norm, factor, bound, reach)
