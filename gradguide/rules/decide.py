"""Apply the rules in order, on Gram matrices only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradguide.rules import alignment as aligning
from gradguide.rules import direction as directing
from gradguide.rules import magnitude as bounding
from gradguide.rules.alignment import Alignment
from gradguide.rules.direction import Average, Direction
from gradguide.rules.magnitude import Magnitude
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
    "constrain",
    "constrain_preview",
    "decide",
]

# Rows of the step's span: gradient, running direction, sources, and last the gradient of a regularizer.
GRADIENT, DIRECTION, SOURCES = 0, 1, 2
# Rows of the update's span: the update, the parameters before it, sources. Sources start at SOURCES in both spans.
UPDATE, BEFORE = 0, 1

LEAST_FACTOR = float(torch.finfo(torch.float32).tiny)
"""Smaller factors of the update count as 0, because they are subnormal in float32."""

STATISTICS = ("mass", "square")
"""The statistics of a scope between steps: see ``Average``."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The enabled rules; None is a disabled one."""

    direction: Direction | None
    alignment: Alignment | None
    magnitude: Magnitude | None

    def __post_init__(self) -> None:
        # Unpickling skips the checks, and fields of earlier versions would be read as others.
        for options in (self.direction, self.magnitude):
            if options is not None:
                options.__post_init__()

    @property
    def active(self) -> bool:
        """Return whether any rule is enabled."""
        return not (self.direction is None and self.alignment is None and self.magnitude is None)

    @property
    def source_count(self) -> int:
        """Return the number of sources."""
        return 0 if self.alignment is None else len(self.alignment.sources)

    @property
    def share_momentum(self) -> bool:
        """Return whether the base's momentum is the direction."""
        return self.direction is not None and self.direction.share_momentum

    @property
    def max_update(self) -> float | None:
        """Return the relative bound of the update, None if it is unbounded."""
        return None if self.magnitude is None else self.magnitude.max_update

    @property
    def gradient_source_count(self) -> int:
        """Return the number of sources that the gradient is projected on: the first ones."""
        return self.alignment.projected if self.alignment is not None and self.alignment.on == "gradient" else 0

    @property
    def update_source_count(self) -> int:
        """Return the number of sources that the update is projected on: the first ones, the last rows of its span."""
        return self.alignment.projected if self.alignment is not None and self.alignment.on == "update" else 0

    @property
    def limit_update(self) -> bool:
        """Return whether a rule acts on the update. Then the update has to be measured."""
        return self.update_source_count > 0 or self.max_update is not None


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision of a step, over S scopes.

    guided (Tensor): shape [S, R], coordinates of the guided gradient before clipping.
    guided_norm, clip_factor (Tensor): shape [S], norm of ``guided``, and its clipping factor.
    clipped (Tensor): shape [S, R], coordinates of the gradient that the base receives: the guided gradient after
        clipping, or the gradient as received if the step is skipped.
    direction (Tensor): shape [S, R], coordinates of the new direction.
    coherence, damping (Tensor | None): shape [S], None without a direction. ``damping`` is the removed share of the
        part orthogonal to the direction.
    go (Tensor): 0-d float32, 0 if the step is skipped, else 1.
    """

    guided: Tensor
    guided_norm: Tensor
    clip_factor: Tensor
    clipped: Tensor
    direction: Tensor
    coherence: Tensor | None
    damping: Tensor | None
    go: Tensor


@dataclass(frozen=True, slots=True)
class Limit:
    """The base's update under the constraints of the rules, over S scopes.

    scale (Tensor): shape [S], factor of the update.
    coefficients (Tensor | None): of an update already made, shape [S, 2 + K]: the new parameters as a combination of
        the parameters after the base's step, those before it, and the sources. Of a preview, shape [S, R]: the
        addition to the update, as a combination of the step's rows; None if the rules never add anything.
    factor (Tensor): shape [S], factor of the bound; 1 without a bound.
    norm_before, norm_after (Tensor): shape [S], norm of the base's update before and after the constraints.
    """

    scale: Tensor
    coefficients: Tensor | None
    factor: Tensor
    norm_before: Tensor
    norm_after: Tensor


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
        totals (Tensor): shape [2], steps made and steps skipped, changed in place. A step whose gradients are all
            zero is not counted: a checkpoint loader makes one to allocate state.
        finite (Tensor | None): 0-d bool, whether all products are finite; None computes it. If they are not, the
            direction, the statistics and the gradient stay unchanged.
        regularized: whether to add the last row to the gradient.
        rates: decay and gain of the base's momentum per scope, each a Tensor [S], if the momentum is the direction.
    """
    finite = span.gram.isfinite().all() if finite is None else finite
    stored = statistics[positions]
    known = dict(zip(STATISTICS, stored.unbind(1), strict=True))
    average = Average(known["mass"], known["square"])
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
        if rules.gradient_source_count:
            guided = aligning.project(span, guided, SOURCES, SOURCES + rules.gradient_source_count)

    guided, norm, ceiling = span.extent(guided)
    factor = torch.ones_like(norm)
    if rules.magnitude is not None:
        factor = bounding.clip(ceiling, rules.magnitude.max_norm)
    factor = factor * bounding.fit(span, guided * factor.unsqueeze(1), GRADIENT)
    final = guided * factor.unsqueeze(1)

    moved, new_average, coherence = direction, average, None
    if rules.direction is not None:
        if rates is not None:
            # The base adds the guided gradient to its momentum, so only the statistics change here.
            ahead, new_average = directing.accumulate(direction, final, norm * factor, average, *rates)
        else:
            decay = torch.full_like(norm, rules.direction.decay)
            term = gradient * divide(torch.ones_like(received), received).unsqueeze(1)
            unit = torch.where(received > 0, 1.0, 0.0)
            ahead, new_average = directing.accumulate(direction, term, unit, average, decay, 1.0 - decay)
            moved = ahead
        coherence = directing.coherence(span.norm(ahead), new_average)
    known |= new_average._asdict()
    statistics[positions] = torch.where(finite, torch.stack([known[name] for name in STATISTICS], dim=1), stored)
    any_moved = (span.gram[:, GRADIENT, GRADIENT] != 0).any()
    totals += torch.stack([any_moved & finite, ~finite])
    return Decision(
        guided=guided,
        guided_norm=norm,
        clip_factor=factor,
        clipped=torch.where(finite, final, gradient),
        direction=torch.where(finite, moved, direction),
        coherence=coherence,
        damping=damping,
        go=finite.to(torch.float32),
    )


def constrain(span: Span, rules: Rules, numbers: Tensor) -> Limit:
    """Constrain an update that the base already made: project it on the sources, and bound it.

    The new parameters are ``scale * after + (1 - scale) * before`` plus multiples of the sources. This form avoids
    cancellation for updates of any size, and a scale of 1 keeps every bit of the base's parameters.

    The update of a scope cannot be measured if it holds Inf or NaN, or if its square overflows. If the update is
    bounded, such a scope returns to the parameters before the step. Without a bound it keeps the base's update.

    Args:
        span: rows of the update, of the parameters before it, and of the sources.
        numbers (Tensor): shape [S], number of elements of each scope.
    """
    update = span.row(UPDATE)
    length, before = span.lengths[:, UPDATE], span.lengths[:, BEFORE]
    # An update along the source gradient raises the source loss, so the negative update is projected.
    wanted = -aligning.project(span, -update, first=SOURCES) if rules.update_source_count else update
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


def constrain_preview(step: Span, products: Tensor, rules: Rules, numbers: Tensor) -> Limit:
    """Constrain an update before the base makes it, from its products with the rows of the step.

    Args:
        step: span of the step. Its sources are evaluated at the parameters before the update.
        products (Tensor): shape [S, 2 + K]: squared norms of the update and of the parameters, then the products of
            the update with each of the K sources that it is projected on.
        numbers (Tensor): as in :func:`constrain`.
    """
    count = rules.update_source_count
    sources = slice(SOURCES, SOURCES + count)
    gram = products.new_zeros(len(products), SOURCES + count, SOURCES + count)
    gram[:, UPDATE, UPDATE] = products[:, 0]
    gram[:, BEFORE, BEFORE] = products[:, 1]
    gram[:, UPDATE, sources] = gram[:, sources, UPDATE] = products[:, 2:]
    gram[:, sources, sources] = step.gram[:, sources, sources]
    made = constrain(Span(gram, step.rounding), rules, numbers)
    if not count:
        return replace(made, coefficients=None)
    assert made.coefficients is not None
    pulls = torch.zeros_like(step.gram[:, 0])
    pulls[:, sources] = made.coefficients[:, sources]
    return replace(made, coefficients=pulls)
