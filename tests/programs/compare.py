"""Whether what came out is what the oracle expects, to rounding.

The rule. Every number of a result may be off by ``TIGHT`` times the rounding of the terms that were combined for it,
and by one unit in the last place of the dtype that it is stored in. Where that is exceeded, the decision may have been
one that rounding makes: a conflict, a bound, a length that is left where terms cancel. Then the oracle decides again
``DRAWS`` times on rows that are disturbed within the rounding of their products (``space.PRODUCTS``), and the result
may lie ``REACH`` times as far away as those results do. A combination whose squared length is below the rounding of its
products, twice over, may be zero. A projection that several sources ask for may be any vector that is as near to what
was projected. What is promised of lengths and conflicts is checked in every case.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tests.programs.oracle import CONFLICT
from tests.programs.space import Vector, length

__all__ = ["TIGHT", "Disagreement", "OverflowedError", "Tally", "check", "check_conflicts"]

Array = NDArray[np.float64]

TIGHT = 8.0
DRAWS = 24
REACH = 2.0


class Disagreement(AssertionError):  # noqa: N818 (it is no error of the program that is run)
    """What was found is not what must be."""


class OverflowedError(Exception):
    """A result is beyond the range of the dtype that it is stored in: the program ends."""


WRITING = 2.5e-7
"""Rounding of a combination that is written in float32, relative to the sum of the lengths of its terms."""


class Tally:
    """How many vectors were compared, and for how many of them rounding may have decided."""

    def __init__(self) -> None:
        self.compared = 0
        self.undecided = 0


def check(
    what: str,
    found: Array,
    expected: Vector,
    stored: Array,
    reach: float,
    again: Callable[[np.random.Generator], Array],
    tally: Tally,
    *,
    products: float = 0.0,
    origin: Array | None = None,
) -> bool:
    """Raise unless ``found`` is ``expected`` to rounding. Returns whether no rounding may have decided.

    Args:
        what: what is compared.
        found, expected: numbers of one scope.
        stored: how far apart numbers of the dtype are there.
        reach: the sum of the lengths of the terms that make up the part which may be zero.
        again: the oracle's result from rows that are disturbed within their rounding.
        tally: counts the comparison.
        products: error of a product of two rows, relative to the product of their lengths.
        origin: what was projected, where several sources may conflict: a result that is as near to it will do.
    """
    tally.compared += 1
    # Clipping leaves room for the rounding of what is written in float32.
    room = WRITING * reach / expected.norm if expected.norm > 0 else 0.0
    allowed = TIGHT * expected.error + stored + min(room, 1.0) * np.abs(expected.value)
    distance = np.abs(found - expected.value)
    lost = expected.norm <= np.sqrt(2 * products) * reach
    if (distance <= allowed).all():
        return not lost
    tally.undecided += 1
    if lost and not found.any():
        return False
    if origin is not None:
        nearest = length(expected.value - origin) + products * reach + length(allowed)
        if length(found - origin) <= nearest * (1 + 1e-6):
            return False
    generator = np.random.default_rng(0)
    spread = np.zeros_like(allowed)
    for _ in range(DRAWS):
        spread = np.maximum(spread, np.abs(again(generator) - expected.value))
    allowed = allowed + REACH * spread
    if (distance <= allowed).all():
        return False
    worst = int(np.argmax(np.where(np.isnan(distance), np.inf, distance / (allowed + 1e-300))))
    raise Disagreement(
        f"{what}: number {worst} of {found.size} is {found[worst]:.9g}, expected {expected.value[worst]:.9g} to "
        f"{allowed[worst]:.3g}; lengths {length(found):.6g} and {expected.norm:.6g}, of terms {reach:.6g}; "
        f"all found {short(found)}, expected {short(expected.value)}"
    )


def check_conflicts(
    what: str, found: Array, sources: list[Vector], start: float, reach: float, slack: float, rounding: float
) -> None:
    """Raise where a vector conflicts with a source by more than rounding.

    Args:
        start, reach: the sum of the lengths of the terms of what was projected, and of the result. The terms that a
            step chose may be twice as long as the oracle's.
        slack: length of the rounding of the numbers found.
        rounding: relative error of terms and their products.
    """
    allowed = CONFLICT * start + 2 * rounding * max(reach, start) + slack
    for number, source in enumerate(sources):
        size = source.norm
        along = float(np.dot(found, source.value / size)) if size > 0 else 0.0
        if along < -allowed - length(source.error) / (size or 1.0) * length(found):
            raise Disagreement(f"{what}: goes {along:.6g} along source {number}, at least {-allowed:.6g} allowed")


def short(values: Array) -> str:
    """The first numbers."""
    return " ".join(f"{value:.7g}" for value in values[:6])
