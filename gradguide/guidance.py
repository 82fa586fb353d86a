"""One guided step: measure the rows, decide in their Gram matrix, combine; then the same on the base's update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide import fused, ops
from gradguide.before import Before
from gradguide.buckets import Bucket, Label, Scope, gather, labeller
from gradguide.metrics import Record
from gradguide.momentum import momentum_of, rates
from gradguide.ops import Row, Write
from gradguide.ops.pack import lay_out
from gradguide.ranks import Ranks
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

__all__ = ["Guidance", "Measured"]

# Rows of the step's span: the gradient, the running direction, then the sources.
GRADIENT, DIRECTION, SOURCES = 0, 1, 2
# Rows of the update's span: the update, the parameters before it where it is bounded, then the sources.
UPDATE, BEFORE = 0, 1


@dataclass(slots=True)
class Measured:
    """A step after its measuring pass.

    scopes (list[int]): for each bucket, which of the S scopes it belongs to.
    positions (Tensor): shape [S], where the scopes' statistics are kept.
    rows: for each bucket its R rows.
    span: Gram matrices of the rows, [S, R, R].
    finite, moved (Tensor): 0-d bool, whether all products are finite, and whether any gradient is not zero.
    gradient, direction (Tensor): shape [S, R], once decided: coordinates of the guided gradient and the new direction.
    scale (Tensor): shape [S], once decided: what the update is multiplied by, if it is scaled.
    """

    buckets: list[Bucket]
    scopes: list[int]
    positions: Tensor
    rows: list[list[Row | None]]
    span: Span
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
        scope: Scope,
        names: Mapping[Tensor, str],
        backend: str,
    ) -> None:
        self.direction = direction
        self.alignment = alignment
        self.magnitude = magnitude
        self.scope = scope
        self.names = dict(names)
        self._places: dict[tuple[int, int], str] = {}
        self.backend = backend
        sources = () if alignment is None else alignment.sources
        # What is trained all sources know, which is checked where they are given; what is frozen perhaps only some.
        self._covered = frozenset.intersection(*(frozenset(s.shapes()) for s in sources)) if sources else frozenset()
        self.directions: dict[Tensor, Tensor] = {}
        self.scopes = Scopes()
        self.power = 0.0 if magnitude is None else magnitude.coherence
        self._largest = None if magnitude is None else magnitude.max_update
        self.before = Before()
        self._ranks = Ranks()
        self._present: Sequence[Source] = sources

    @property
    def active(self) -> bool:
        """Whether any rule is on."""
        return not (self.direction is None and self.alignment is None and self.magnitude is None)

    @property
    def acts_on_update(self) -> bool:
        """Whether a rule changes the update that the base optimizer makes."""
        return self._aligns_update or self.power > 0 or self._largest is not None

    @property
    def _all_sources(self) -> Sequence[Source]:
        return () if self.alignment is None else self.alignment.sources

    @property
    def _aligns_update(self) -> bool:
        return self.alignment is not None and self.alignment.on == "update" and self.alignment.project

    def labels(self, base: Optimizer) -> dict[Tensor, Label]:
        """Scope label of every parameter of the base."""
        self.follow(base)
        label = labeller(self.scope, self.names)
        return {
            parameter: label(parameter, index, place)
            for index, group in enumerate(base.param_groups)
            for place, parameter in enumerate(group["params"])
        }

    @torch.no_grad()
    def measure(self, base: Optimizer) -> Measured | None:
        """Gram matrices of gradient, direction and sources, or None if no parameter has a gradient."""
        self.follow(base)
        trained = [p for group in base.param_groups for p in group["params"] if p.requires_grad or p.grad is not None]
        self._ranks.meet(trained)
        buckets = gather(
            base.param_groups,
            labeller(self.scope, self.names),
            self.names,
            self._covered,
            sharded=self._ranks.sharded,
        )
        if not buckets and not self._ranks.sharded:
            return None
        labels: dict[Label, int] = {}
        if self._ranks.sharded:
            # Ranks may lack different gradients; what they add up has the same scopes on all of them.
            everywhere = self.labels(base)
            labels = {label: place for place, label in enumerate(dict.fromkeys(everywhere[p] for p in trained))}
            told = [(self.names.get(p), tuple(p.shape), str(p.dtype), repr(everywhere[p])) for p in trained]
            self._ranks.agree(trained, (told, self.direction, self.magnitude), self._all_sources)
        scopes = [labels.setdefault(bucket.label, len(labels)) for bucket in buckets]
        self._present = self._ranks.parts_of(self._all_sources, trained, self.names)
        rows = [
            [Row(offset=bucket.gradients), self._direction_row(base, bucket), *self._sources(bucket)]
            for bucket in buckets
        ]
        span = self._gram(buckets, scopes, rows, len(labels), SOURCES + len(self._present), trained[0].device)
        positions = self.scopes.locate(list(labels), span.gram.device)
        finite, moved = span.gram.isfinite().all(), (span.gram[:, GRADIENT, GRADIENT] != 0).any()
        return Measured(buckets, scopes, positions, rows, span, finite, moved)

    @torch.no_grad()
    def guide(self, measured: Measured, base: Optimizer) -> None:
        """Decide: the guided gradient, the new running direction and statistics, and how far to scale the update."""
        span, positions = measured.span, measured.positions
        average, norms = self.scopes.read(positions)
        gradient, direction = span.row(GRADIENT), span.row(DIRECTION)
        received, length = span.norm(gradient), span.norm(direction)

        guided = gradient
        if self.direction is not None and self.direction.damping > 0:
            strength = self.direction.damping * directing.evidence(length, average)
            guided = directing.damp(span, guided, direction, strength)
        if self.alignment is not None:
            if any(self.alignment.weights):
                guided = aligning.pull(guided, received, SOURCES, self.alignment.weights)
            if self.alignment.project and self.alignment.on == "gradient":
                guided = aligning.project(span, guided, SOURCES)

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
        directions = self._directions_written(measured)
        for bucket, scope, rows, kept in zip(measured.buckets, measured.scopes, measured.rows, directions, strict=True):
            writes = [] if kept is None else [Write(into=kept, coefficients=measured.direction[scope])]
            writes.append(Write(into=bucket.gradients, coefficients=measured.gradient[scope]))
            self._ops(bucket).combine_(rows, writes)

    @torch.no_grad()
    def step_fused(self, measured: Measured, base: Optimizer, *, propagate: bool) -> bool:
        """Combine and make the base's step in one pass, if that can be done: see :mod:`gradguide.fused`.

        Args:
            propagate: whether the step is made whatever was measured; else one that is not finite changes nothing.

        Returns:
            Whether it was done; if not, nothing was.
        """
        assert measured.gradient is not None and measured.direction is not None
        if self._aligns_update or self._largest is not None or any(map(_sharded, measured.buckets)):
            return False
        parts = fused.parts_of(
            base, measured.buckets, measured.scopes, measured.rows, self._directions_written(measured), self._ops
        )
        if parts is None:
            return False
        scale = torch.ones_like(measured.gradient[:, 0]) if measured.scale is None else measured.scale
        go = torch.ones_like(measured.finite) if propagate else measured.finite
        self.before.know(fused.step(parts, measured.gradient, measured.direction, scale, go.to(torch.float32)))
        return True

    @torch.no_grad()
    def correct(self, measured: Measured) -> None:
        """Measure, decide and combine once more, on the update that the base made since ``before`` was kept."""
        buckets, scopes, bounded = measured.buckets, measured.scopes, self._largest is not None
        rows: list[list[Row | None]] = []
        for bucket in buckets:
            before = self.before.of(bucket)
            made = Row(at=bucket.values, anchor=before)
            start = [Row(offset=before)] if bounded else []
            rows.append([made, *start, *(self._sources(bucket, before) if self._aligns_update else [])])
        # Scaling alone needs no products.
        zeros = Span(torch.zeros_like(measured.span.gram[:, :1, :1]))
        needed = self._aligns_update or bounded or self._ranks.sharded
        count = measured.span.gram.shape[0]
        size = 1 + bounded + (len(self._present) if self._aligns_update else 0)
        span = self._gram(buckets, scopes, rows, count, size, zeros.gram.device) if needed else zeros
        update = span.row(UPDATE)
        wanted = update if measured.scale is None else update * measured.scale.unsqueeze(1)
        if self._largest is not None:
            lengths = span.norm(wanted), span.norm(span.row(BEFORE))
            wanted = wanted * bounding.shrink(*lengths, self._numbers(measured), self._largest).unsqueeze(1)
        if self._aligns_update:
            # A step raises the source loss where it goes along the source gradient.
            wanted = -aligning.project(span, -wanted, first=BEFORE + bounded)
        change = torch.where(span.gram.isfinite().all(), wanted - update, 0.0)
        if self._ranks.sharded:
            # Only a collective could measure it later, and metrics may be read on one rank alone.
            self.before.know([span.norm(update + change).square()])
        for bucket, scope, these in zip(buckets, scopes, rows, strict=True):
            write = Write(into=bucket.values, coefficients=change[scope], accumulate=True)
            self._ops(bucket).combine_(these, [write])

    def follow(self, base: Optimizer) -> None:
        """FSDP2 and loaders put other tensors in a parameter's place; the name stays with the place."""
        if not self.names:
            return
        for index, group in enumerate(base.param_groups):
            for place, parameter in enumerate(group["params"]):
                name = self.names.get(parameter)
                if name is not None:
                    self._places[index, place] = name
                elif (index, place) in self._places and self._places[index, place] not in self._held(base):
                    self.names[parameter] = self._places[index, place]

    def _held(self, base: Optimizer) -> set[str]:
        """Names whose parameter is still there: then what stands in its place is a new one, and nameless."""
        return {self.names[p] for group in base.param_groups for p in group["params"] if p in self.names}

    def _directions_written(self, measured: Measured) -> list[Sequence[Tensor] | None]:
        """For each bucket the running direction, where it is ours to write."""
        if self.direction is None or self.direction.share_momentum:
            return [None] * len(measured.buckets)
        kept = [rows[DIRECTION] for rows in measured.rows]
        return [None if row is None else row.offset for row in kept]

    def _gram(
        self,
        buckets: Sequence[Bucket],
        scopes: Sequence[int],
        rows: Sequence[Sequence[Row | None]],
        count: int,
        size: int,
        device: torch.device,
    ) -> Span:
        """Gram matrices [count, size, size] of the scopes, summed over buckets, and of shards over ranks."""
        parts: dict[tuple[Any, ...], list[Tensor | None]] = {groups: [None] * count for groups in self._ranks.groups}
        for bucket, scope, these in zip(buckets, scopes, rows, strict=True):
            part = self._ops(bucket).gram(these).to(device)
            total = parts[bucket.summed][scope]
            parts[bucket.summed][scope] = part if total is None else total + part
        wide = torch.float32 if device.type == "mps" else torch.float64
        zero = torch.zeros(size, size, dtype=wide, device=device)
        whole = {g: torch.stack([zero if total is None else total for total in each]) for g, each in parts.items()}
        return Span(self._ranks.add_up(whole))

    def _direction_row(self, base: Optimizer, bucket: Bucket) -> Row | None:
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

    def _sources(self, bucket: Bucket, at: Sequence[Tensor] | None = None) -> list[Row | None]:
        if not bucket.names:
            return [None] * len(self._present)
        return [source.row(bucket.names, bucket.values if at is None else at) for source in self._present]

    def _numbers(self, measured: Measured) -> Tensor:
        """How many numbers each scope has: Tensor [S]."""
        counts = [0] * measured.span.gram.shape[0]
        for bucket, scope in zip(measured.buckets, measured.scopes, strict=True):
            counts[scope] += sum(p.numel() for p in bucket.parameters)
        # Filled on the device: a copy from the host would make it wait.
        return torch.cat([measured.span.gram.new_full((1,), count) for count in counts])

    def _rates(self, measured: Measured, base: Optimizer) -> tuple[Tensor, Tensor]:
        """Decay and gain of the base's momentum per scope, those of the scope's first parameter."""
        owner = {p: group for group in base.param_groups for p in group["params"]}
        per_scope: dict[int, tuple[float, float]] = {}
        for bucket, scope, rows in zip(measured.buckets, measured.scopes, measured.rows, strict=True):
            per_scope.setdefault(scope, rates(base, owner[bucket.parameters[0]], rows[DIRECTION] is not None))
        gram = measured.span.gram
        # A scope without a gradient on this rank adds nothing to its average, whatever its rates.
        all_rates = (per_scope.get(scope, (1.0, 0.0)) for scope in range(gram.shape[0]))
        decays, gains = zip(*all_rates, strict=True)
        # Filled on the device: a copy from the host would make it wait.
        return torch.cat([gram.new_full((1,), d) for d in decays]), torch.cat([gram.new_full((1,), g) for g in gains])

    def _ops(self, bucket: Bucket) -> ops.Ops:
        return ops.select(self.backend, bucket.gradients[0].device)


def _sharded(bucket: Bucket) -> bool:
    return any(value is not parameter for value, parameter in zip(bucket.values, bucket.parameters, strict=True))
