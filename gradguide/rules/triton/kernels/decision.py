"""Both decisions of a step, on the device: see ``gradguide.rules.decision``."""

from __future__ import annotations

import triton
import triton.language as tl

from gradguide.rules import decision as rules
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

__all__ = ["decide", "limit", "limit_unmade"]

GRADIENT: tl.constexpr = tl.constexpr(rules.GRADIENT)
DIRECTION: tl.constexpr = tl.constexpr(rules.DIRECTION)
SOURCES: tl.constexpr = tl.constexpr(rules.SOURCES)
UPDATE: tl.constexpr = tl.constexpr(rules.UPDATE)
BEFORE: tl.constexpr = tl.constexpr(rules.BEFORE)
KEPT: tl.constexpr = tl.constexpr(len(rules.STATISTICS))

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


@triton.jit
def is_finite(values, count, BLOCK: tl.constexpr):
    """Whether ``count`` numbers all are."""
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        value = tl.load(values + places, mask=places < count, other=0.0)
        wrong += tl.where((value == value) & (tl.abs(value) != float("inf")), 0, 1)
    return tl.sum(wrong) == 0


@triton.jit
def any_moved(gram, scopes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """How many scopes' gradients are not zero."""
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, scopes, BLOCK):
        places = start + tl.arange(0, BLOCK)
        found += tl.where(tl.load(gram + places * ROWS * ROWS, mask=places < scopes, other=0.0) != 0.0, 1, 0)
    return tl.sum(found)


@triton.jit(do_not_specialize=["scopes"])
def decide(
    gram, statistics, positions, totals, settings, decays, gains, gradients, directions, guideds, numbers, go, scopes,
    PROPAGATE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    SOURCE_COUNT: tl.constexpr, REGULARIZED: tl.constexpr,
    DIRECTED: tl.constexpr, DAMPED: tl.constexpr, SHARED: tl.constexpr, PULLED: tl.constexpr,
    PROJECTED: tl.constexpr, CLIPPED: tl.constexpr, ADAPTIVE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One scope's decision.

    Args:
        gram: float64 [scopes, ROWS, ROWS].
        statistics: float64 [.., KEPT], changed in place at this scope's of ``positions``, int64 [scopes].
        totals: float64 [2], steps made and steps left out, which the first program counts.
        settings: float64: damping, decay of the direction, bound of the gradient, power of the coherence, then the
            weight of each source.
        decays, gains: float64 [scopes], of the momentum that is the direction, with SHARED.
        gradients, directions, guideds: float64 [scopes, ROWS], coordinates: guided and clipped, new direction, guided.
        numbers: float64 [4, scopes]: norm, factor of clipping, coherence, scale of the update.
        go: float32, where it goes whether the step is to be made: 1 or 0.
        PROJECTED: of how many sources, the first ones, the gradient is freed.
    """
    scope = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SIZE)
    g = load_gram(gram, scope, ROWS, SIZE)
    # Each program finds it out for all scopes: there are few numbers, and no other launch to ask.
    keep = is_finite(gram, scopes * ROWS * ROWS, BLOCK)
    if scope == 0:
        made = tl.full([], 1.0, tl.float32) if PROPAGATE else tl.where(keep, 1.0, 0.0)
        moved = any_moved(gram, scopes, ROWS, BLOCK) != 0
        tl.store(go, made)
        tl.store(totals, tl.load(totals) + tl.where(moved & (made != 0), 1.0, 0.0))
        tl.store(totals + 1, tl.load(totals + 1) + 1.0 - made)
    known = statistics + KEPT * tl.load(positions + scope)
    mass, square, weight, mean, spread = (
        tl.load(known), tl.load(known + 1), tl.load(known + 2), tl.load(known + 3), tl.load(known + 4)
    )  # fmt: skip
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
    if PROJECTED > 0:
        guided = projected(g, guided, SOURCES, PROJECTED, SIZE)

    guided_norm = norm(g, guided)
    factor = tl.full([], 1.0, tl.float64)
    new_weight, new_mean, new_spread = weight, mean, spread
    if CLIPPED:
        bound = tl.load(settings + 2)
        if ADAPTIVE:
            largest = threshold(weight, mean, spread)
            bound = atmost(bound, largest)
            counted = atmost(guided_norm, largest)
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
    tl.store(known, tl.where(keep, new_mass, mass))
    tl.store(known + 1, tl.where(keep, new_square, square))
    tl.store(known + 2, tl.where(keep, new_weight, weight))
    tl.store(known + 3, tl.where(keep, new_mean, mean))
    tl.store(known + 4, tl.where(keep, new_spread, spread))


@triton.jit
def limited(
    g, update, factor, counts, settings, scope, ROWS: tl.constexpr, SIZE: tl.constexpr, SOURCE_COUNT: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Coordinates of what the rules leave of ``factor`` times the update."""
    lanes = tl.arange(0, SIZE)
    wanted = update * factor
    if BOUNDED:
        length = norm(g, tl.where(lanes == BEFORE, 1.0, 0.0).to(tl.float64))
        least = LEAST * tl.sqrt(tl.load(counts + scope))
        bound = tl.load(settings) * tl.where(length < least, least, length)
        wanted = wanted * clip(norm(g, wanted), bound)
    if SOURCE_COUNT > 0:
        wanted = -projected(g, -wanted, ROWS - SOURCE_COUNT, SOURCE_COUNT, SIZE)
    return wanted


# What the update is multiplied by may begin anywhere; that must not be a reason to compile anew.
@triton.jit(do_not_specialize=["scopes"], do_not_specialize_on_alignment=["scales"])
def limit(
    gram, scales, counts, settings, wanteds, scopes, ROWS: tl.constexpr, SIZE: tl.constexpr,
    SOURCE_COUNT: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the rules leave of one scope's update.

    Args:
        gram: float64 [scopes, ROWS, ROWS], of the update's span.
        scales: float64 [scopes], what the update is multiplied by first.
        counts: float64 [scopes], how many numbers there are.
        settings: float64, the bound relative to the parameters' length, with BOUNDED.
        wanteds: float64 [scopes, ROWS], coordinates.
        SOURCE_COUNT: how many rows at the end are sources that the update must not conflict with.
    """
    scope = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SIZE)
    g = load_gram(gram, scope, ROWS, SIZE)
    update = tl.where(lanes == UPDATE, 1.0, 0.0).to(tl.float64)
    wanted = limited(g, update, tl.load(scales + scope), counts, settings, scope, ROWS, SIZE, SOURCE_COUNT, BOUNDED)
    wanted = tl.where(is_finite(gram, scopes * ROWS * ROWS, BLOCK), wanted, update)
    tl.store(wanteds + scope * ROWS + lanes, wanted, mask=lanes < ROWS)


@triton.jit(do_not_specialize=["scopes"], do_not_specialize_on_alignment=["scales"])
def limit_unmade(
    step, products, scales, counts, settings, factors, pulls, scopes, STEP_ROWS: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, SOURCE_COUNT: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for an update that was not made yet.

    Args:
        step: float64 [scopes, STEP_ROWS, STEP_ROWS], of the step's span.
        products: float64 [scopes, 2 + SOURCE_COUNT], of the update and of the parameters with themselves, and of the
            update with each source.
        factors: float64 [scopes], what the update is to be multiplied by.
        pulls: float64 [scopes, STEP_ROWS], in the step's span what is to be added to it, with sources.
        ROWS: of the update's span.

    The others are those of ``limit``.
    """
    scope = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SIZE)
    first: tl.constexpr = ROWS - SOURCE_COUNT
    i, j = lanes[:, None], lanes[None, :]
    known = products + scope * (2 + SOURCE_COUNT)
    # With the update stands each source's product, and beside the sources what the step has of them.
    row, column = tl.minimum(i, j), tl.maximum(i, j)
    crossed = (row == UPDATE) & (column >= first) & (column < ROWS)
    g = tl.load(known + 2 + column - first, mask=crossed, other=0.0)
    g += tl.where((i == UPDATE) & (j == UPDATE), tl.load(known), 0.0)
    if BOUNDED:
        g += tl.where((i == BEFORE) & (j == BEFORE), tl.load(known + 1), 0.0)
    sources = (row >= first) & (column < ROWS)
    entry = scope * STEP_ROWS * STEP_ROWS + (i - first + SOURCES) * STEP_ROWS + j - first + SOURCES
    g += tl.load(step + entry, mask=sources, other=0.0)

    update = tl.where(lanes == UPDATE, 1.0, 0.0).to(tl.float64)
    wanted = limited(g, update, tl.load(scales + scope), counts, settings, scope, ROWS, SIZE, SOURCE_COUNT, BOUNDED)
    keep = is_finite(products, scopes * (2 + SOURCE_COUNT), BLOCK)
    if SOURCE_COUNT > 0:
        keep = keep & is_finite(step, scopes * STEP_ROWS * STEP_ROWS, BLOCK)
    wanted = tl.where(keep, wanted, update)
    tl.store(factors + scope + 0 * lanes, wanted, mask=lanes == UPDATE)
    if SOURCE_COUNT > 0:
        place = lanes - first + SOURCES
        is_source = (lanes >= first) & (lanes < ROWS)
        row_of = pulls + scope * STEP_ROWS
        tl.store(row_of + place, wanted, mask=is_source)
        # Rows of the step that are no sources: those before them, and what a regularizer adds.
        for other in tl.static_range(STEP_ROWS):
            if other < SOURCES or other >= SOURCES + SOURCE_COUNT:
                tl.store(row_of + other, 0.0)
