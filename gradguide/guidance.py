"""One guided step: measure the rows, decide in their Gram matrix, combine; then the same on the base's update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide import fused
from gradguide.before import Before
from gradguide.buckets import Bucket
from gradguide.metrics import Record
from gradguide.momentum import momentum_of, rates
from gradguide.ops import Row, Stack, Write
from gradguide.ops.pack import lay_out
from gradguide.rules import alignment as aligning
from gradguide.rules import direction as directing
from gradguide.rules import magnitude as bounding
from gradguide.rules.alignment import Alignment
from gradguide.rules.direction import Direction
from gradguide.rules.magnitude import Magnitude
from gradguide.rules.span import Span, divide
from gradguide.scopes import Scopes
from gradguide.sharding import local
from gradguide.sources.source import Source
from gradguide.survey import Rows, Survey, Surveyor, source_rows

__all__ = ["DIRECTION", "GRADIENT", "SOURCES", "Guidance", "Measured"]

# Rows of the step's span: gradient, running direction, sources, and last what a regularizer adds to the gradient.
GRADIENT, DIRECTION, SOURCES = 0, 1, 2
# Rows of the update's span: the update, the parameters before it where it is bounded, then the sources.
UPDATE, BEFORE = 0, 1


@dataclass(slots=True)
class Measured:
    """A step after its measuring pass.

    survey: its parameters, in S scopes.
    rows: for each bucket its R rows.
    span: Gram matrices of the rows, [S, R, R].
    positions (Tensor): shape [S], where the scopes' statistics are kept.
    regularized: whether the last row is to be added to the gradient.
    finite, moved (Tensor): 0-d bool, whether all products are finite, and whether any gradient is not zero.
    gradient, direction (Tensor): shape [S, R], once decided: coordinates of the guided gradient and the new direction.
    scale (Tensor): shape [S], once decided: what the update is multiplied by, if it is scaled.
    """

    survey: Survey
    rows: Rows
    span: Span
    positions: Tensor
    regularized: bool
    finite: Tensor
    moved: Tensor
    record: Record | None = None
    gradient: Tensor | None = None
    direction: Tensor | None = None
    scale: Tensor | None = None


class Guidance:
    """The rules that are on, and what they remember between steps."""

    def __init__(
        self,
        direction: Direction | None,
        alignment: Alignment | None,
        magnitude: Magnitude | None,
        surveyor: Surveyor,
    ) -> None:
        self.direction = direction
        self.magnitude = magnitude
        self.surveyor = surveyor
        self.align(alignment, surveyor.sources)
        self.directions: dict[Tensor, Tensor] = {}
        self.scopes = Scopes()
        self.power = 0.0 if magnitude is None else magnitude.coherence
        self._largest = None if magnitude is None else magnitude.max_update
        self.before = Before()

    def align(self, alignment: Alignment | None, sources: Sequence[Source]) -> None:
        """Align from now on as ``alignment`` says; ``sources`` are its own, then those that a regularizer asks."""
        self.alignment = alignment
        self._sources = slice(0 if alignment is None else len(alignment.sources))
        self.surveyor.ask(sources)

    @property
    def active(self) -> bool:
        """Whether any rule is on."""
        return not (self.direction is None and self.alignment is None and self.magnitude is None)

    @property
    def acts_on_update(self) -> bool:
        """Whether a rule changes the update that the base optimizer makes."""
        return self._aligns_update or self.power > 0 or self._largest is not None

    @property
    def _bounded(self) -> bool:
        return self._largest is not None

    @property
    def _aligns_update(self) -> bool:
        return self.alignment is not None and self.alignment.on == "update" and self.alignment.project

    @torch.no_grad()
    def measure(self, base: Optimizer, added: Mapping[Tensor, Tensor] | None = None) -> Measured | None:
        """Gram matrices of gradient, direction and sources, or None if no parameter has a gradient.

        Args:
            added: by parameter, what a regularizer adds to the gradient: one more row.
        """
        survey = self.surveyor.survey(base)
        if survey is None:
            return None
        sources = survey.sources[self._sources]
        rows: Rows = []
        for bucket in survey.buckets:
            own = [Row(offset=bucket.gradients), self.direction_row(base, bucket)]
            more = [Row(offset=[added[p] for p in bucket.parameters])] if added else []
            rows.append(Stack([*own, *source_rows(sources, bucket, bucket.values), *more]))
        span = survey.gram(rows, SOURCES + len(sources) + bool(added))
        positions = self.scopes.locate(survey.labels, span.gram.device)
        finite, moved = span.gram.isfinite().all(), (span.gram[:, GRADIENT, GRADIENT] != 0).any()
        return Measured(survey, rows, span, positions, bool(added), finite, moved)

    @torch.no_grad()
    def guide(self, measured: Measured, base: Optimizer) -> None:
        """Decide: the guided gradient, the new running direction and statistics, and how far to scale the update."""
        span, positions = measured.span, measured.positions
        average, norms = self.scopes.read(positions)
        gradient, direction = span.row(GRADIENT), span.row(DIRECTION)
        received, length = span.norm(gradient), span.norm(direction)

        guided = gradient if not measured.regularized else gradient + span.row(-1)
        if self.direction is not None and self.direction.damping > 0:
            strength = self.direction.damping * directing.evidence(length, average)
            guided = directing.damp(span, guided, direction, strength)
        if self.alignment is not None:
            if any(self.alignment.weights):
                guided = aligning.pull(guided, received, SOURCES, self.alignment.weights)
            if self.alignment.project and self.alignment.on == "gradient":
                guided = aligning.project(span, guided, SOURCES, SOURCES + len(self.alignment.sources))

        norm = span.norm(guided)
        factor = torch.ones_like(norm)
        new_norms = norms
        if self.magnitude is not None:
            bound = torch.full_like(norm, self.magnitude.bound)
            if self.magnitude.adaptive:
                bound = torch.minimum(bound, bounding.threshold(norms))
                new_norms = bounding.observe(norms, norm)
            factor = bounding.clip(norm, bound)
        final = guided * factor.unsqueeze(1)

        moved, new_average, coherence = direction, average, None
        if self.direction is not None:
            if self.direction.share_momentum:
                decay, gain = self._rates(measured, base)
                # The base adds the guided gradient itself; only the statistics are ours.
                ahead, new_average = directing.accumulate(direction, final, norm * factor, average, decay, gain)
            else:
                decay = torch.full_like(norm, self.direction.decay)
                term = gradient * divide(torch.ones_like(received), received).unsqueeze(1)
                unit = torch.where(received > 0, 1.0, 0.0)
                ahead, new_average = directing.accumulate(direction, term, unit, average, decay, 1.0 - decay)
                moved = ahead
            coherence = directing.coherence(span.norm(ahead), new_average)

        # What is not finite must not enter the direction or the statistics; the gradient then stays as received.
        finite = measured.finite
        final, moved = torch.where(finite, final, gradient), torch.where(finite, moved, direction)
        self.scopes.write(
            positions,
            directing.Average(*(torch.where(finite, a, b) for a, b in zip(new_average, average, strict=True))),
            bounding.LogNorms(*(torch.where(finite, a, b) for a, b in zip(new_norms, norms, strict=True))),
        )
        measured.gradient, measured.direction = final, moved
        measured.record = Record(span, guided, norm, factor, coherence)
        if self.power > 0 and coherence is not None:
            agreed = torch.where(new_average.mass > 0, coherence, 1.0)
            measured.scale = torch.where(finite, agreed**self.power, 1.0)

    @torch.no_grad()
    def combine(self, measured: Measured) -> None:
        """Write what was decided: the guided gradient and the new running direction."""
        assert measured.gradient is not None and measured.direction is not None
        self.before.know([])
        writes = []
        for (bucket, scope), kept in zip(measured.survey, self._directions_written(measured), strict=True):
            written = [] if kept is None else [Write(into=kept, coefficients=measured.direction[scope])]
            writes.append([*written, Write(into=bucket.gradients, coefficients=measured.gradient[scope])])
        measured.survey.combine_(measured.rows, writes)

    @torch.no_grad()
    def step_fused(self, measured: Measured, base: Optimizer, *, propagate: bool) -> bool:
        """Combine and make the base's step in one pass, if that can be done: see :mod:`gradguide.fused`.

        Args:
            propagate: whether the step is made whatever was measured; else one that is not finite changes nothing.

        Returns:
            Whether it was done; if not, nothing was.
        """
        assert measured.gradient is not None and measured.direction is not None
        survey = measured.survey
        if any(map(_sharded, survey.buckets)):
            return False
        parts = fused.parts_of(
            base, survey.buckets, survey.scopes, measured.rows, self._directions_written(measured), survey.ops
        )
        if parts is None:
            return False
        scale, pulls = measured.scale, None
        if self._aligns_update or self._largest is not None:
            span = self._update_span(measured, parts)
            wanted = self._wanted(measured, span)
            scale = wanted[:, UPDATE]
            if self._aligns_update:
                # In the step's own span, where the sources come after gradient and direction, and before what is left.
                sources = wanted[:, BEFORE + self._bounded :]
                rest = measured.gradient.shape[1] - SOURCES - sources.shape[1]
                pulls = torch.nn.functional.pad(sources, (SOURCES, rest))
        elif scale is None:
            scale = torch.ones_like(measured.gradient[:, 0])
        go = torch.ones_like(measured.finite) if propagate else measured.finite
        squares = fused.step(parts, measured.gradient, measured.direction, scale, pulls, go.to(torch.float32))
        self.before.know(squares)
        return True

    def _update_span(self, measured: Measured, parts: Sequence[fused.Part]) -> Span:
        """The update's span, before it is made. The sources are where they were: their products are known.

        Those of the parameters with the others are not measured, since no rule asks for them.
        """
        assert measured.gradient is not None
        count = len(measured.survey.sources[self._sources]) if self._aligns_update else 0
        found = fused.products(parts, measured.gradient, SOURCES, count)
        gram = found.new_zeros(len(found), 1 + self._bounded + count, 1 + self._bounded + count)
        first = BEFORE + self._bounded
        gram[:, UPDATE, UPDATE] = found[:, 0]
        if self._bounded:
            gram[:, BEFORE, BEFORE] = found[:, 1]
        gram[:, UPDATE, first:] = gram[:, first:, UPDATE] = found[:, 2:]
        gram[:, first:, first:] = measured.span.gram[:, SOURCES : SOURCES + count, SOURCES : SOURCES + count]
        return Span(gram)

    @torch.no_grad()
    def correct(self, measured: Measured) -> None:
        """Measure, decide and combine once more, on the update that the base made since ``before`` was kept."""
        survey, bounded = measured.survey, self._bounded
        sources = survey.sources[self._sources] if self._aligns_update else []
        rows: Rows = []
        for bucket in survey.buckets:
            before = self.before.of(bucket)
            start = [Row(offset=before)] if bounded else []
            rows.append(Stack([Row(at=bucket.values, anchor=before), *start, *source_rows(sources, bucket, before)]))
        # Scaling alone needs no products.
        needed = self._aligns_update or bounded or survey.sharded
        zeros = Span(torch.zeros_like(measured.span.gram[:, :1, :1]))
        span = survey.gram(rows, 1 + bounded + len(sources)) if needed else zeros
        change = self._wanted(measured, span) - span.row(UPDATE)
        if survey.sharded:
            # Only a collective could measure it later, and metrics may be read on one rank alone.
            self.before.know([span.norm(span.row(UPDATE) + change).square()])
        writes = [[Write(into=bucket.values, coefficients=change[s], accumulate=True)] for bucket, s in survey]
        survey.combine_(rows, writes)

    def _wanted(self, measured: Measured, span: Span) -> Tensor:
        """The update that is to be made, in coordinates [S, R] of its span: what the rules leave of the base's own."""
        update = span.row(UPDATE)
        wanted = update if measured.scale is None else update * measured.scale.unsqueeze(1)
        if self._largest is not None:
            lengths = span.norm(wanted), span.norm(span.row(BEFORE))
            wanted = wanted * bounding.shrink(*lengths, measured.survey.numbers(), self._largest).unsqueeze(1)
        if self._aligns_update:
            # A step raises the source loss where it goes along the source gradient.
            wanted = -aligning.project(span, -wanted, first=BEFORE + self._bounded)
        return torch.where(span.gram.isfinite().all(), wanted, update)

    def _directions_written(self, measured: Measured) -> list[Sequence[Tensor] | None]:
        """For each bucket the running direction, where it is ours to write."""
        if self.direction is None or self.direction.share_momentum:
            return [None] * len(measured.rows)
        kept = [rows[DIRECTION] for rows in measured.rows]
        return [None if row is None else row.offset for row in kept]

    def direction_row(self, base: Optimizer, bucket: Bucket) -> Row | None:
        """The running direction over a bucket; None where there is none, or none yet."""
        if self.direction is None:
            return None
        if self.direction.share_momentum:
            found = [momentum_of(base, p) for p in bucket.parameters]
            if all(momentum is None for momentum in found):
                return None
            return Row(
                offset=[
                    torch.zeros_like(value) if momentum is None else local(momentum)
                    for momentum, value in zip(found, bucket.values, strict=True)
                ]
            )
        pairs = list(zip(bucket.parameters, bucket.values, strict=True))
        new = {p: v for p, v in pairs if p not in self.directions or self.directions[p].shape != v.shape}
        self.directions.update(zip(new, lay_out(list(new.values()), torch.float32), strict=True))
        return Row(offset=[self.directions[p] for p in bucket.parameters])

    def _rates(self, measured: Measured, base: Optimizer) -> tuple[Tensor, Tensor]:
        """Decay and gain of the base's momentum per scope, those of the scope's first parameter."""
        owner = {p: group for group in base.param_groups for p in group["params"]}
        per_scope: dict[int, tuple[float, float]] = {}
        for (bucket, scope), rows in zip(measured.survey, measured.rows, strict=True):
            per_scope.setdefault(scope, rates(base, owner[bucket.parameters[0]], rows[DIRECTION] is not None))
        gram = measured.span.gram
        # A scope without a gradient on this rank adds nothing to its average, whatever its rates.
        all_rates = (per_scope.get(scope, (1.0, 0.0)) for scope in range(gram.shape[0]))
        decays, gains = zip(*all_rates, strict=True)
        # Filled on the device: a copy from the host would make it wait.
        return torch.cat([gram.new_full((1,), d) for d in decays]), torch.cat([gram.new_full((1,), g) for g in gains])


def _sharded(bucket: Bucket) -> bool:
    return any(value is not parameter for value, parameter in zip(bucket.values, bucket.parameters, strict=True))
