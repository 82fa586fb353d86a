"""Both decisions of a step, on the device: see ``gradguide.rules.decision``."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.rules.magnitude import DECAY, DEVIATIONS, LEAST_LENGTH, PRIOR_COUNT, PRIOR_DEVIATION
from gradguide.rules.triton.kernels.algebra import (
    atmost,
    clip,
    inner,
    load_gram,
    norm,
    positive,
    ratio,
    unit,
)
from gradguide.rules.triton.kernels.cone import projected

__all__ = ["decide", "limit"]

GRADIENT: tl.constexpr = tl.constexpr(0)
DIRECTION: tl.constexpr = tl.constexpr(1)
SOURCES: tl.constexpr = tl.constexpr(2)
UPDATE: tl.constexpr = tl.constexpr(0)
BEFORE: tl.constexpr = tl.constexpr(1)

LOG_DECAY: tl.constexpr = tl.constexpr(DECAY)
MARGIN: tl.constexpr = tl.constexpr(DEVIATIONS)
PRIOR: tl.constexpr = tl.constexpr(PRIOR_COUNT)
PRIOR_SPREAD: tl.constexpr = tl.constexpr(PRIOR_COUNT * PRIOR_DEVIATION**2)
LEAST: tl.constexpr = tl.constexpr(LEAST_LENGTH)


@triton.jit
def evidence(length, mass, square):
    """Coherence beyond chance."""
    chance = unit(ratio(square, mass * mass))
    resultant = unit(ratio(length, mass))
    room = tl.where(1.0 - chance > 1e-6, 1.0 - chance, 0.0)
    return tl.sqrt(unit(ratio(positive(resultant * resultant - chance), room)))


@triton.jit
def threshold(weight, mean, spread):
    """Largest norm that does not stand out among those seen."""
    variance = (PRIOR_SPREAD + spread) / (PRIOR + weight)
    margin = MARGIN * tl.sqrt(variance * (1.0 + 1.0 / tl.where(weight > 0, weight, 1.0)))
    return tl.where(weight > 0, tl.exp(mean + margin), float("inf"))


@triton.jit(do_not_specialize=["scopes"])
def decide(
    gram, finite, statistics, settings, decays, gains, gradients, directions, guideds, numbers, remembered, scopes,
    ROWS: tl.constexpr, SIZE: tl.constexpr, SOURCE_COUNT: tl.constexpr, REGULARIZED: tl.constexpr,
    DIRECTED: tl.constexpr, DAMPED: tl.constexpr, SHARED: tl.constexpr, PULLED: tl.constexpr,
    PROJECTED: tl.constexpr, CLIPPED: tl.constexpr, ADAPTIVE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One scope's decision.

    Args:
        gram: float64 [scopes, ROWS, ROWS].
        finite: bool.
        statistics, remembered: float64 [scopes, 5], before and after.
        settings: float64: damping, decay of the direction, bound of the gradient, power of the coherence, then the
            weight of each source.
        decays, gains: float64 [scopes], of the momentum that is the direction, with SHARED.
        gradients, directions, guideds: float64 [scopes, ROWS], coordinates: guided and clipped, new direction, guided.
        numbers: float64 [4, scopes]: norm, factor of clipping, coherence, scale of the update.
    """
    scope = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SIZE)
    g = load_gram(gram, scope, ROWS, SIZE)
    keep = tl.load(finite) != 0
    mass, square = tl.load(statistics + 5 * scope), tl.load(statistics + 5 * scope + 1)
    weight, mean = tl.load(statistics + 5 * scope + 2), tl.load(statistics + 5 * scope + 3)
    spread = tl.load(statistics + 5 * scope + 4)
    one = tl.full([SIZE], 1.0, tl.float64)
    gradient = tl.where(lanes == GRADIENT, one, 0.0)
    direction = tl.where(lanes == DIRECTION, one, 0.0)
    received, length = norm(g, gradient), norm(g, direction)

    guided = gradient
    if REGULARIZED:
        guided = guided + tl.where(lanes == ROWS - 1, one, 0.0)
    if DAMPED:
        along = ratio(positive(inner(g, guided, direction)), length * length)
        strength = tl.where(length > 0, tl.load(settings) * evidence(length, mass, square), 0.0)
        guided = (1.0 - strength) * guided + strength * along * direction
    if PULLED:
        is_source = (lanes >= SOURCES) & (lanes < SOURCES + SOURCE_COUNT)
        weights = tl.load(settings + 4 + lanes - SOURCES, mask=is_source, other=0.0)
        guided = guided + tl.where(received > 0, weights, 0.0)
    if PROJECTED:
        guided = projected(g, guided, SOURCES, SOURCE_COUNT, SIZE)

    guided_norm = norm(g, guided)
    factor = tl.full([], 1.0, tl.float64)
    new_weight, new_mean, new_spread = weight, mean, spread
    if CLIPPED:
        bound = tl.load(settings + 2)
        if ADAPTIVE:
            limit = threshold(weight, mean, spread)
            bound = atmost(bound, limit)
            counted = atmost(guided_norm, limit)
            value = tl.log(tl.where(counted > 0, counted, 1.0))
            seen = LOG_DECAY * weight + 1.0
            middle = mean + (value - mean) / seen
            new_weight = tl.where(counted > 0, seen, weight)
            new_mean = tl.where(counted > 0, middle, mean)
            new_spread = tl.where(counted > 0, LOG_DECAY * spread + (value - mean) * (value - middle), spread)
        factor = clip(guided_norm, bound)
    final = guided * factor

    turned = direction
    new_mass, new_square = mass, square
    coherence = tl.full([], 0.0, tl.float64)
    scale = tl.full([], 1.0, tl.float64)
    if DIRECTED:
        if SHARED:
            decay, gain = tl.load(decays + scope), tl.load(gains + scope)
            term, term_length = final, guided_norm * factor
        else:
            decay = tl.load(settings + 1)
            gain = 1.0 - decay
            term, term_length = gradient * ratio(one, received), tl.where(received > 0, 1.0, 0.0)
        moves = term_length > 0
        ahead = tl.where(moves, decay * direction + gain * term, direction)
        new_mass = tl.where(moves, decay * mass + gain * term_length, mass)
        new_square = tl.where(moves, decay * decay * square + gain * gain * term_length * term_length, square)
        if not SHARED:
            turned = ahead
        coherence = unit(ratio(norm(g, ahead), new_mass))
        if SCALED:
            agreed = tl.where(new_mass > 0, coherence, 1.0)
            scale = tl.where(keep, tl.exp(tl.load(settings + 3) * tl.log(agreed)), 1.0)

    inside = lanes < ROWS
    row = scope * ROWS + lanes
    tl.store(gradients + row, tl.where(keep, final, gradient), mask=inside)
    tl.store(directions + row, tl.where(keep, turned, direction), mask=inside)
    tl.store(guideds + row, guided, mask=inside)
    tl.store(numbers + scope, guided_norm)
    tl.store(numbers + scopes + scope, factor)
    tl.store(numbers + 2 * scopes + scope, coherence)
    tl.store(numbers + 3 * scopes + scope, scale)
    tl.store(remembered + 5 * scope, tl.where(keep, new_mass, mass))
    tl.store(remembered + 5 * scope + 1, tl.where(keep, new_square, square))
    tl.store(remembered + 5 * scope + 2, tl.where(keep, new_weight, weight))
    tl.store(remembered + 5 * scope + 3, tl.where(keep, new_mean, mean))
    tl.store(remembered + 5 * scope + 4, tl.where(keep, new_spread, spread))


# What the update is multiplied by may begin anywhere; that must not be a reason to compile anew.
@triton.jit(do_not_specialize_on_alignment=["scales"])
def limit(
    gram, finite, scales, counts, settings, wanteds, ROWS: tl.constexpr, SIZE: tl.constexpr,
    SOURCE_COUNT: tl.constexpr, SCALED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """What the rules leave of one scope's update.

    Args:
        gram: float64 [scopes, ROWS, ROWS], of the update's span.
        finite: bool.
        scales: float64 [scopes], what the update is multiplied by first, with SCALED.
        counts: float64 [scopes], how many numbers there are.
        settings: float64, the bound relative to the parameters' length, with BOUNDED.
        wanteds: float64 [scopes, ROWS], coordinates.
        SOURCE_COUNT: how many rows at the end are sources that the update must not conflict with.
    """
    scope = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SIZE)
    g = load_gram(gram, scope, ROWS, SIZE)
    one = tl.full([SIZE], 1.0, tl.float64)
    update = tl.where(lanes == UPDATE, one, 0.0)
    wanted = update
    if SCALED:
        wanted = wanted * tl.load(scales + scope)
    if BOUNDED:
        length = norm(g, tl.where(lanes == BEFORE, one, 0.0))
        least = LEAST * tl.sqrt(tl.load(counts + scope))
        bound = tl.load(settings) * tl.where(length < least, least, length)
        wanted = wanted * clip(norm(g, wanted), bound)
    if SOURCE_COUNT > 0:
        wanted = -projected(g, -wanted, ROWS - SOURCE_COUNT, SOURCE_COUNT, SIZE)
    wanted = tl.where(tl.load(finite) != 0, wanted, update)
    tl.store(wanteds + scope * ROWS + lanes, wanted, mask=lanes < ROWS)
