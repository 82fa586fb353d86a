"""One guided step: measure the rows, decide in their Gram matrix, combine; then the same on the base's update."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide import fused
from gradguide.before import Before
from gradguide.buckets import Bucket
from gradguide.metrics import Record
from gradguide.momentum import momenta, rates
from gradguide.ops import Row, Stack, Write
from gradguide.ops.pack import lay_out
from gradguide.ops.row import scopes_of
from gradguide.ops.tensors import Interned, Note, Tensors
from gradguide.rules import decision
from gradguide.rules.alignment import Alignment
from gradguide.rules.decision import DIRECTION, SOURCES, Decision, Limit, Rules
from gradguide.rules.direction import Direction
from gradguide.rules.magnitude import Magnitude
from gradguide.rules.span import Span
from gradguide.scopes import Scopes
from gradguide.sharding import local
from gradguide.sources.source import Source
from gradguide.survey import Rows, Survey, Surveyor, source_rows

__all__ = ["Guidance", "Measured"]


@dataclass(slots=True)
class Measured:
    """A step after its measuring pass.

    survey: its parameters, in S scopes.
    rows: for each bucket its R rows.
    span: Gram matrices of the rows, [S, R, R].
    positions (Tensor): shape [S], where the scopes' statistics are kept.
    regularized: whether the last row is to be added to the gradient.
    found_finite (Tensor | None): what ``finite`` found, once it was asked.
    decision: what was decided on it, once it was.
    limit: what the rules left of the base's update, once it was measured.
    """

    survey: Survey
    rows: Rows
    span: Span
    positions: Tensor
    regularized: bool
    found_finite: Tensor | None = None
    decision: Decision | None = None
    limit: Limit | None = None

    @property
    def finite(self) -> Tensor:
        """Whether all products are finite, 0-d bool; found out when asked, since a kernel that decides finds it too."""
        if self.found_finite is None:
            self.found_finite = self.span.gram.isfinite().all()
        return self.found_finite

    @property
    def decided(self) -> Decision:
        """The decision, which must have been made."""
        assert self.decision is not None
        return self.decision


class Guidance:
    """The rules that are on, and what they remember between steps."""

    def __init__(
        self,
        direction: Direction | None,
        alignment: Alignment | None,
        magnitude: Magnitude | None,
        surveyor: Surveyor,
    ) -> None:
        self.surveyor = surveyor
        self.rules = Rules(direction, None, magnitude)
        self.align(alignment, surveyor.sources)
        self.directions: dict[Tensor, Tensor] = {}
        self.scopes = Scopes()
        self.before = Before()

    def align(self, alignment: Alignment | None, sources: Sequence[Source]) -> None:
        """Align from now on as ``alignment`` says; ``sources`` are its own, then those that a regularizer asks."""
        self.rules = replace(self.rules, alignment=alignment)
        self.surveyor.options["alignment"] = alignment
        self.surveyor.ask(sources)

    @property
    def active(self) -> bool:
        """Whether any rule is on."""
        return self.rules != Rules(None, None, None)

    @property
    def acts_on_update(self) -> bool:
        """Whether a rule changes the update that the base optimizer makes."""
        return self.rules.limit_update

    @torch.no_grad()
    def measure(self, base: Optimizer, added: Mapping[Tensor, Tensor] | None = None) -> Measured | None:
        """Gram matrices of gradient, direction and sources, or None if no parameter has a gradient.

        Args:
            added: by parameter, what a regularizer adds to the gradient: one more row.
        """
        survey = self.surveyor.survey(base)
        if survey is None:
            return None
        sources = survey.sources[: self.rules.sources]
        rows: Rows = []
        for bucket in survey.buckets:
            own = [Row(offset=bucket.gradients), self.direction_row(base, bucket, survey.interned)]
            more = [] if added is None else [Row(offset=[added[p] for p in bucket.parameters])]
            rows.append(Stack([*own, *source_rows(sources, bucket, bucket.values), *more], bucket.sizes))
        span = survey.gram(rows, SOURCES + len(sources) + (added is not None), self.signed(len(sources)))
        positions = self.scopes.locate(survey.labels, span.gram.device)
        return Measured(survey, rows, span, positions, added is not None)

    def signed(self, sources: int) -> slice:
        """Return which rows of the gradient's pass have the sign of their bucket: so many sources, and the direction
        where it is the base's own momentum, an average of the gradients that it descends."""
        shared = self.rules.direction is not None and self.rules.direction.share_momentum
        return slice(DIRECTION if shared else SOURCES, SOURCES + sources)

    @torch.no_grad()
    def guide(self, measured: Measured, base: Optimizer, totals: Tensor) -> None:
        """Decide: the guided gradient, the new running direction and statistics.

        Args:
            totals (Tensor): shape [2], steps made and steps left out, counted in place.
        """
        shared = self.rules.direction is not None and self.rules.direction.share_momentum
        measured.decision = self._rules_of(measured.survey).decide(
            measured.span,
            self.rules,
            self.scopes.statistics,
            measured.positions,
            totals,
            finite=measured.found_finite,
            regularized=measured.regularized,
            rates=self._rates(measured, base) if shared else None,
        )

    @torch.no_grad()
    def combine(self, measured: Measured) -> None:
        """Write what was decided: the guided gradient and the new running direction."""
        decided = measured.decided
        self.before.know([])
        writes = []
        for bucket, kept in zip(measured.survey.buckets, self._directions_written(measured), strict=True):
            written = [] if kept is None else [Write(into=kept, coefficients=decided.direction)]
            writes.append([*written, Write(into=bucket.gradients, coefficients=decided.gradient)])
        measured.survey.combine_(measured.rows, writes, self.signed(self.rules.sources))

    @torch.no_grad()
    def step_fused(self, measured: Measured, base: Optimizer) -> bool:
        """Combine and make the base's step in one pass, if that can be done: see :mod:`gradguide.fused`.

        Returns:
            Whether it was done; if not, nothing was.
        """
        survey, decided = measured.survey, measured.decided
        count = self.rules.update_sources
        if count > fused.MOST_SOURCES or survey.sharded:
            return False
        signs = survey.signs(measured.span.gram.shape[1], self.signed(self.rules.sources))
        parts = fused.parts_of(base, survey, measured.rows, self._directions_written(measured), signs)
        if parts is None:
            return False
        scale, pulls = None, None
        if self.rules.limit_update:
            products = fused.products(parts, decided.gradient, SOURCES, count)
            limit = self._rules_of(survey).limit_unmade(measured.span, products, self.rules, survey.numbers())
            measured.limit, scale, pulls = limit, limit.scale, limit.coefficients
        self.before.know(fused.step(parts, decided.gradient, decided.direction, scale, pulls, decided.go))
        return True

    @torch.no_grad()
    def correct(self, measured: Measured) -> None:
        """Measure, decide and combine once more, on the update that the base made since ``before`` was kept."""
        survey = measured.survey
        if not self.rules.limit_update and not survey.sharded:
            return  # the update is measured when metrics are read
        sources = survey.sources[: self.rules.update_sources]
        rows: Rows = []
        for bucket in survey.buckets:
            bucket.values.note.trusted = False  # the base may have given parameters other memory
            before = self.before.of(bucket)
            own = [Row(at=bucket.values, anchor=before), Row(offset=before)]
            rows.append(Stack([*own, *source_rows(sources, bucket, before)], bucket.sizes))
        span = survey.gram(rows, SOURCES + len(sources))
        limit = self._rules_of(survey).limit(span, self.rules, survey.numbers())
        measured.limit = limit
        if survey.sharded:
            # Only a collective could measure it later, and metrics may be read on one rank alone.
            self.before.know([limit.norm.square()])
        if not self.rules.limit_update:
            return
        assert limit.coefficients is not None
        after: Rows = [
            Stack([Row(offset=bucket.values), *these[1:]], bucket.sizes)
            for bucket, these in zip(survey.buckets, rows, strict=True)
        ]
        writes = [[Write(into=bucket.values, coefficients=limit.coefficients)] for bucket in survey.buckets]
        survey.combine_(after, writes)

    def record(self, measured: Measured) -> Record | None:
        """Return what metrics are read from; None before a decision."""
        made, bounded = measured.decision, self.rules.max_update is not None
        if made is None:
            return None
        return Record(
            measured.span, made.guided, made.norm, made.factor, made.coherence, made.damping, measured.limit, bounded
        )

    @staticmethod
    def _rules_of(survey: Survey) -> ModuleType:
        """Where decisions are made: by a kernel, or by the operations that say what it must give."""
        if not survey.fused:
            return decision
        from gradguide.rules import triton

        return triton

    def _directions_written(self, measured: Measured) -> list[Sequence[Tensor] | None]:
        """For each bucket the running direction, where it is ours to write."""
        if self.rules.direction is None or self.rules.direction.share_momentum:
            return [None] * len(measured.rows)
        kept = [rows[DIRECTION] for rows in measured.rows]
        return [None if row is None else row.offset for row in kept]

    def direction_row(self, base: Optimizer, bucket: Bucket, interned: Interned) -> Row | None:
        """The running direction over a bucket; None where there is none, or none yet."""
        if self.rules.direction is None:
            return None
        key = "direction", bucket.places[0]
        if not self.rules.direction.share_momentum:
            return Row(offset=self._directions_of(bucket, interned, key))
        found = momenta(base, bucket.parameters)
        if all(momentum is None for momentum in found):
            return None
        directions = [
            torch.zeros_like(value) if momentum is None else local(momentum)
            for momentum, value in zip(found, bucket.values, strict=True)
        ]
        return Row(offset=interned.of(key, directions))

    def _directions_of(self, bucket: Bucket, interned: Interned, key: Hashable) -> Tensors:
        """The directions that are kept; zeros where there were none, or none of this shape."""
        owner, kept = interned.own.get(key, (None, None))
        if kept is not None and owner is self.directions:  # no state was loaded since
            return kept
        new: dict[Tensor, Tensor] = {}
        for parameter, value in zip(bucket.parameters, bucket.values, strict=True):
            direction = self.directions.get(parameter)
            if direction is None or direction.shape != value.shape:
                new[parameter] = value
            elif direction.device != value.device:
                self.directions[parameter] = direction.to(value.device)
        self.directions.update(zip(new, lay_out(list(new.values()), torch.float32), strict=True))
        directions = Tensors((self.directions[p] for p in bucket.parameters), Note(trusted=True))
        interned.own[key] = self.directions, directions
        return directions

    def _rates(self, measured: Measured, base: Optimizer) -> tuple[Tensor, Tensor]:
        """Decay and gain of the base's momentum per scope, those of the scope's first parameter."""
        gram = measured.span.gram
        members: dict[int, list[Tensor]] = {}
        firsts: dict[int, tuple[int, int]] = {}  # place of the first parameter, and its group
        for bucket, rows in zip(measured.survey.buckets, measured.rows, strict=True):
            for scope, tensors in enumerate(scopes_of(rows)):
                if tensors:
                    first = bucket.places[tensors.start], bucket.groups[tensors.start]
                    firsts[scope] = min(first, firsts.get(scope, first))
                    members.setdefault(scope, []).extend(bucket.parameters[tensors.start : tensors.stop])
        found = {scope: rates(base, base.param_groups[firsts[scope][1]], own) for scope, own in members.items()}
        # A scope without a gradient on this rank adds nothing to its average, whatever its rates.
        all_rates = (found.get(scope, (1.0, 0.0)) for scope in range(gram.shape[0]))
        decays, gains = zip(*all_rates, strict=True)
        # Filled on the device: a copy from the host would make it wait.
        return torch.cat([gram.new_full((1,), d) for d in decays]), torch.cat([gram.new_full((1,), g) for g in gains])
