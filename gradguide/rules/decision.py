"""What the rules decide, in the order in which they act, on Gram matrices alone."""

from __future__ import annotations

from dataclasses import dataclass

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
    "SOURCES",
    "STATISTICS",
    "UPDATE",
    "Decision",
    "Rules",
    "decide",
    "limit",
    "limit_unmade",
]

# Rows of the step's span: gradient, running direction, sources, and last what a regularizer adds to the gradient.
GRADIENT, DIRECTION, SOURCES = 0, 1, 2
# Rows of the update's span: the update, the parameters before it where it is bounded, then the sources.
UPDATE, BEFORE = 0, 1

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
    def power(self) -> float:
        """The power of the coherence by which updates are multiplied."""
        return 0.0 if self.magnitude is None else self.magnitude.coherence

    @property
    def max_update(self) -> float | None:
        """The bound of the update."""
        return None if self.magnitude is None else self.magnitude.max_update

    @property
    def bounds_update(self) -> bool:
        """Whether the update is bounded: then the parameters before it are a row of its span."""
        return self.max_update is not None

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
        return self.update_sources > 0 or self.bounds_update

    @property
    def first_source(self) -> int:
        """The first source's row in the update's span."""
        return BEFORE + self.bounds_update


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided on a step, over S scopes.

    gradient, direction (Tensor): shape [S, R], coordinates of the guided gradient and of the new direction.
    guided (Tensor): shape [S, R], of the guided gradient before clipping.
    norm, factor (Tensor): shape [S], its length, and what clipping multiplied it by.
    coherence (Tensor | None): shape [S], None without a direction.
    scale (Tensor): shape [S], what the update is multiplied by.
    go (Tensor): 0-d float32, 1 if the step is to be made, else 0.
    """

    gradient: Tensor
    direction: Tensor
    guided: Tensor
    norm: Tensor
    factor: Tensor
    coherence: Tensor | None
    scale: Tensor
    go: Tensor


def decide(
    span: Span,
    rules: Rules,
    statistics: Tensor,
    positions: Tensor,
    totals: Tensor,
    *,
    finite: Tensor | None = None,
    propagate: bool = False,
    regularized: bool = False,
    rates: tuple[Tensor, Tensor] | None = None,
) -> Decision:
    """The guided gradient, the new running direction and statistics, and how far to scale the update.

    Args:
        span: rows of gradient, direction and sources.
        statistics (Tensor): shape [T, len(STATISTICS)], changed in place at ``positions`` [S].
        totals (Tensor): shape [2], steps made and steps left out, changed in place. A step whose gradients are all
            zero, as a checkpoint loader makes to allocate state, is none.
        finite (Tensor | None): 0-d bool, whether all products are finite, if that is known. If they are not, direction
            and statistics stay as they were, and the gradient as received.
        propagate: whether the step is made nevertheless.
        regularized: whether the last row is to be added to the gradient.
        rates: decay and gain of the base's momentum per scope, each a Tensor [S], where the direction is that.
    """
    finite = span.gram.isfinite().all() if finite is None else finite
    known = statistics[positions]
    average, norms = Average(*known[:, :2].unbind(1)), LogNorms(*known[:, 2:].unbind(1))
    gradient, direction = span.row(GRADIENT), span.row(DIRECTION)
    received, length = span.norm(gradient), span.norm(direction)

    guided = gradient if not regularized else gradient + span.row(-1)
    if rules.direction is not None and rules.direction.damping > 0:
        strength = rules.direction.damping * directing.evidence(length, average)
        guided = directing.damp(span, guided, direction, strength)
    if rules.alignment is not None:
        if any(rules.alignment.weights):
            guided = aligning.pull(guided, received, SOURCES, rules.alignment.weights)
        if rules.gradient_sources:
            guided = aligning.project(span, guided, SOURCES, SOURCES + rules.gradient_sources)

    norm = span.norm(guided)
    factor = torch.ones_like(norm)
    new_norms = norms
    if rules.magnitude is not None:
        bound = torch.full_like(norm, rules.magnitude.bound)
        if rules.magnitude.adaptive:
            bound = torch.minimum(bound, bounding.threshold(norms))
            new_norms = bounding.observe(norms, norm)
        factor = bounding.clip(norm, bound)
    final = guided * factor.unsqueeze(1)

    moved, new_average, coherence, scale = direction, average, None, torch.ones_like(norm)
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
        if rules.power > 0:
            agreed = torch.where(new_average.mass > 0, coherence, 1.0)
            scale = torch.where(finite, agreed**rules.power, 1.0)
    remembered = torch.stack([*new_average, *new_norms], dim=1)
    statistics[positions] = torch.where(finite, remembered, known)
    go = torch.ones_like(finite) if propagate else finite
    any_moved = (span.gram[:, GRADIENT, GRADIENT] != 0).any()
    totals += torch.stack([any_moved & go, ~go])
    return Decision(
        gradient=torch.where(finite, final, gradient),
        direction=torch.where(finite, moved, direction),
        guided=guided,
        norm=norm,
        factor=factor,
        coherence=coherence,
        scale=scale,
        go=go.to(torch.float32),
    )


def limit(span: Span, rules: Rules, scale: Tensor, numbers: Tensor) -> Tensor:
    """What the rules leave of the base's own update.

    Args:
        span: rows of the update, of the parameters before it where it is bounded, and of the sources where it is
            aligned.
        scale (Tensor): shape [S], what it is multiplied by first.
        numbers (Tensor): shape [S], how many numbers each scope has.

    Returns:
        Coordinates [S, R]; the update itself where anything is not finite.
    """
    update = span.row(UPDATE)
    wanted = update * scale.unsqueeze(1)
    if rules.max_update is not None:
        lengths = span.norm(wanted), span.norm(span.row(BEFORE))
        wanted = wanted * bounding.shrink(*lengths, numbers, rules.max_update).unsqueeze(1)
    if rules.update_sources:
        # A step raises the source loss where it goes along the source gradient.
        wanted = -aligning.project(span, -wanted, first=rules.first_source)
    return torch.where(span.gram.isfinite().all(), wanted, update)


def limit_unmade(
    step: Span, products: Tensor, rules: Rules, scale: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same for an update that was not made yet, whose products with the rows of the step are known.

    Args:
        step: span of the step, whose sources are where the update begins.
        products (Tensor): shape [S, 2 + K], of the update and of the parameters with themselves, and of the update
            with each source where it is aligned.
        scale, numbers (Tensor): as in :func:`limit`.

    Returns:
        What the update is to be multiplied by, Tensor [S], and in coordinates of the step's span what is to be added to
        it, Tensor [S, R], or None where nothing ever is.
    """
    count = rules.update_sources
    first, sources = rules.first_source, slice(SOURCES, SOURCES + count)
    gram = products.new_zeros(len(products), first + count, first + count)
    gram[:, UPDATE, UPDATE] = products[:, 0]
    if rules.bounds_update:
        gram[:, BEFORE, BEFORE] = products[:, 1]
    gram[:, UPDATE, first:] = gram[:, first:, UPDATE] = products[:, 2:]
    gram[:, first:, first:] = step.gram[:, sources, sources]
    wanted = limit(Span(gram), rules, scale, numbers)
    if not count:
        return wanted[:, UPDATE], None
    pulls = torch.zeros_like(step.gram[:, 0])
    pulls[:, sources] = wanted[:, first:]
    return wanted[:, UPDATE], pulls
