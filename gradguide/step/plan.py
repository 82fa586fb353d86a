"""The plan of a step: what holds while parameters stay as they are, and the passes over their buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradguide import ops
from gradguide.ops import Row, Stack, Write
from gradguide.ops.pack import allocate_contiguous
from gradguide.ops.tensors import MetadataCache, TensorList, metadata_of
from gradguide.rules.span import Span
from gradguide.sources.protocol import Source
from gradguide.step.buckets import Bucket, Label
from gradguide.step.ranks import Ranks

__all__ = ["UNSIGNED", "Rows", "StepPlan"]

UNSIGNED = slice(0, 0)
"""No row has a sign: for rows of the update, which is what the base really did."""

Rows = list[Stack]
"""For each bucket its R rows."""


@dataclass(slots=True)
class PlanCache:
    """What is computed once for a plan, and is discarded with it.

    metadata: of lists of the base's state and of sources.
    directions: for each bucket the running directions, once there are any.
    snapshots: for each bucket memory for a copy of its parameters.
    positions (Tensor): where the scopes' statistics are.
    numbers (Tensor): how many elements each scope has.
    """

    metadata: MetadataCache = field(default_factory=MetadataCache)
    directions: list[TensorList] | None = None
    snapshots: list[TensorList] | None = None
    positions: Tensor | None = None
    numbers: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The parameters of one step.

    buckets: with this step's gradients.
    labels: of the S scopes.
    sources: all sources, for this rank's shards.
    device: where Gram matrices of all scopes are summed.
    backends: the passes for each bucket.
    fused (bool): whether decisions are made by a kernel too.
    rounding: how exact products are, see ``gradguide.ops.rounding``.
    """

    buckets: list[Bucket]
    labels: list[Label]
    sources: Sequence[Source]
    device: torch.device
    ranks: Ranks
    backends: Sequence[ops.Ops]
    fused: bool
    rounding: float
    cache: PlanCache = field(default_factory=PlanCache)

    def with_gradients(self, gradients: Mapping[int, Tensor] | None) -> StepPlan:
        """Return the plan with other gradients of the same metadata, by position; with None, without gradients."""
        buckets = []
        for bucket in self.buckets:
            metadata = bucket.gradients.metadata
            found = [] if gradients is None else list(map(gradients.__getitem__, bucket.positions))
            buckets.append(replace(bucket, gradients=TensorList(found, metadata)))
        return replace(self, buckets=buckets)

    @property
    def sharded(self) -> bool:
        """Whether any parameter is a DTensor."""
        return self.ranks.sharded

    def signs(self, size: int, signed: slice) -> list[Tensor | None]:
        """Return for each bucket the signs of its rows: Tensor [size], -1 at ``signed``; None where all are 1.

        Gradients and running directions are kept as received. In a group that maximizes, the step descends along the
        negative gradient. There the rows ``signed``, which are those of what is descended (sources, the base's own
        momentum), count with the opposite sign, so that all rows of a scope belong to one descent.
        """
        if all(bucket.sign > 0 for bucket in self.buckets):
            return [None] * len(self.buckets)
        signs = torch.ones(size, dtype=self._wide, device=self.device)
        signs[signed] = -1.0
        return [None if bucket.sign > 0 else signs for bucket in self.buckets]

    def gram(self, rows: Rows, size: int, signed: slice = UNSIGNED) -> Span:
        """Return Gram matrices [S, size, size] of the scopes, summed over buckets, and of shards over ranks.

        Args:
            signed: rows with the sign of their bucket, see :meth:`signs`.
        """
        parts: dict[tuple[Any, ...], Tensor] = {}
        signs_of = self.signs(size, signed)
        for bucket, backend, these, signs in zip(self.buckets, self.backends, rows, signs_of, strict=True):
            part = backend.gram(these).to(self.device)
            part = part if signs is None else part * signs.outer(signs)
            parts[bucket.summed] = parts[bucket.summed] + part if bucket.summed in parts else part
        shape = len(self.labels), size, size
        whole = {
            groups: parts[groups] if groups in parts else torch.zeros(shape, dtype=self._wide, device=self.device)
            for groups in self.ranks.groups  # the same order on all ranks, whatever gradients one of them lacks
        }
        return Span(self.ranks.add_up(whole), self.rounding)

    def combine_(self, rows: Rows, writes: Sequence[Sequence[Write]], signed: slice = UNSIGNED) -> None:
        """For each bucket, write combinations of its rows, of which ``signed`` are those in :meth:`gram`."""
        size = max((write.coefficients.shape[1] for each in writes for write in each), default=0)
        signs_of = self.signs(size, signed)
        for bucket, backend, these, wanted, signs in zip(
            self.buckets, self.backends, rows, writes, signs_of, strict=True
        ):
            device = bucket.values[0].device
            if signs is not None:
                wanted = [replace(write, coefficients=write.coefficients * signs) for write in wanted]
            if device != self.device:
                wanted = [replace(write, coefficients=write.coefficients.to(device)) for write in wanted]
            backend.combine_(these, wanted)

    def snapshot(self) -> list[TensorList]:
        """Copy the parameters: for each bucket a list in memory that the plan keeps."""
        if self.cache.snapshots is None:
            copies = [allocate_contiguous(bucket.values) for bucket in self.buckets]
            self.cache.snapshots = [TensorList(each, metadata_of(each)) for each in copies]
        for bucket, copy in zip(self.buckets, self.cache.snapshots, strict=True):
            torch._foreach_copy_(copy, bucket.values)
        return self.cache.snapshots

    def numbers(self) -> Tensor:
        """Return how many elements each scope has: Tensor [S], float64."""
        if self.cache.numbers is None:
            elements = (bucket.elements for bucket in self.buckets)
            counts = list(map(sum, zip([0] * len(self.labels), *elements, strict=True)))
            if self.fused:
                from gradguide.ops.triton.launch import numbers_of

                return numbers_of(self.device, counts)  # which keeps tables itself, for CUDA graphs
            # Filled on the device: a copy from the host would make it wait.
            parts = [torch.full((1,), count, dtype=self._wide, device=self.device) for count in counts]
            self.cache.numbers = torch.cat(parts)
        return self.cache.numbers

    def source_rows(
        self, sources: Sequence[Source], bucket: Bucket, at: Sequence[Tensor], stage: str
    ) -> list[Row | None]:
        """Return the source gradients of a bucket at ``at``; None for all in a bucket without names."""
        if not bucket.names:
            return [None] * len(sources)
        found: list[Row | None] = []
        for index, source in enumerate(sources):
            row = source.row(bucket.names, at)
            key = stage, index, bucket.positions[0]
            parts = {
                name: part if part is None or part is at else self.cache.metadata.of((*key, name), part)
                for name, part in zip(("offset", "scale", "anchor"), (row.offset, row.scale, row.anchor), strict=True)
            }
            found.append(replace(row, **parts))
        return found

    @property
    def _wide(self) -> torch.dtype:
        """Float64 where the device has it."""
        return torch.float32 if self.device.type == "mps" else torch.float64
