"""What the rules decide, in the order in which they act, on Gram matrices alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradguide.rules import alignment as aligning
from gradguide.rules import direction as directing
from gradguide.rules import magnitude as bounding
from gradguide.rules.alignment import Alignment
from gradguide.rules.direction import Average, Direction
from gradguide.rules.magnitude import LogNorms, Magnitude
from gradguide.rules.span import Span, divide

__all__ = [
    "BEFORE",
    "DIRECTION",
    "GRADIENT",
    "LEAST_FACTOR",
    "SOURCES",
    "STATISTICS",
    "UPDATE",
    "Decision",
    "Limit",
    "Rules",
    "decide",
    "limit",
    "limit_unmade",
]

# Rows of the step's span: gradient, running direction, sources, and last what a regularizer adds to the gradient.
GRADIENT, DIRECTION, SOURCES = 0, 1, 2
# Rows of the update's span: the update, the parameters before it, sources. The sources have the same place in both.
UPDATE, BEFORE = 0, 1

LEAST_FACTOR = float(torch.finfo(torch.float32).tiny)
"""A factor of the update below this counts as 0: float32 holds smaller ones with few digits."""

STATISTICS = ("mass", "square", "log_weight", "log_mean", "log_spread")
"""What is remembered of a scope between steps: see ``Average`` and ``LogNorms``."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules that are on; None for one that is off."""

    direction: Direction | None
    alignment: Alignment | None
    magnitude: Magnitude | None

    @property
    def sources(self) -> int:
        """How many sources the alignment has."""
        return 0 if self.alignment is None else len(self.alignment.sources)

    @property
    def max_update(self) -> float | None:
        """The bound of the update."""
        return None if self.magnitude is None else self.magnitude.max_update

    @property
    def gradient_sources(self) -> int:
        """How many sources the gradient is freed of conflicts with: the first ones."""
        return self.alignment.projected if self.alignment is not None and self.alignment.on == "gradient" else 0

    @property
    def update_sources(self) -> int:
        """How many sources the update is freed of conflicts with: the first ones, then the last rows of its span."""
        return self.alignment.projected if self.alignment is not None and self.alignment.on == "update" else 0

    @property
    def limit_update(self) -> bool:
        """Whether the update has to be measured, since a rule acts on it."""
        return self.update_sources > 0 or self.max_update is not None


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided on a step, over S scopes.

    gradient, direction (Tensor): shape [S, R], coordinates of the guided gradient and of the new direction.
    guided (Tensor): shape [S, R], of the guided gradient before clipping.
    norm, factor (Tensor): shape [S], its length, and what clipping multiplied it by.
    coherence, damping (Tensor | None): shape [S], None without a direction. ``damping`` is the share of the part
        orthogonal to the direction that was removed.
    go (Tensor): 0-d float32, 1 if the step is to be made, else 0.
    """

    gradient: Tensor
    direction: Tensor
    guided: Tensor
    norm: Tensor
    factor: Tensor
    coherence: Tensor | None
    damping: Tensor | None
    go: Tensor


@dataclass(frozen=True, slots=True)
class Limit:
    """What the rules leave of the base's own update, over S scopes.

    scale (Tensor): shape [S], what the update is multiplied by.
    coefficients (Tensor | None): of an update that was made, shape [S, 2 + K]: the new parameters as a combination of
        the parameters after the base's step, those before it, and the sources. Of one that was not made yet, shape
        [S, R]: what is added to the update, as a combination of the step's rows; None where nothing ever is.
    factor (Tensor): shape [S], what the bound multiplied the update by; 1 where there is no bound.
    length, norm (Tensor): shape [S], the length of the base's update, and of what is left of it.
    """

    scale: Tensor
    coefficients: Tensor | None
    factor: Tensor
    length: Tensor
    norm: Tensor


def decide(
    span: Span,
    rules: Rules,
    statistics: Tensor,
    positions: Tensor,
    totals: Tensor,
    *,
    finite: Tensor | None = None,
    regularized: bool = False,
    rates: tuple[Tensor, Tensor] | None = None,
) -> Decision:
    """Return the guided gradient and the new running direction, and update statistics and totals.

    Args:
        span: rows of gradient, direction and sources.
        statistics (Tensor): shape [T, len(STATISTICS)], changed in place at ``positions`` [S].
        totals (Tensor): shape [2], steps made and steps left out, changed in place. A step whose gradients are all
            zero, as a checkpoint loader makes to allocate state, is none.
        finite (Tensor | None): 0-d bool, whether all products are finite, if that is known. If they are not, direction
            and statistics stay as they were, and the gradient as received.
        regularized: whether the last row is to be added to the gradient.
        rates: decay and gain of the base's momentum per scope, each a Tensor [S], where the direction is that.
    """
    finite = span.gram.isfinite().all() if finite is None else finite
    known = statistics[positions]
    average, norms = Average(*known[:, :2].unbind(1)), LogNorms(*known[:, 2:].unbind(1))
    gradient, direction = span.row(GRADIENT), span.row(DIRECTION)
    received, length = span.lengths[:, GRADIENT], span.lengths[:, DIRECTION]

    guided, damping = gradient if not regularized else gradient + span.row(-1), None
    if rules.direction is not None:
        damping = rules.direction.damping * directing.evidence(length, average)
        if rules.direction.damping > 0:
            guided = directing.damp(span, guided, direction, damping)
    if rules.alignment is not None:
        if any(rules.alignment.weights):
            guided = aligning.pull(guided, received, SOURCES, rules.alignment.weights)
        if rules.gradient_sources:
            guided = aligning.project(span, guided, SOURCES, SOURCES + rules.gradient_sources)

    guided, norm, ceiling = span.extent(guided)
    factor = torch.ones_like(norm)
    new_norms = norms
    if rules.magnitude is not None:
        bound = torch.full_like(norm, rules.magnitude.bound)
        if rules.magnitude.adaptive:
            bound = torch.minimum(bound, bounding.threshold(norms))
            new_norms = bounding.observe(norms, norm)
        factor = bounding.clip(ceiling, bound)
    final = guided * factor.unsqueeze(1)

    moved, new_average, coherence = direction, average, None
    if rules.direction is not None:
        if rates is not None:
            # The base adds the guided gradient itself; only the statistics are ours.
            ahead, new_average = directing.accumulate(direction, final, norm * factor, average, *rates)
        else:
            decay = torch.full_like(norm, rules.direction.decay)
            term = gradient * divide(torch.ones_like(received), received).unsqueeze(1)
            unit = torch.where(received > 0, 1.0, 0.0)
            ahead, new_average = directing.accumulate(direction, term, unit, average, decay, 1.0 - decay)
            moved = ahead
        coherence = directing.coherence(span.norm(ahead), new_average)
    remembered = torch.stack([*new_average, *new_norms], dim=1)
    statistics[positions] = torch.where(finite, remembered, known)
    any_moved = (span.gram[:, GRADIENT, GRADIENT] != 0).any()
    totals += torch.stack([any_moved & finite, ~finite])
    return Decision(
        gradient=torch.where(finite, final, gradient),
        direction=torch.where(finite, moved, direction),
        guided=guided,
        norm=norm,
        factor=factor,
        coherence=coherence,
        damping=damping,
        go=finite.to(torch.float32),
    )


def limit(span: Span, rules: Rules, numbers: Tensor) -> Limit:
    """Return what the rules leave of an update that the base made.

    The new parameters are ``scale * after + (1 - scale) * before`` plus multiples of the sources. So nothing cancels,
    however far the base's update went, and a scale of 1 leaves every bit as the base wrote it.

    A scope whose update cannot be measured, because it holds Inf or NaN or its square overflows, goes back to the
    parameters before the step where the update is bounded. Without a bound it keeps the base's update.

    Args:
        span: rows of the update, of the parameters before it, and of the sources.
        numbers (Tensor): shape [S], how many numbers each scope has.
    """
    update = span.row(UPDATE)
    length, before = span.lengths[:, UPDATE], span.lengths[:, BEFORE]
    # A step raises the source loss where it goes along the source gradient.
    wanted = -aligning.project(span, -update, first=SOURCES) if rules.update_sources else update
    wanted, norm, ceiling = span.extent(wanted)
    lost = ~span.gram.isfinite().flatten(1).all(dim=1)
    if rules.max_update is None:
        factor = torch.ones_like(norm)
        wanted, norm = torch.where(lost.unsqueeze(1), update, wanted), norm.masked_fill(lost, torch.nan)
    else:
        factor = bounding.shrink(torch.maximum(length, ceiling), before, numbers, rules.max_update)
        lost |= factor < LEAST_FACTOR
        factor = factor.masked_fill(lost, 0.0)
        wanted = (wanted * factor.unsqueeze(1)).masked_fill(lost.unsqueeze(1), 0.0)
        norm = (norm * factor).masked_fill(lost, 0.0)
    scale = wanted[:, UPDATE]
    wanted[:, BEFORE] = 1.0 - scale
    return Limit(scale, wanted, factor, length, norm)


def limit_unmade(step: Span, products: Tensor, rules: Rules, numbers: Tensor) -> Limit:
    """Return the same for an update that was not made yet, whose products with the rows of the step are known.

    Args:
        step: span of the step, whose sources are those at the parameters where the update begins.
        products (Tensor): shape [S, 2 + K], of the update and of the parameters with themselves, and of the update
            with each source where it is aligned.
        numbers (Tensor): as in :func:`limit`.
    """
    count = rules.update_sources
    sources = slice(SOURCES, SOURCES + count)
    gram = products.new_zeros(len(products), SOURCES + count, SOURCES + count)
    gram[:, UPDATE, UPDATE] = products[:, 0]
    gram[:, BEFORE, BEFORE] = products[:, 1]
    gram[:, UPDATE, sources] = gram[:, sources, UPDATE] = products[:, 2:]
    gram[:, sources, sources] = step.gram[:, sources, sources]
    made = limit(Span(gram, step.rounding), rules, numbers)
    if not count:
        return replace(made, coefficients=None)
    assert made.coefficients is not None
    pulls = torch.zeros_like(step.gram[:, 0])
    pulls[:, sources] = made.coefficients[:, sources]
    return replace(made, coefficients=pulls)
