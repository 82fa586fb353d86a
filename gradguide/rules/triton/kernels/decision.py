"""The decisions of a step on the device: see ``gradguide.rules.decide``."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.rules import decide as rules
from gradguide.rules.triton.kernels.algebra import (
    at,
    atmost,
    clamp01,
    clip,
    extent,
    inner,
    lengths,
    load_gram,
    norm,
    relu,
    safe_div,
)
from gradguide.rules.triton.kernels.projection import projected
from gradguide.utils.constants import LEAST_LENGTH

__all__ = ["constrain", "constrain_preview", "decide"]

GRADIENT: tl.constexpr = tl.constexpr(rules.GRADIENT)
DIRECTION: tl.constexpr = tl.constexpr(rules.DIRECTION)
SOURCES: tl.constexpr = tl.constexpr(rules.SOURCES)
UPDATE: tl.constexpr = tl.constexpr(rules.UPDATE)
BEFORE: tl.constexpr = tl.constexpr(rules.BEFORE)
KEPT: tl.constexpr = tl.constexpr(len(rules.STATISTICS))
MASS: tl.constexpr = tl.constexpr(rules.STATISTICS.index("mass"))
SQUARE: tl.constexpr = tl.constexpr(rules.STATISTICS.index("square"))

LEAST: tl.constexpr = tl.constexpr(LEAST_LENGTH)
FACTOR: tl.constexpr = tl.constexpr(rules.LEAST_FACTOR)


@triton.jit
def evidence(length, mass, square):
    """Return the coherence beyond chance."""
    chance = clamp01(safe_div(square, mass * mass))
    resultant = clamp01(safe_div(length, mass))
    room = tl.where(1.0 - chance > 1e-6, 1.0 - chance, 0.0)
    return tl.sqrt(clamp01(safe_div(relu(resultant * resultant - chance), room)))


@triton.jit
def is_finite(values, count, BLOCK: tl.constexpr):
    """Return whether all of the first ``count`` values are finite."""
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        value = tl.load(values + offsets, mask=offsets < count, other=0.0)
        wrong += tl.where((value == value) & (tl.abs(value) != float("inf")), 0, 1)
    return tl.sum(wrong) == 0


@triton.jit
def any_moved(gram, scopes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the number of scopes whose gradient is not zero."""
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, scopes, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        found += tl.where(tl.load(gram + offsets * ROWS * ROWS, mask=offsets < scopes, other=0.0) != 0.0, 1, 0)
    return tl.sum(found)


@triton.jit(do_not_specialize=["scopes"])
def decide(
    gram, statistics, positions, totals, settings, decays, gains, gradients, directions, guideds, numbers, go, scopes,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    SOURCE_COUNT: tl.constexpr, REGULARIZED: tl.constexpr,
    DIRECTED: tl.constexpr, DAMPED: tl.constexpr, SHARED: tl.constexpr, PULLED: tl.constexpr,
    PROJECTED: tl.constexpr, CLIPPED: tl.constexpr,
):  # fmt: skip
    """Decide the step of one scope.

    Args:
        gram: float64 [scopes, ROWS, ROWS].
        statistics: float64 [.., KEPT], changed in place at ``positions`` (int64 [scopes]) of this scope.
        totals: float64 [2], steps made and steps skipped, updated by the first program.
        settings: float64: damping, decay of the direction, bound of the gradient, largest number that the gradients can
            hold, then the weight of each source.
        decays, gains: float64 [scopes], of the momentum that is the direction; read if SHARED.
        gradients, directions, guideds: output, float64 [scopes, ROWS], coordinates of the clipped guided gradient, the
            new direction, and the guided gradient before clipping.
        numbers: output, float64 [4, scopes]: norm, clipping factor, coherence, damping.
        go: output, float32: 1 if the step is made, 0 if it is skipped.
        PROJECTED: number of sources, the first ones, that the gradient is projected on.
    """
    scope = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SIZE)
    g = load_gram(gram, scope, ROWS, SIZE)
    # Every program checks all scopes: the matrices are small, and this saves a launch.
    keep = is_finite(gram, scopes * ROWS * ROWS, BLOCK)
    if scope == 0:
        made = tl.where(keep, 1.0, 0.0)
        moved = any_moved(gram, scopes, ROWS, BLOCK) != 0
        tl.store(go, made)
        tl.store(totals, tl.load(totals) + tl.where(moved & (made != 0), 1.0, 0.0))
        tl.store(totals + 1, tl.load(totals + 1) + 1.0 - made)
    known = statistics + KEPT * tl.load(positions + scope)
    mass, square = tl.load(known + MASS), tl.load(known + SQUARE)
    one = tl.full([SIZE], 1.0, tl.float64)
    gradient = tl.where(lanes == GRADIENT, one, 0.0)
    direction = tl.where(lanes == DIRECTION, one, 0.0)
    of_rows = lengths(g)
    received, length = at(of_rows, lanes, GRADIENT), at(of_rows, lanes, DIRECTION)

    guided = gradient
    if REGULARIZED:
        guided = guided + tl.where(lanes == ROWS - 1, one, 0.0)
    strength = tl.full([], 0.0, tl.float64)
    if DAMPED:
        along = safe_div(relu(inner(g, guided, direction)), length * length)
        strength = tl.where(length > 0, tl.load(settings) * evidence(length, mass, square), 0.0)
        guided = (1.0 - strength) * guided + strength * along * direction
    if PULLED:
        is_source = (lanes >= SOURCES) & (lanes < SOURCES + SOURCE_COUNT)
        weights = tl.load(settings + 4 + lanes - SOURCES, mask=is_source, other=0.0)
        guided = guided + tl.where(received > 0, weights, 0.0)
    if PROJECTED > 0:
        guided = projected(g, of_rows, guided, SOURCES, PROJECTED, SIZE)

    guided, guided_norm, ceiling = extent(g, of_rows, guided)
    factor = tl.full([], 1.0, tl.float64)
    if CLIPPED:
        factor = clip(ceiling, tl.load(settings + 2))
    held = tl.load(settings + 3)
    elements = tl.where(lanes == GRADIENT, atmost(of_rows, held), of_rows)
    factor = factor * clip(tl.sum(tl.abs(guided * factor) * elements, axis=0), held)
    final = guided * factor

    turned = direction
    new_mass, new_square = mass, square
    coherence = tl.full([], 0.0, tl.float64)
    if DIRECTED:
        if SHARED:
            decay, gain = tl.load(decays + scope), tl.load(gains + scope)
            term, term_length = final, guided_norm * factor
        else:
            decay = tl.load(settings + 1)
            gain = 1.0 - decay
            term, term_length = gradient * safe_div(one, received), tl.where(received > 0, 1.0, 0.0)
        moves = term_length > 0
        ahead = tl.where(moves, decay * direction + gain * term, direction)
        new_mass = tl.where(moves, decay * mass + gain * term_length, mass)
        new_square = tl.where(moves, decay * decay * square + gain * gain * term_length * term_length, square)
        if not SHARED:
            turned = ahead
        coherence = clamp01(safe_div(norm(g, ahead), new_mass))

    inside = lanes < ROWS
    row = scope * ROWS + lanes
    tl.store(gradients + row, tl.where(keep, final, gradient), mask=inside)
    tl.store(directions + row, tl.where(keep, turned, direction), mask=inside)
    tl.store(guideds + row, guided, mask=inside)
    tl.store(numbers + scope, guided_norm)
    tl.store(numbers + scopes + scope, factor)
    tl.store(numbers + 2 * scopes + scope, coherence)
    tl.store(numbers + 3 * scopes + scope, strength)
    tl.store(known + MASS, tl.where(keep, new_mass, mass))
    tl.store(known + SQUARE, tl.where(keep, new_square, square))


@triton.jit
def constrained(
    g, known, counts, settings, numbers, scope, scopes, SIZE: tl.constexpr, SOURCE_COUNT: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Return the coordinates of one scope's update under the constraints; the first is its scale.

    Factor and norms are stored in ``numbers``.
    """
    lanes = tl.arange(0, SIZE)
    of_rows = lengths(g)
    length, before = at(of_rows, lanes, UPDATE), at(of_rows, lanes, BEFORE)
    update = tl.where(lanes == UPDATE, 1.0, 0.0).to(tl.float64)
    wanted = update
    if SOURCE_COUNT > 0:
        wanted = -projected(g, of_rows, -wanted, SOURCES, SOURCE_COUNT, SIZE)
    wanted, left, ceiling = extent(g, of_rows, wanted)
    factor = tl.full([], 1.0, tl.float64)
    if BOUNDED:
        least = LEAST * tl.sqrt(tl.load(counts + scope))
        bound = tl.load(settings) * tl.where(before < least, least, before)
        factor = clip(tl.where(length > ceiling, length, ceiling), bound)
        factor = tl.where(known & (factor >= FACTOR), factor, 0.0)
    left = tl.where(known, left * factor, 0.0 if BOUNDED else float("nan"))
    tl.store(numbers + scopes + scope, factor)
    tl.store(numbers + 2 * scopes + scope, length)
    tl.store(numbers + 3 * scopes + scope, left)
    return tl.where(known, wanted, update) * factor


@triton.jit
def scope_is_finite(values):
    """Return whether all of ``values``, a matrix, are finite."""
    wrong = tl.where((values == values) & (tl.abs(values) != float("inf")), 0, 1)
    return tl.sum(tl.sum(wrong, axis=1), axis=0) == 0


@triton.jit(do_not_specialize=["scopes"])
def constrain(
    gram, counts, settings, coefficients, numbers, scopes, ROWS: tl.constexpr, SIZE: tl.constexpr,
    SOURCE_COUNT: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Constrain the update of one scope.

    Args:
        gram: float64 [scopes, ROWS, ROWS], of the update's span.
        counts: float64 [scopes], number of elements.
        settings: float64, the bound relative to the length of the parameters; read if BOUNDED.
        coefficients: output, float64 [scopes, ROWS], of the parameters after the base's step, those before it, and
            the sources.
        numbers: output, float64 [4, scopes]: scale of the update, factor of the bound, norm of the update before and
            after the constraints.
        SOURCE_COUNT: number of sources that the update is projected on; they are the last rows.
    """
    scope = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SIZE)
    g = load_gram(gram, scope, ROWS, SIZE)
    known = scope_is_finite(g)
    wanted = constrained(g, known, counts, settings, numbers, scope, scopes, SIZE, SOURCE_COUNT, BOUNDED)
    scale = at(wanted, lanes, UPDATE)
    tl.store(numbers + scope, scale)
    wanted = tl.where(lanes == BEFORE, 1.0 - scale, wanted)
    tl.store(coefficients + scope * ROWS + lanes, wanted, mask=lanes < ROWS)


@triton.jit(do_not_specialize=["scopes"])
def constrain_preview(
    step, products, counts, settings, pulls, numbers, scopes, STEP_ROWS: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, SOURCE_COUNT: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Constrain the update of one scope before it is made.

    Args:
        step: float64 [scopes, STEP_ROWS, STEP_ROWS], Gram matrices of the step's span.
        products: float64 [scopes, 2 + SOURCE_COUNT]: squared norms of the update and of the parameters, then the
            products of the update with each source.
        pulls: output, float64 [scopes, STEP_ROWS], the addition to the update in the step's span; written if there
            are sources.
        ROWS: number of rows of the update's span.

    The other arguments are those of ``constrain``.
    """
    scope = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SIZE)
    i, j = lanes[:, None], lanes[None, :]
    own = products + scope * (2 + SOURCE_COUNT)
    # Assemble the Gram matrix of the update's span: ``products`` has the update's row, ``step`` that of the sources.
    row, column = tl.minimum(i, j), tl.maximum(i, j)
    crossed = (row == UPDATE) & (column >= SOURCES) & (column < ROWS)
    g = tl.load(own + column, mask=crossed, other=0.0)
    g += tl.where((i == UPDATE) & (j == UPDATE), tl.load(own), 0.0)
    g += tl.where((i == BEFORE) & (j == BEFORE), tl.load(own + 1), 0.0)
    sources = (row >= SOURCES) & (column < ROWS)
    g += tl.load(step + scope * STEP_ROWS * STEP_ROWS + i * STEP_ROWS + j, mask=sources, other=0.0)

    known = scope_is_finite(g)
    wanted = constrained(g, known, counts, settings, numbers, scope, scopes, SIZE, SOURCE_COUNT, BOUNDED)
    tl.store(numbers + scope, at(wanted, lanes, UPDATE))
    if SOURCE_COUNT > 0:
        row_of = pulls + scope * STEP_ROWS
        tl.store(row_of + lanes, wanted, mask=(lanes >= SOURCES) & (lanes < ROWS))
        # The other rows of the step get 0: those before the sources, and the gradient of a regularizer.
        for other in tl.static_range(STEP_ROWS):
            if other < SOURCES or other >= SOURCES + SOURCE_COUNT:
                tl.store(row_of + other, 0.0)
