"""One guided step: measure the rows, decide on their Gram matrix, combine; then repeat on the base's update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.base_checks import resting_groups
from gradguide.distributed.layouts import local
from gradguide.ops import Row, Stack, Write
from gradguide.ops.allocate import allocate_contiguous
from gradguide.ops.tensors import TensorList, metadata_of, wide_dtype
from gradguide.rules.alignment import Alignment
from gradguide.rules.decide import DIRECTION, SOURCES, Decision, Limit, Rules
from gradguide.rules.direction import Direction
from gradguide.rules.magnitude import Magnitude
from gradguide.rules.span import Span
from gradguide.sources.protocol import Source
from gradguide.step import fused_adam
from gradguide.step.buckets import Bucket
from gradguide.step.correction import Before, copy_before, update_source_rows, write_corrected
from gradguide.step.metrics import Record
from gradguide.step.momentum import ema_coefficients_by_scope, momentum_buffers
from gradguide.step.plan import Rows, StepPlan
from gradguide.step.planner import StepPlanner
from gradguide.step.scope_state import ScopeState

__all__ = ["Engine", "StepState"]


@dataclass(slots=True)
class StepState:
    """State of a step after its measuring pass.

    plan: the parameters of the step, in S scopes.
    rows: for each bucket its R rows.
    span: Gram matrices of the rows, [S, R, R].
    positions (Tensor): shape [S], indices into the scopes' statistics.
    regularized: whether to add the last row to the gradient.
    found_finite (Tensor | None): whether all products are finite; None until computed.
    decision: None before :meth:`Engine.decide`.
    limit: the constrained update; None until the update is measured.
    """

    plan: StepPlan
    rows: Rows
    span: Span
    positions: Tensor
    regularized: bool
    found_finite: Tensor | None = None
    decision: Decision | None = None
    limit: Limit | None = None

    @property
    def finite(self) -> Tensor:
        """Whether all products are finite, 0-d bool. Computed on first use, since the Triton rules compute it too."""
        if self.found_finite is None:
            self.found_finite = self.span.gram.isfinite().all()
        return self.found_finite

    @property
    def decided(self) -> Decision:
        """Return the decision; :meth:`Engine.decide` must have run."""
        assert self.decision is not None
        return self.decision


class Engine:
    """The enabled rules and their state between steps.

    directions: the running direction of each parameter, float32.
    scopes: statistics of each scope.
    update_squares: partial sums of the last update's squared norm; empty if it was not measured.
    """

    def __init__(
        self,
        direction: Direction | None,
        alignment: Alignment | None,
        magnitude: Magnitude | None,
        planner: StepPlanner,
    ) -> None:
        self.planner = planner
        self.rules = Rules(direction, alignment, magnitude)
        self.directions: dict[Tensor, Tensor] = {}
        self.scopes = ScopeState()
        self.update_squares: list[Tensor] = []

    def set_alignment(self, alignment: Alignment | None, sources: Sequence[Source], base: Optimizer) -> None:
        """Replace the alignment. ``sources`` are those of the alignment, then those of the regularizer."""
        self.rules = replace(self.rules, alignment=alignment)
        self.planner.options["alignment"] = alignment
        self.planner.set_sources(sources, base)

    @torch.no_grad()
    def measure(
        self, plan: StepPlan, base: Optimizer, regularizer_gradient: Mapping[Tensor, Tensor] | None = None
    ) -> StepState:
        """Compute the Gram matrices of gradient, direction and sources.

        Args:
            regularizer_gradient: by parameter. It becomes the last row.
        """
        regularized = regularizer_gradient is not None
        if plan.cache.positions is None:
            self._restart_scopes(plan, base)
        sources = plan.sources[: self.rules.source_count]
        rows: Rows = []
        for index, bucket in enumerate(plan.buckets):
            own = [Row(offset=bucket.gradients), self.direction_row(plan, base, index)]
            each: list[Row | None] = [*own, *plan.source_rows(sources, bucket, bucket.values, "gradient")]
            if regularizer_gradient is not None:
                each.append(Row(offset=[regularizer_gradient[p] for p in bucket.parameters]))
            rows.append(Stack(each, bucket.sizes))
        span = plan.gram(rows, SOURCES + len(sources) + regularized, self.signed_rows(len(sources)))
        if plan.cache.positions is None:
            plan.cache.positions = self.scopes.locate(plan.labels, span.gram.device)
        return StepState(plan, rows, span, plan.cache.positions, regularized)

    def _restart_scopes(self, plan: StepPlan, base: Optimizer) -> None:
        """Zero the statistics of scopes without a direction yet: labels may be positions of removed parameters."""
        if self.rules.direction is None or plan.sharded:  # ranks may lack directions, but statistics must be equal
            return
        labels = self.planner.labels(base)
        # Directions of removed parameters, which they would keep alive, go with the base's state.
        self.directions = {p: d for p, d in self.directions.items() if p in labels or p in base.state}
        found = momentum_buffers(base, labels) if self.rules.share_momentum else map(self.directions.get, labels)
        begun = {label for label, direction in zip(labels.values(), found, strict=True) if direction is not None}
        self.scopes.reset([label for label in plan.labels if label not in begun])

    def signed_rows(self, sources: int) -> slice:
        """Return the rows of the gradient pass that are multiplied by the sign of their bucket.

        These are the sources. With ``share_momentum`` also the direction: the base's momentum is an average of the
        descended gradient.
        """
        return slice(DIRECTION if self.rules.share_momentum else SOURCES, SOURCES + sources)

    @torch.no_grad()
    def decide(self, state: StepState, base: Optimizer, totals: Tensor) -> None:
        """Decide on the guided gradient, the new running direction and the statistics.

        Args:
            totals (Tensor): shape [2], steps made and steps skipped, updated in place.
        """
        gram, shared = state.span.gram, self.rules.share_momentum
        state.decision = state.plan.rules_backend.decide(
            state.span,
            self.rules,
            self.scopes.statistics,
            state.positions,
            totals,
            finite=state.found_finite,
            regularized=state.regularized,
            rates=ema_coefficients_by_scope(base, state.plan.buckets, state.rows, gram) if shared else None,
        )

    @torch.no_grad()
    def combine(self, state: StepState) -> None:
        """Write the guided gradient and the new running direction."""
        decided = state.decided
        self.update_squares = []
        writes = []
        for bucket, direction in zip(state.plan.buckets, self._own_directions(state.plan), strict=True):
            own = [] if direction is None else [Write(into=direction, coefficients=decided.direction)]
            writes.append([*own, Write(into=bucket.gradients, coefficients=decided.clipped)])
        state.plan.combine_(state.rows, writes, self.signed_rows(self.rules.source_count))

    @torch.no_grad()
    def step_fused(self, state: StepState, base: Optimizer) -> bool:
        """Combine and make the base's step in one pass: see :mod:`gradguide.step.fused_adam`.

        Return False if that is not possible. Then nothing was changed.
        """
        plan, decided = state.plan, state.decided
        count = self.rules.update_source_count
        # Where all groups rest, as at the start of a warmup, the update is zero and so is its projection.
        some_rest = count > 0 and 0 < len(resting_groups(base)) < len(base.param_groups)
        if count > fused_adam.MAX_SOURCES or plan.sharded or some_rest:
            return False
        signs = plan.signs(state.span.gram.shape[1], self.signed_rows(self.rules.source_count))
        launches = fused_adam.plan_launches(base, plan, state.rows, self._own_directions(plan), signs)
        if launches is None:
            return False
        scale, pulls, bound = None, None, plan.cache.device_adam_bound
        proven = count == 0 and bound.update_is_bounded(base, plan.buckets, self.rules.magnitude)
        if self.rules.limit_update and not proven:
            products = fused_adam.preview_products(launches, decided.clipped, SOURCES, count)
            limit = plan.rules_backend.constrain_preview(state.span, products, self.rules, plan.element_counts())
            state.limit, scale, pulls = limit, limit.scale, limit.coefficients
        self.update_squares = fused_adam.step(launches, decided.clipped, decided.direction, scale, pulls, decided.go)
        bound.after_step()
        return True

    @torch.no_grad()
    def snapshot_if_needed(self, state: StepState, base: Optimizer, *, recorded: bool) -> Before | None:
        """Return copies of what the base's step changes, or None if its update need not be measured.

        The update is measured if a source acts on it, if its norm is recorded, or if it may exceed its bound: see
        :mod:`gradguide.step.adam_bound`.
        """
        plan, rules = state.plan, self.rules
        measured = rules.limit_update or recorded
        if rules.max_update is not None and plan.on_cpu:
            lengths = state.decided.guided_norm * state.decided.clip_factor
            if plan.cache.adam_bound.update_is_bounded(base, plan.buckets, lengths, rules.max_update):
                measured = rules.update_source_count > 0 or recorded
        return copy_before(base, plan) if measured else None

    @torch.no_grad()
    def correct_update(self, state: StepState, base: Optimizer, before: Before | None) -> None:
        """Correct the base's update. Call this after each step of the base.

        Args:
            before: from :meth:`snapshot_if_needed`.
        """
        if before is not None:
            self._correct(state, base, before)
        state.plan.cache.adam_bound.after_step(base, state.plan.buckets)

    def _correct(self, state: StepState, base: Optimizer, before: Before) -> None:
        """Measure, decide and combine on the base's update."""
        plan = state.plan
        sources = plan.sources[: self.rules.update_source_count]
        rows: Rows = []
        now = [TensorList(bucket.values) for bucket in plan.buckets]  # reads metadata: the base may have restrided some
        for bucket, values, copies in zip(plan.buckets, now, before.values, strict=True):
            own = [Row(at=values, anchor=copies), Row(offset=copies)]
            rows.append(Stack([*own, *update_source_rows(base, plan, sources, bucket, copies)], bucket.sizes))
        span = plan.gram(rows, SOURCES + len(sources))
        limit = plan.rules_backend.constrain(span, self.rules, plan.element_counts())
        state.limit = limit
        self.update_squares = [limit.norm_after.square()]
        if not self.rules.limit_update:
            return  # measured for the history only
        assert limit.coefficients is not None
        write_corrected(base, plan, rows, now, before, limit.coefficients)

    def record(self, state: StepState) -> Record | None:
        """Return the record that metrics are read from; None before a decision."""
        made, bounded = state.decision, self.rules.max_update is not None
        if made is None:
            return None
        drifts = [getattr(source, "drift", None) for source in state.plan.sources[: self.rules.source_count]]
        return Record(
            state.span, made.guided_norm, made.clip_factor, made.coherence, made.damping, state.limit, bounded, drifts
        )

    def update_norm(self, device: torch.device) -> Tensor:
        """Return the norm of the last update, Tensor []; NaN if it was not measured."""
        if not self.update_squares:
            return torch.tensor(float("nan"), device=device)
        sums = [squares.sum(dtype=wide_dtype(squares.device)).to(device) for squares in self.update_squares]
        return torch.stack(sums).sum().sqrt()

    def direction_row(self, plan: StepPlan, base: Optimizer, index: int) -> Row | None:
        """Return the running direction of bucket ``index``; None if the rule is off or no momentum exists yet."""
        if not self.rules.share_momentum:
            direction = self._own_directions(plan)[index]
            return None if direction is None else Row(offset=direction)
        bucket = plan.buckets[index]
        found = momentum_buffers(base, bucket.parameters)
        if all(momentum is None for momentum in found):
            return None
        directions = [
            torch.zeros_like(value) if momentum is None else local(momentum)
            for momentum, value in zip(found, bucket.values, strict=True)
        ]
        return Row(offset=plan.cache.metadata.of(("momentum", bucket.positions[0]), directions))

    def _own_directions(self, plan: StepPlan) -> Sequence[TensorList | None]:
        """Return the running direction of each bucket, which the step writes; None without one, or if it is shared."""
        if self.rules.direction is None or self.rules.share_momentum:
            return [None] * len(plan.buckets)
        if plan.cache.directions is None:
            plan.cache.directions = [self._directions_of(bucket) for bucket in plan.buckets]
        return plan.cache.directions

    def _directions_of(self, bucket: Bucket) -> TensorList:
        """Return the running directions of a bucket. Missing ones, and those of another shape, start at zero."""
        found = map(self.directions.get, bucket.parameters)
        new = {
            parameter: value
            for parameter, value, direction in zip(bucket.parameters, bucket.values, found, strict=True)
            if direction is None or direction.shape != value.shape or direction.device != value.device
        }
        for (parameter, value), memory in zip(
            new.items(), allocate_contiguous(list(new.values()), torch.float32), strict=True
        ):
            old = self.directions.get(parameter)
            # A model moved to another device keeps its direction.
            self.directions[parameter] = memory if old is None or old.shape != value.shape else memory.copy_(old)
        directions = [self.directions[p] for p in bucket.parameters]
        return TensorList(directions, metadata_of(directions))
